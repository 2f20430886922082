"""Bias, activation and gate of a feed-forward block's neurons, and their gradients, in Triton.

The rows of h stand in groups that share a gate: one group, or one for each example. A program has COLUMNS columns of a
run of up to RUN rows of one group, goes over them ROWS at a time, and in the backward sums over them for the gradients
of bias and gate. Runs are then added up by PyTorch: everything in a fixed order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from fastdistill.kernels.common import _cast, _multiple
from torch import Tensor

RUN = 64  # rows summed by one program
TILE_SIZE = 1024  # elements at a time
MAX_COLUMNS = 512
SUM_COLUMNS = 128  # fewer where runs are long, so that a small batch too makes many programs


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)) and what it lacks to 1, both to their last digits."""
    e = tl.exp(-tl.abs(x))
    larger = 1 / (1 + e)
    smaller = e / (1 + e)
    return tl.where(x < 0, smaller, larger), tl.where(x < 0, larger, smaller)


@triton.jit
def _normal(x):
    """The standard normal distribution function and its density."""
    e = tl.exp(x * x * -0.5)
    if x.dtype == tl.float64:
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    else:  # as in csrc/cpu/gated_ffn.cpp: with the density's exponential, and nothing subtracted from 1 below 0
        t = 1 / (1 + 0.35 * tl.abs(x))
        p = -0.02915789745748043 * t + 0.14403097331523895
        p = p * t - 0.25583910942077637
        p = p * t + 0.15931981801986694
        p = p * t - 0.023212432861328125
        p = p * t + 0.10555253177881241
        p = p * t + 0.11982128024101257
        p = p * t + 0.139863520860672
        p = p * t + 0.139621302485466
        tail = e * (t * p)
        share = tl.where(x < 0, tail, 1 - tail)
    return share, e * 0.3989422804014327


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """The activation and its derivative. What a caller does not use, the compiler leaves out."""
    if ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, z), tl.where(z <= 0, 0.0, 1.0).to(z.dtype)
    elif ACTIVATION == "gelu":
        share, density = _normal(z)
        return z * share, share + z * density
    elif ACTIVATION == "silu":
        share, rest = _sigmoid(z)
        return z * share, share * (1 + z * rest)
    else:  # 0.5 (1 + tanh(u / 2)) is the sigmoid of u
        square = z * z
        share, rest = _sigmoid(1.5957691216057308 * z * (1 + 0.044715 * square))
        slope = 1.5957691216057308 * (1 + 0.134145 * square)
        return z * share, share + z * slope * (share * rest)


@triton.jit(do_not_specialize=["width", "group_rows", "runs", "gate_stride"])
def _bias_act_gate_kernel(
    h_ptr,  # [groups * group_rows, width], contiguous, as are grad_output and out
    bias_ptr,  # [width]; not read unless BIASED
    gate_ptr,  # [groups, width] with unit column stride; not read unless GATED
    grad_output_ptr,  # for the gradient; otherwise not read
    out_ptr,  # out: the value, or with GRADIENT the gradient of h
    bias_sums_ptr,  # out [groups, runs, width], float64 or float32, which is computed in; unless WANT_BIAS not written
    gate_sums_ptr,  # out, the same; unless WANT_GATE not written
    width,
    group_rows,
    runs,  # of a group
    gate_stride,  # elements from a group's gates to the next's
    BIASED: tl.constexpr,
    GATED: tl.constexpr,
    GRADIENT: tl.constexpr,
    WANT_BIAS: tl.constexpr,
    WANT_GATE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # divides width
    RUN: tl.constexpr,  # rows a program
    ROWS: tl.constexpr,  # rows at a time
    COLUMNS: tl.constexpr,
):
    DTYPE: tl.constexpr = bias_sums_ptr.dtype.element_ty
    width = _multiple(width, ALIGNMENT)
    blocks = tl.cdiv(width, COLUMNS)
    run = (tl.program_id(0) // blocks).to(tl.int64)
    group = run // runs
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    within = column < width
    bias = tl.zeros([1, COLUMNS], DTYPE)
    if BIASED:
        bias = tl.load(bias_ptr + column, mask=within, other=0).to(DTYPE)
    gate = tl.full([1, COLUMNS], 1, DTYPE)
    if GATED:
        gate = tl.load(gate_ptr + group * gate_stride + column, mask=within, other=0).to(DTYPE)
    bias_sum = tl.zeros([ROWS, COLUMNS], DTYPE)
    gate_sum = tl.zeros([ROWS, COLUMNS], DTYPE)
    first = run % runs * RUN
    last = tl.minimum(first + RUN, group_rows)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < last) & within
        at = (group * group_rows + row) * width + column
        z = tl.load(h_ptr + at, mask=inside, other=0).to(DTYPE) + bias
        value, slope = _activate(z, ACTIVATION)
        if GRADIENT:
            grad_output = tl.load(grad_output_ptr + at, mask=inside, other=0).to(DTYPE)
            grad = grad_output * gate * slope
            tl.store(out_ptr + at, _cast(grad, out_ptr), mask=inside)
            if WANT_BIAS:
                bias_sum += tl.where(inside, grad, 0)
            if WANT_GATE:
                gate_sum += tl.where(inside, grad_output * value, 0)
        else:
            tl.store(out_ptr + at, _cast(value * gate, out_ptr), mask=inside)
    if WANT_BIAS:
        tl.store(bias_sums_ptr + run * width + column, tl.sum(bias_sum, 0, keep_dims=True), mask=within)
    if WANT_GATE:
        tl.store(gate_sums_ptr + run * width + column, tl.sum(gate_sum, 0, keep_dims=True), mask=within)


def _launch(
    h: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    activation: str,
    grad_output: Tensor | None = None,
    want_bias: bool = False,
    want_gate: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The value, or the gradient of h and the sums over runs of those of bias and gate, ``[groups, runs, width]``."""
    h = h.contiguous()
    width = h.shape[-1]
    groups = gate.shape[0] if gate is not None and gate.dim() == 2 else 1
    group_rows = h.numel() // max(width * groups, 1)
    sums = want_bias or want_gate
    columns = min(1 << (max(width, 1) - 1).bit_length(), SUM_COLUMNS if sums else MAX_COLUMNS)
    rows = min(1 << (max(group_rows, 1) - 1).bit_length(), RUN, TILE_SIZE // columns)
    run = RUN if sums else rows
    runs = -(-group_rows // run)
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    out = torch.empty_like(h)
    bias_sums, gate_sums = (
        h.new_empty((groups, runs, width) if wanted else 0, dtype=dtype) for wanted in (want_bias, want_gate)
    )
    if h.numel() > 0:
        bias = None if bias is None else bias.contiguous()
        gate = None if gate is None else gate.contiguous()
        with torch.cuda.device_of(h):
            _bias_act_gate_kernel[(groups * runs * -(-width // columns),)](
                h, h if bias is None else bias, h if gate is None else gate, h if grad_output is None else grad_output,
                out, bias_sums, gate_sums, width, group_rows, runs, width,
                bias is not None, gate is not None, grad_output is not None, want_bias, want_gate,
                activation, math.gcd(width, 16), run, rows, columns,
            )  # fmt: skip
    return out, bias_sums, gate_sums


def bias_act_gate(h: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str) -> Tensor:
    """The op of the same name, in one launch."""
    return _launch(h, bias, gate, activation)[0]


def bias_act_gate_backward(
    grad_output: Tensor,
    h: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    activation: str,
    want_bias: bool,
    want_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op of the same name, in one launch, and a sum each for bias and gate where there is more than one run."""
    grad, bias_sums, gate_sums = _launch(h, bias, gate, activation, grad_output.contiguous(), want_bias, want_gate)
    grad_bias = grad_gate = h.new_empty(0)
    if bias is not None and want_bias:
        grad_bias = bias_sums.sum((0, 1)).to(bias.dtype)
    if gate is not None and want_gate:
        grad_gate = (gate_sums[:, 0] if gate_sums.shape[1] == 1 else gate_sums.sum(1)).to(gate.dtype).view(gate.shape)
    return grad, grad_bias, grad_gate
