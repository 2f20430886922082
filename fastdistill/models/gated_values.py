"""Values times gates, and the gates' gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill.ops import reference
from fastdistill.ops.bias_act_gate import Activation, bias_act_gate

CACHED = 2**17
"""Products of so many values are summed at a time on CPU: half a megabyte, which stays in the second-level cache."""


def multiplied(values: Tensor, name: str, gate: Tensor, size: int) -> Tensor:
    """Of ``[B, ..., units * size]`` each unit's `size` values times its gate, in the values' dtype."""
    gate = check_gate(name, gate, values.shape[0], values.shape[-1] // size)
    if gate.dim() == 2:
        gate = gate.view(gate.shape[0], *[1] * (values.dim() - 2), -1)
    gated: Tensor = (values.unflatten(-1, (-1, size)) * gate.unsqueeze(-1)).flatten(-2)
    return gated.to(values.dtype)


def check_gate(name: str, gate: Tensor, batch_size: int, units: int) -> Tensor:
    if tuple(gate.shape) not in ((units,), (batch_size, units)):
        raise ValueError(f"{name} has shape {tuple(gate.shape)}; expected ({units},) or ({batch_size}, {units})")
    return gate


def activated(h: Tensor, gate: Tensor, activation: Activation) -> Tensor:
    """``gate * act(h)`` in one sweep, and its gradients in one; for h ``[B, ..., I]`` and a gate that fits it."""
    gated: Tensor = _Activated.apply(h, gate, activation)  # type: ignore[no-untyped-call]
    return gated


class _Activated(torch.autograd.Function):
    """`bias_act_gate`, which may be differentiated again: that is rare, and left to PyTorch."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, gate: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(h, gate)
        ctx.activation = activation
        gated: Tensor = bias_act_gate(h, None, gate, activation)
        return gated

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        h, gate = ctx.saved_tensors
        want_h, want_gate, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            wanted = [x for x, want in ((h, want_h), (gate, want_gate)) if want]
            gated = reference.bias_act_gate(h, None, gate, ctx.activation)
            found = iter(torch.autograd.grad(gated, wanted, grad, create_graph=True))
            return next(found) if want_h else None, next(found) if want_gate else None, None
        op = torch.ops.fastdistill.bias_act_gate_backward
        of_h, _, of_gate = op(grad, h, None, gate, ctx.activation, False, want_gate)
        return of_h, of_gate if want_gate else None, None


def noted(values: Tensor, gate: Tensor) -> Tensor:
    """Values times a gate of one for each unit of each example, ``[B, units]``, whose gradient it gets, in its dtype:
    the values ``[B, ..., units * size]`` themselves."""
    same: Tensor = _Noted.apply(values, gate)  # type: ignore[no-untyped-call]
    return same


class _Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(values, gate)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        values, gate = ctx.saved_tensors
        batch, units = gate.shape
        pairs = [x.reshape(batch, -1, units, x.shape[-1] // units) for x in (values, grad)]
        at_once = max(1, CACHED // max(1, values[:1].numel())) if values.is_cpu else batch
        parts = [
            (x.to(gate.dtype) * up.to(gate.dtype)).sum((1, 3))
            for x, up in zip(*(x.split(at_once) for x in pairs), strict=True)
        ]
        return grad, torch.cat(parts)
