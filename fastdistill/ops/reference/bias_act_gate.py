"""What stands between the products of a feed-forward block."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistill.ops.reference.dtypes import accumulation_dtype


def _activation(z: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The activation and its derivative."""
    if kind == "relu":
        return z.relu(), torch.where(z <= 0, 0.0, 1.0).to(z.dtype)
    if kind == "gelu":  # z times the normal distribution function, whose derivative is the normal density
        share = torch.special.erfc(-z / math.sqrt(2)) / 2
        return z * share, share + z * (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    if kind not in ("gelu_tanh", "silu"):
        raise ValueError(f"activation is {kind!r}; expected gelu, gelu_tanh, relu or silu")
    slope = torch.ones_like(z)  # z times the logistic function of u, of which slope is the derivative
    u = z
    if kind == "gelu_tanh":
        u = math.sqrt(8 / math.pi) * z * (1 + 0.044715 * z.square())
        slope = math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * z.square())
    share = u.sigmoid()
    return z * share, share + z * slope * share * (-u).sigmoid()


def _neurons(h: Tensor, bias: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """The pre-activation, and the gate in a shape that multiplies it."""
    dtype = accumulation_dtype(h)
    z = h.to(dtype) if bias is None else h.to(dtype) + bias.to(dtype)
    if gate is None:
        return z, z.new_ones(())
    between = (1,) * (h.dim() - 2) if gate.dim() == 2 else ()
    return z, gate.to(dtype).view(*gate.shape[:-1], *between, gate.shape[-1])


def bias_act_gate(h: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str) -> Tensor:
    """``gate * act(h + bias)`` for h [..., I], bias [I], gate [I] or [B, I] (see ops/bias_act_gate.py)."""
    z, factor = _neurons(h, bias, gate)
    return (factor * _activation(z, activation)[0]).to(h.dtype).contiguous()


def bias_act_gate_backward(
    grad_output: Tensor,
    h: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    activation: str,
    want_bias: bool,
    want_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of h and, where asked for, of bias and gate."""
    z, factor = _neurons(h, bias, gate)
    value, slope = _activation(z, activation)
    grad_output = grad_output.to(z.dtype)
    grad = grad_output * factor * slope
    grad_bias, grad_gate = h.new_empty(0), h.new_empty(0)  # two, for outputs of an op may not alias
    if want_bias and bias is not None:
        grad_bias = grad[None].sum_to_size(bias.shape).to(bias.dtype)  # also of one row a new tensor
    if want_gate and gate is not None:
        grad_gate = (grad_output * value).sum_to_size(factor.shape).view(gate.shape).to(gate.dtype)
    return grad.to(h.dtype).contiguous(), grad_bias, grad_gate
