"""What kernels of several ops share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _multiple(x, DIVISOR: tl.constexpr):
    """x, which DIVISOR divides, in a form that lets the compiler see it (tl.multiple_of does not reach arguments)."""
    return x // DIVISOR * DIVISOR


@triton.jit
def _cast(x, pointer):
    """x in the dtype that pointer points to; float64 to 16 bits by way of float32, which Triton needs for bfloat16."""
    DTYPE: tl.constexpr = pointer.dtype.scalar.element_ty
    if DTYPE.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(DTYPE)
