"""layer_norm(residual + dropout(x)) and its gradients, in Triton.

A program has whole rows in registers, some at a time. In the backward it goes over a run of rows, and sums over them
for the gradients of weight and bias; runs are then added up by PyTorch: everything in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastdistill.kernels.common import _cast
from torch import Tensor

from fastdistill.ops import reference

RUN = 16  # rows summed by one program
TILE_BYTES = 8192  # of elements at a time
BYTES_PER_WARP = 2048
LARGEST = 8192  # elements of a row; of float64, whose registers are twice as large, a quarter


@triton.jit
def _factors(row, seed_ptr, dropout_p, DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """What dropout multiplies a row's elements by, functions of seed, row and column alone. Each of Philox's draws is
    for four columns; seven rounds pass BigCrush (Salmon et al. 2011)."""
    draw = tl.arange(0, BLOCK // 4)[None, :]
    zero = (row.to(tl.int32) + draw) * 0
    a, b, c, d = tl.philox(tl.load(seed_ptr), zero + draw, zero + row.to(tl.int32), zero, zero, n_rounds=7)
    drawn = tl.join(tl.join(a, b), tl.join(c, d)).reshape(ROWS, BLOCK)
    return tl.where(tl.uint_to_uniform_float(drawn) >= dropout_p, 1 / (1 - dropout_p), 0.0).to(DTYPE)


@triton.jit(do_not_specialize=["rows", "rows_of_weight"])
def _forward_kernel(
    x_ptr,  # [rows, SIZE]
    residual_ptr,  # [rows, SIZE]
    weight_ptr,  # [N, SIZE]
    bias_ptr,  # [N, SIZE], or not read
    seed_ptr,  # or not read
    out_ptr,  # out [rows, SIZE], contiguous
    mean_ptr,  # out [rows]
    rstd_ptr,  # out [rows]
    rows,
    rows_of_weight,  # rows / N
    x_stride,  # elements from a row to the next
    residual_stride,
    dropout_p,
    eps,
    PARTED: tl.constexpr,  # N is more than one
    BIASED: tl.constexpr,
    DROPOUT: tl.constexpr,
    DTYPE: tl.constexpr,  # what to compute in
    SIZE: tl.constexpr,  # of a row
    ROWS: tl.constexpr,  # a program has
    BLOCK: tl.constexpr,  # the power of two that is not less than SIZE
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    within = column < SIZE
    inside = (row < rows) & within
    h = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0).to(DTYPE)
    if DROPOUT:
        h *= _factors(row, seed_ptr, dropout_p, DTYPE, ROWS, BLOCK)
    h += tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0).to(DTYPE)
    mean = tl.sum(h, 1, keep_dims=True) / SIZE
    centred = tl.where(within, h - mean, 0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1, keep_dims=True) / SIZE + eps)
    own, is_own = column, within
    if PARTED:
        own, is_own = row // rows_of_weight * SIZE + column, inside
    y = centred * rstd * tl.load(weight_ptr + own, mask=is_own, other=0).to(DTYPE)
    if BIASED:
        y += tl.load(bias_ptr + own, mask=is_own, other=0).to(DTYPE)
    tl.store(out_ptr + row * SIZE + column, _cast(y, out_ptr), mask=inside)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit(do_not_specialize=["rows_of_weight", "runs_of_weight"])
def _backward_kernel(
    grad_ptr,  # [rows, SIZE], of the output
    x_ptr, residual_ptr,
    weight_ptr,  # [N, SIZE]
    seed_ptr,
    mean_ptr,  # [rows]
    rstd_ptr,  # [rows]
    grad_x_ptr,  # out [rows, SIZE], contiguous, where OWN
    grad_residual_ptr,  # out [rows, SIZE], contiguous
    weight_sums_ptr,  # out [N, runs_of_weight, SIZE], where WEIGHTED
    bias_sums_ptr,  # out [N, runs_of_weight, SIZE], where WEIGHTED
    rows_of_weight, runs_of_weight, grad_stride, x_stride, residual_stride, dropout_p,
    OWN: tl.constexpr,  # the gradient to x is another than that to residual
    WEIGHTED: tl.constexpr,  # gradients to weight and bias are wanted
    DROPOUT: tl.constexpr,
    DTYPE: tl.constexpr,
    SIZE: tl.constexpr,
    RUN: tl.constexpr,  # rows a program goes over
    ROWS: tl.constexpr,  # at a time
    BLOCK: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    within = column < SIZE
    part = run // runs_of_weight
    first = part * rows_of_weight + run % runs_of_weight * RUN
    end = (part + 1) * rows_of_weight
    weight = tl.load(weight_ptr + part * SIZE + column, mask=within, other=0).to(DTYPE)
    of_weight = tl.zeros((ROWS, BLOCK), DTYPE)
    of_bias = tl.zeros((ROWS, BLOCK), DTYPE)
    for start in range(0, RUN, ROWS):
        row = first + start + tl.arange(0, ROWS)[:, None]
        inside = (row < end) & within
        h = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0).to(DTYPE)
        if DROPOUT:
            factors = _factors(row, seed_ptr, dropout_p, DTYPE, ROWS, BLOCK)
            h *= factors
        h += tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0).to(DTYPE)
        grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0).to(DTYPE)
        mean = tl.load(mean_ptr + row, mask=row < end, other=0)
        rstd = tl.load(rstd_ptr + row, mask=row < end, other=0)
        normal = tl.where(within, (h - mean) * rstd, 0)
        if WEIGHTED:
            of_weight += grad * normal
            of_bias += grad
        to_normal = grad * weight
        along = tl.sum(to_normal * normal, 1, keep_dims=True) / SIZE
        of_h = rstd * (to_normal - tl.sum(to_normal, 1, keep_dims=True) / SIZE - normal * along)
        tl.store(grad_residual_ptr + row * SIZE + column, _cast(of_h, grad_residual_ptr), mask=inside)
        if OWN:
            if DROPOUT:
                of_h *= factors
            tl.store(grad_x_ptr + row * SIZE + column, _cast(of_h, grad_x_ptr), mask=inside)
    if WEIGHTED:
        tl.store(weight_sums_ptr + run * SIZE + column, tl.sum(of_weight, 0, keep_dims=True), mask=within)
        tl.store(bias_sums_ptr + run * SIZE + column, tl.sum(of_bias, 0, keep_dims=True), mask=within)


def _rows(x: Tensor) -> Tensor:
    """``[N, D]`` with elements of a row side by side."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _tile(size: int, wide: torch.dtype) -> dict[str, int]:
    block = max(4, triton.next_power_of_2(size))
    rows = max(1, min(RUN, TILE_BYTES // (block * wide.itemsize)))
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(1, rows * block * wide.itemsize // BYTES_PER_WARP)}


def _fits(size: int, wide: torch.dtype, seed: Tensor | None) -> bool:
    """Not of float64 with dropout: a kernel is told its probability in float32. The reference, which
    serves these, reads the seed on the host."""
    return size <= LARGEST if wide == torch.float32 else seed is None and size <= LARGEST // 4


def dropout_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, dropout_p: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The op of the same name, in one launch."""
    size, wide = x.shape[-1], reference.accumulation_dtype(x, residual, weight)
    if not _fits(size, wide, seed):
        return reference.dropout_add_layer_norm(x, residual, weight, bias, seed, dropout_p, eps)
    out = torch.empty(x.shape, dtype=reference.promoted_dtype(x, residual, weight), device=x.device)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=wide, device=x.device) for _ in range(2))
    if x.numel():
        xs, residuals, tile = _rows(x), _rows(residual), _tile(size, wide)
        with torch.cuda.device_of(x):
            _forward_kernel[(-(-len(xs) // tile["ROWS"]),)](
                xs, residuals, weight.contiguous(), weight if bias is None else bias.contiguous(),
                xs if seed is None else seed, out, mean, rstd, len(xs), x.numel() // weight.numel(), xs.stride(0),
                residuals.stride(0), float(dropout_p), float(eps), weight.numel() > size, bias is not None,
                seed is not None, _dtype(wide), size, **tile,
            )  # fmt: skip
    return out, mean, rstd


def dropout_add_layer_norm_backward(
    grad_output: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op of the same name, in one launch, and a sum each for weight and bias."""
    size = x.shape[-1]
    if not _fits(size, mean.dtype, seed):
        return reference.dropout_add_layer_norm_backward(
            grad_output, x, residual, weight, mean, rstd, seed, dropout_p, want_weight
        )
    is_own = seed is not None or x.dtype != residual.dtype
    grad_x = torch.empty(x.shape if is_own else 0, dtype=x.dtype, device=x.device)
    grad_residual = torch.empty(residual.shape, dtype=residual.dtype, device=x.device)
    parts, rows = weight.numel() // size, x.numel() // weight.numel()
    runs = -(-rows // RUN)
    sums = mean.new_empty((2, parts, runs, size) if want_weight else (2, 0))
    if rows:
        grads, xs, residuals = _rows(grad_output), _rows(x), _rows(residual)
        with torch.cuda.device_of(x):
            _backward_kernel[(parts * runs,)](
                grads, xs, residuals, weight.contiguous(), xs if seed is None else seed, mean, rstd, grad_x,
                grad_residual, sums[0], sums[1], rows, runs, grads.stride(0), xs.stride(0), residuals.stride(0),
                float(dropout_p), is_own, want_weight, seed is not None, _dtype(mean.dtype), size, RUN,
                **_tile(size, mean.dtype),
            )  # fmt: skip
    of_weight, of_bias = (
        one.sum(1).view(weight.shape).to(weight.dtype) if want_weight else weight.new_empty(0) for one in sums
    )
    return grad_x, grad_residual, of_weight, of_bias


def _dtype(wide: torch.dtype) -> tl.constexpr:
    return tl.float64 if wide == torch.float64 else tl.float32
