"""Rows times their upstream gradient, in Triton."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from fastdistill.kernels.common import _cast, _multiple
from torch import Tensor

TILE_SIZE = 1024  # elements in a tile


@triton.jit(do_not_specialize=["rows", "classes", "grad_output_stride"])
def _scale_kernel(
    grad_ptr,  # [rows, classes], contiguous
    grad_output_ptr,  # [rows]
    out_ptr,  # out [rows, classes], contiguous; may be grad_ptr
    rows,
    classes,
    grad_output_stride,  # elements from a row's upstream gradient to the next; 0 if all rows share one
    DTYPE: tl.constexpr,  # what to multiply in
    IN_PLACE: tl.constexpr,  # out_ptr is grad_ptr: nothing to do where grad_output is 1
    ALIGNMENT: tl.constexpr,  # divides classes
    ROWS: tl.constexpr,  # rows a program
    COLUMNS: tl.constexpr,  # columns at a time
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    grad_output = tl.load(grad_output_ptr + row * grad_output_stride, mask=row < rows, other=1).to(DTYPE)
    others = tl.sum((grad_output != 1).to(tl.int32))
    if IN_PLACE and others == 0:
        return
    classes = _multiple(classes, ALIGNMENT)
    for start in range(0, classes, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = (row < rows) & (column < classes)
        grad = tl.load(grad_ptr + row * classes + column, mask=inside).to(DTYPE)
        tl.store(out_ptr + row * classes + column, _cast(grad * grad_output, out_ptr), mask=inside)


def _scale(grad: Tensor, grad_output: Tensor, out: Tensor) -> None:
    if grad.numel() == 0:
        return
    classes = grad.shape[-1]
    rows = grad.numel() // classes
    shared = grad_output.dim() == 0 or not any(grad_output.stride())
    if not shared:
        grad_output = grad_output.reshape(-1)
    columns = min(1 << (classes - 1).bit_length(), TILE_SIZE)
    tile_rows = TILE_SIZE // columns
    with torch.cuda.device_of(grad):
        _scale_kernel[(-(-rows // tile_rows),)](
            grad, grad_output, out, rows, classes, 0 if shared else grad_output.stride(0),
            tl.float64 if torch.float64 in (grad.dtype, grad_output.dtype) else tl.float32,
            out is grad, math.gcd(classes, 16), tile_rows, columns,
        )  # fmt: skip


def scale_rows(grad: Tensor, grad_output: Tensor) -> Tensor:
    """``grad[..., c] * grad_output[...]`` in grad's dtype; ``grad_output`` has grad's leading shape or is a scalar."""
    grad = grad.contiguous()
    out = torch.empty_like(grad)
    _scale(grad, grad_output, out)
    return out


def scale_rows_(grad: Tensor, grad_output: Tensor) -> None:
    """The same in place. Where all of a program's upstream gradients are 1 it ends without touching ``grad``."""
    if grad.is_contiguous():
        _scale(grad, grad_output, grad)
    else:
        grad.mul_(grad_output.unsqueeze(-1))
