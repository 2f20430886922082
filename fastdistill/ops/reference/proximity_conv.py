"""Proximity-weighted convolution over n-grams, and its maximum over tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.ops.reference.dtypes import accumulation_dtype


def _real(states: Tensor, proximity: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """States and proximity, [B, S, 1], in the dtype computed in; 0 where there is no token."""
    dtype = accumulation_dtype(states)
    states, proximity = states.to(dtype), proximity.to(dtype).unsqueeze(-1)
    if attention_mask is None:
        return states, proximity
    token = attention_mask.unsqueeze(-1)
    return torch.where(token, states, 0), torch.where(token, proximity, 0)


def _windows(weighted: Tensor, taps: int) -> Tensor:
    """Of [B, S, D] the K rows around each: [B, S, D * K]."""
    return F.pad(weighted, (0, 0, taps // 2, taps // 2)).unfold(1, taps, 1).flatten(2)


def proximity_conv(
    states: Tensor, proximity: Tensor, weight: Tensor, bias: Tensor | None, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Each channel's maximum and the token that it is of, -1 for -inf (see ops/proximity_conv.py)."""
    real, factor = _real(states, proximity, attention_mask)
    windows = _windows(real * factor, weight.shape[-1])
    values = windows @ weight.to(windows.dtype).flatten(1).T
    if attention_mask is not None:
        values = values.masked_fill(~attention_mask.unsqueeze(-1), -torch.inf)
    largest, positions = values.max(1)
    positions = positions.masked_fill(largest == -torch.inf, -1)
    if bias is not None:
        largest = largest + bias.to(largest.dtype)
    return largest.to(states.dtype), positions


def proximity_conv_backward(
    grad_output: Tensor,
    states: Tensor,
    proximity: Tensor,
    weight: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor,
    want_states: bool,
    want_proximity: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of states, proximity, weight and bias, those that are wanted."""
    taps, length, dtype = weight.shape[-1], states.shape[1], states.dtype
    real, factor = _real(states, proximity, attention_mask)
    grad = grad_output.to(real.dtype).masked_fill(positions < 0, 0)
    at_maximum = real.new_zeros(len(real), length, len(weight))
    at_maximum = at_maximum.scatter(1, positions.clamp(min=0).unsqueeze(1), grad.unsqueeze(1))
    grads = [states.new_empty(0) for _ in range(4)]  # outputs of an op may not alias
    if want_weight:
        windows = _windows(real * factor, taps)
        grads[2] = (at_maximum.flatten(0, 1).T @ windows.flatten(0, 1)).view(weight.shape).to(dtype)
    if want_bias:
        grads[3] = grad.sum(0).to(dtype)
    if want_states or want_proximity:
        of_windows = (at_maximum @ weight.to(real.dtype).flatten(1)).view(*real.shape, taps)
        of_windows = F.pad(of_windows, (0, 0, 0, 0, taps // 2, taps // 2))
        shifted = [of_windows[:, taps - 1 - k : taps - 1 - k + length, :, k] for k in range(taps)]
        weighted = torch.stack(shifted).sum(0)
        if want_states:
            grads[0] = (weighted * factor).to(dtype)
        if want_proximity:
            grads[1] = (weighted * real).sum(-1).to(proximity.dtype)
    return grads[0], grads[1], grads[2], grads[3]
