"""A loss's gradient times that of its own."""

from __future__ import annotations

from torch import Tensor


def scale_rows(grad: Tensor, grad_output: Tensor) -> Tensor:
    """``grad[..., c] * grad_output[...]``; ``grad_output`` has the leading shape of ``grad`` or is a scalar."""
    return (grad * grad_output.unsqueeze(-1)).to(grad.dtype).contiguous()


def scale_rows_(grad: Tensor, grad_output: Tensor) -> None:
    grad.mul_(grad_output.unsqueeze(-1))
