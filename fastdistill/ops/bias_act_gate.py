"""Bias, activation and gate of a feed-forward block's neurons: what lies between its two matrix products."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastdistill.ops import reference
from fastdistill.ops.library import define, define_autograd
from fastdistill.ops.native import NATIVE

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


def _unwanted(h: Tensor) -> Tensor:
    return h.new_empty(0)


# With CUDA C++ built, its kernels serve everything: Triton's launcher takes longer on the host than a small encoder's
# products on the GPU. Where no nvcc was there at install, Triton's do.
_TRITON = None if NATIVE.cuda else "gated_ffn"

bias_act_gate = define(
    "bias_act_gate(Tensor h, Tensor? bias, Tensor? gate, str activation) -> Tensor",
    reference.bias_act_gate,
    lambda h, bias, gate, activation: torch.empty_like(h, memory_format=torch.contiguous_format),
    triton=_TRITON,
)
bias_act_gate.__doc__ = r"""``gate * act(h + bias)`` for h ``[..., I]``, bias ``[I]`` and gate ``[I]`` or, with h
``[B, ..., I]``, ``[B, I]``; bias and gate may be None. Without checks: :func:`fastdistill.gated_ffn` makes them.

Computed in float64 for float64 h, else in float32, and rounded once, to h's dtype; bias and gate may have any floating
dtype. Differentiable once, by ``bias_act_gate_backward(grad_output, h, bias, gate, activation, want_bias, want_gate)``,
which returns the gradients of h, bias and gate (empty unless wanted), each in the dtype of what it is of:

.. math::
    \partial h = \partial a \cdot g \cdot \mathrm{act}'(h + b), \qquad
    \partial b = \sum_{rows} \partial h, \qquad
    \partial g = \sum_{rows\ of\ the\ gate} \partial a \cdot \mathrm{act}(h + b)

The activation is computed anew from h, the only tensor of its size that is kept; sums are in a fixed order.
"""

_backward_op = define(
    "bias_act_gate_backward(Tensor grad_output, Tensor h, Tensor? bias, Tensor? gate, str activation, bool want_bias, "
    "bool want_gate) -> (Tensor grad_h, Tensor grad_bias, Tensor grad_gate)",
    reference.bias_act_gate_backward,
    lambda grad_output, h, bias, gate, activation, want_bias, want_gate: (
        torch.empty_like(h, memory_format=torch.contiguous_format),
        bias.new_empty(bias.shape) if want_bias else _unwanted(h),
        gate.new_empty(gate.shape) if want_gate else _unwanted(h),
    ),
    triton=_TRITON,
)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor | None, str], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
    if torch.is_grad_enabled():
        raise RuntimeError("bias_act_gate cannot be differentiated twice (create_graph=True)")
    _, want_bias, want_gate, _ = ctx.needs_input_grad
    grad_h, grad_bias, grad_gate = _backward_op(grad_output, *ctx.saved_tensors, ctx.activation, want_bias, want_gate)
    return grad_h, grad_bias if want_bias else None, grad_gate if want_gate else None, None


define_autograd("bias_act_gate", _backward, _setup_context)
