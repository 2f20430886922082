"""Dropout, a residual connection and layer normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.ops.reference.dtypes import accumulation_dtype, promoted_dtype
from fastdistill.ops.reference.gated_attention import dropout_factors


def _sum(x: Tensor, residual: Tensor, seed: Tensor | None, dropout_p: float, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return residual.to(dtype) + x * dropout_factors(seed, x, dropout_p)


def _parts(x: Tensor, weight: Tensor) -> Tensor:
    """``[N, R, D]``: the rows of each of N weights, of which ``[D]`` is one."""
    size = x.shape[-1]
    return x.reshape(weight.numel() // size, x.numel() // weight.numel(), size)


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and each row's mean and 1 / sqrt(variance + eps) (see ops/dropout_add_layer_norm.py)."""
    dtype = accumulation_dtype(x, residual, weight)
    h = _sum(x, residual, seed, dropout_p, dtype)
    mean = h.mean(-1)
    centred = h - mean.unsqueeze(-1)
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    y = _parts(centred * rstd.unsqueeze(-1), weight) * weight.to(dtype).view(-1, 1, x.shape[-1])
    if bias is not None:
        y = y + bias.to(dtype).view(-1, 1, x.shape[-1])
    return y.view(x.shape).to(promoted_dtype(x, residual, weight)).contiguous(), mean.contiguous(), rstd.contiguous()


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
    """The gradients to x (empty where it is that to residual), residual, weight and bias (empty unless wanted)."""
    dtype = mean.dtype
    h = _sum(x, residual, seed, dropout_p, dtype)
    normal = (h - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    upstream = grad_output.to(dtype)
    g = (_parts(upstream, weight) * weight.to(dtype).view(-1, 1, x.shape[-1])).view(x.shape)
    of_h = rstd.unsqueeze(-1) * (g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True))
    grad_x = x.new_empty(0)
    if seed is not None or x.dtype != residual.dtype:
        grad_x = (of_h * dropout_factors(seed, of_h, dropout_p)).to(x.dtype).contiguous()
    grad_weight, grad_bias = weight.new_empty(0), weight.new_empty(0)
    if want_weight:
        grad_weight, grad_bias = (
            _parts(each, weight).sum(1).view(weight.shape).to(weight.dtype) for each in (upstream * normal, upstream)
        )
    return grad_x, of_h.to(residual.dtype).contiguous(), grad_weight, grad_bias
