"""How uncertain rows of logits are, and the gradient of that, in Triton.

A program has ROWS rows and goes over their classes, COLUMNS at a time. Each of its ROWS x COLUMNS lanes sums over its
own classes without talking to the others, and leaves out one of the largest logits that it has seen: beside that one's
exponential those of the others may be too small to be seen. At the end the lanes of a row are put together.

The exponentials are those of logits less a reference, which must be no more than FAR below the largest: the largest of
the first columns. Where that turns out not to be so, the rows are gone over again with the largest.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from fastdistill.kernels.kd_ce_loss import _multiple, _rows
from torch import Tensor

TILE_SIZE = 1024  # elements of a program that has all columns of its rows at once
MAX_COLUMNS = 4096
FAR = tl.constexpr(8)


@triton.jit
def _bounded(gap):
    """No less than where exp is 0, so that their product is 0 too."""
    return tl.maximum(gap, -1000.0)


@triton.jit
def _finite(x):
    """0 for -inf, of which no difference can be taken."""
    return tl.where(x == -float("inf"), 0, x)


@triton.jit
def _log1p(x):
    y = 1 + x
    return tl.where(y == 1, x, tl.log(y) * (x / tl.where(y == 1, 1, y - 1)))


@triton.jit
def _load(logits_ptr, column, classes, exists, DTYPE: tl.constexpr):
    return tl.load(logits_ptr + column, mask=exists & (column < classes), other=-float("inf")).to(DTYPE)


@triton.jit
def _sweep(logits_ptr, lane, classes, exists, reference, DTYPE: tl.constexpr, KIND: tl.constexpr,
           ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Per row: the largest logit, the second largest, and over all but the one largest the sums of
    e = exp(z - reference) and of e * (z - reference)."""
    largest = tl.full([ROWS, COLUMNS], -float("inf"), DTYPE)
    second = largest
    others = tl.zeros([ROWS, COLUMNS], DTYPE)
    weighted = others
    for start in range(0, classes, COLUMNS):
        logits = _load(logits_ptr, start + lane, classes, exists, DTYPE)
        added = tl.where(logits > largest, largest, logits)  # of the two the smaller: a NaN is
        largest = tl.maximum(largest, logits)
        exp = tl.exp(added - reference)
        others += exp
        if KIND == "entropy":
            weighted += exp * _bounded(added - reference)
        if KIND == "margin":
            second = tl.maximum(second, added)
    row_largest = tl.max(largest, 1, keep_dims=True)
    held = lane == tl.min(tl.where(largest == row_largest, lane, COLUMNS), 1, keep_dims=True)
    exp = tl.where(held, 0, tl.exp(largest - reference))
    others = tl.sum(others + exp, 1, keep_dims=True)
    weighted = tl.sum(weighted + exp * _bounded(largest - reference), 1, keep_dims=True)
    second = tl.max(tl.where(held, second, largest), 1, keep_dims=True)
    return row_largest, second, others, weighted


@triton.jit
def _find(logits_ptr, lane, classes, exists, value, besides, DTYPE: tl.constexpr, ROWS: tl.constexpr,
          COLUMNS: tl.constexpr):  # fmt: skip
    """Per row the lowest class, besides one, whose logit has the value."""
    lowest = tl.zeros([ROWS, COLUMNS], tl.int32) + classes
    for start in range(0, classes, COLUMNS):
        column = start + lane
        logits = _load(logits_ptr, column, classes, exists, DTYPE)
        lowest = tl.minimum(lowest, tl.where((logits == value) & (column != besides), column, classes))
    return tl.min(lowest, 1, keep_dims=True)


@triton.jit(do_not_specialize=["rows", "classes", "stride"])
def _uncertainty_kernel(
    logits_ptr,  # [rows, classes], unit column stride
    values_ptr,  # out [rows]; or, for the gradient, the upstream gradient [rows], contiguous. Computed in its dtype
    grad_ptr,  # out [rows, classes], contiguous; not written unless GRADIENT
    rows,
    classes,
    stride,  # elements from a row to the next
    at_uniform: tl.float64,  # what to divide by
    KIND: tl.constexpr,
    GRADIENT: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # divides classes and stride
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    DTYPE: tl.constexpr = values_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    exists = row < rows
    lane = tl.arange(0, COLUMNS)[None, :]
    classes = _multiple(classes, ALIGNMENT)
    logits_ptr += row * _multiple(stride, ALIGNMENT)

    first = _load(logits_ptr, lane, classes, exists, DTYPE)
    reference = _finite(tl.max(first, 1, keep_dims=True))
    largest, second, others, weighted = _sweep(logits_ptr, lane, classes, exists, reference, DTYPE, KIND, ROWS, COLUMNS)
    if tl.max((exists & (tl.abs(largest - reference) > FAR)).to(tl.int32)) > 0:
        reference = _finite(largest)
        largest, second, others, weighted = _sweep(
            logits_ptr, lane, classes, exists, reference, DTYPE, KIND, ROWS, COLUMNS
        )
    rise = largest - reference
    weighted = tl.exp(-rise) * (weighted - rise * others)
    others = tl.exp(-rise) * others
    total = others + 1 + (largest - largest)  # NaN if that is infinite
    exp_second = tl.zeros_like(others)
    if KIND == "margin":
        exp_second = tl.exp(second - largest)
    at_uniform = tl.full([], at_uniform, DTYPE)

    if GRADIENT:
        largest_at, second_at = row, row
        if KIND != "entropy":
            largest_at = _find(logits_ptr, lane, classes, exists, largest, -1, DTYPE, ROWS, COLUMNS)
        if KIND == "margin":
            second_at = _find(logits_ptr, lane, classes, exists, second, largest_at, DTYPE, ROWS, COLUMNS)
        scale = tl.load(values_ptr + row, mask=exists, other=0) / (at_uniform * total)
        grad_ptr += row * classes
        for start in range(0, classes, COLUMNS):
            column = start + lane
            gap = _bounded(_load(logits_ptr, column, classes, exists, DTYPE) - largest)
            if KIND == "entropy":
                grad = tl.exp(gap) * (weighted / total - gap)
            elif KIND == "least_confidence":
                grad = tl.where(column == largest_at, -others, tl.exp(gap)) / total
            else:
                grad = tl.where(column == largest_at, -others - exp_second, tl.exp(gap) * (1 - exp_second)) / total
                grad += tl.where(column == second_at, exp_second, 0)
            tl.store(grad_ptr + column, grad * scale, mask=exists & (column < classes))
    else:
        if KIND == "entropy":  # noqa: SIM108 (a branch of the compiler's)
            value = _log1p(others) - weighted / total
        else:
            value = (others + exp_second) / total
        tl.store(values_ptr + row, value / at_uniform, mask=exists)


def _launch(logits: Tensor, values: Tensor, grad: Tensor, kind: str, normalize: bool, gradient: bool) -> None:
    if logits.numel() == 0:
        return
    logits, stride = _rows(logits)
    classes = logits.shape[-1]
    rows = logits.numel() // classes
    at_uniform = 1.0
    if normalize and kind != "margin":
        at_uniform = math.log(classes) if kind == "entropy" else 1 - 1 / classes
    columns = min(1 << (classes - 1).bit_length(), MAX_COLUMNS)
    tile_rows = max(TILE_SIZE // columns, 1)
    warps = max(columns // 256, 4)
    registers = min(65536 // (32 * warps), 255)  # what a multiprocessor has; for long rows half, to hold two programs
    if warps == 16 and values.dtype != torch.float64:
        registers //= 2
    with torch.cuda.device_of(logits):
        _uncertainty_kernel[(-(-rows // tile_rows),)](
            logits, values, grad, rows, classes, stride, at_uniform, kind, gradient, math.gcd(classes, stride, 16),
            tile_rows, columns, num_warps=warps, maxnreg=registers,
        )  # fmt: skip


def uncertainty(logits: Tensor, kind: str, normalize: bool) -> Tensor:
    """The op of the same name, in one launch."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    values = logits.new_empty(logits.shape[:-1], dtype=dtype)
    _launch(logits, values, values, kind, normalize, False)
    return values


def uncertainty_backward(upstream: Tensor, logits: Tensor, kind: str, normalize: bool) -> Tensor:
    """The op of the same name, in one launch."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    grad = logits.new_empty(logits.shape)
    _launch(logits, upstream.to(dtype).contiguous(), grad, kind, normalize, True)
    return grad
