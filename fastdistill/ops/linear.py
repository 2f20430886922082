"""`torch.nn.functional.linear` on a CPU, by oneDNN where that is faster."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastdistill.ops.checks import autocast_dtype
from fastdistill.ops.library import followed

ROWS = 64
"""Fewer tokens than that save less time than it takes to ask."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, by oneDNN where that is known to be faster: in float32, and in bfloat16, where
    PyTorch's is oneDNN's too, with a weight that is packed.

    Args:
        packed: what `pack_weight` made of the weight; it serves where there are no gradients.
    """
    with_gradients = torch.is_grad_enabled()
    if not _takes(x, weight, bias, torch.float32 if packed is None or with_gradients else packed.dtype):
        return F.linear(x, weight, bias)
    if with_gradients:
        # of two dimensions, since what a Function returns as a view cannot be changed in place
        found: Tensor = _Linear.apply(x.flatten(0, -2), weight, bias)  # type: ignore[no-untyped-call]
        return found.view(*x.shape[:-1], -1)
    return _product(x, weight if packed is None else packed, bias)


def pack_weight(weight: Tensor, rows: int) -> Tensor | None:
    """A weight in the order that oneDNN's products of about so many rows read it in; None where it is not asked."""
    if not (_asked(weight.dtype) and _is_known(weight, weight.dtype) and weight.dim() == 2 and weight.numel()):
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
    return packed


@cache
def by_onednn() -> bool:
    """Whether oneDNN is asked: on AMD's processors with AVX-512 (docs/cpu.md); Intel's are left to MKL, which is made
    for them."""
    by_amd = "AuthenticAMD" in _said("/proc/cpuinfo")
    return by_amd and _has_ops() and torch.backends.cpu.get_cpu_capability() == "AVX512"


@cache
def packs_bf16() -> bool:
    """Whether PyTorch's products in bfloat16 are oneDNN's."""
    known = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return _has_ops() and known is not None and bool(known())


def _has_ops() -> bool:
    names = "_linear_pointwise", "_reorder_linear_weight"
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def _asked(dtype: torch.dtype) -> bool:
    return by_onednn() if dtype == torch.float32 else dtype == torch.bfloat16 and packs_bf16()


def linear_runs_on() -> str:
    """For `fastdistill.doctor`, in one line."""
    by = "oneDNN's products" if by_onednn() else "PyTorch's own products"
    return f"linear layers of models in recipes, float32 on CPU: {by} (oneDNN's on AMD with AVX-512)"


def _said(file: str) -> str:
    try:
        return Path(file).read_text()
    except OSError:
        return ""


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    return (
        not followed()
        and _asked(dtype)
        and _is_known(x, dtype)
        and _is_known(weight, dtype)
        and x.numel() >= ROWS * x.shape[-1]
        and weight.dim() == 2
        and weight.numel() > 0
        # the bias is read as if it were contiguous
        and (bias is None or (_is_known(bias, dtype) and bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and autocast_dtype(x.device) in (None, dtype)
        and bool(torch.backends.mkldnn.enabled)
    )


def _is_known(x: Tensor, dtype: torch.dtype) -> bool:
    is_dense = type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided
    return is_dense and x.is_cpu and x.dtype == dtype


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        found = None
        if of_x:  # of several gradients at once each product is PyTorch's
            found = grad @ weight if followed() else _product(grad.contiguous(), weight.T, None)
        return (
            found,
            grad.T @ x if of_weight else None,  # BLAS's is as fast
            grad.sum(0) if of_bias else None,
        )
