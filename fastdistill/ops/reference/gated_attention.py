"""Attention whose heads are gated."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.ops.reference.dtypes import accumulation_dtype


def _for_each_head(grouped: Tensor, heads: int) -> Tensor:
    """Key or value with a head for each of the query's; where there are as many, itself."""
    return grouped if grouped.shape[1] == heads else grouped.repeat_interleave(heads // grouped.shape[1], 1)


def _over_groups(grad: Tensor, groups: int) -> Tensor:
    """The gradient to key or value from that to each of the query's heads."""
    return grad if grad.shape[1] == groups else grad.unflatten(1, (groups, -1)).sum(2)


def _attention_weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    logsumexp: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The softmax of the scores, 0 in a row with nothing to attend to, and the scores' logsumexp (0 there)."""
    scores = scale * query @ key.mT
    if is_causal:
        attn_mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        allowed = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if allowed else scores + attn_mask
    if logsumexp is None:
        logsumexp = scores.logsumexp(-1)
        nothing = logsumexp == -torch.inf
        return scores.softmax(-1).masked_fill(nothing.unsqueeze(-1), 0), logsumexp.masked_fill(nothing, 0)
    return (scores - logsumexp.unsqueeze(-1)).exp(), logsumexp


def dropout_factors(seed: Tensor | None, weights: Tensor, dropout_p: float) -> Tensor | float:
    """What dropout multiplies each attention weight by: 0 or 1 / (1 - p), the same for the same seed."""
    if seed is None:
        return 1.0
    generator = torch.Generator(weights.device).manual_seed(int(seed))
    kept = torch.rand(weights.shape, generator=generator, device=weights.device) >= dropout_p
    return kept.to(weights.dtype) / (1 - dropout_p)


def _apart(heads: Tensor, like: Tensor) -> Tensor:
    """[B, H, S, D] in memory as [B, S, H, D]; not as a view of that, which could not be changed in place."""
    apart = torch.empty_permuted(heads.shape, (0, 2, 1, 3), dtype=like.dtype, device=like.device)
    return apart.copy_(heads)


def gated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_gate: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    gate_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the output without gates where ``gate_grad``, and the logsumexp (see ops/gated_attention.py)."""
    dtype = accumulation_dtype(query)
    q, k, v = (_for_each_head(x.to(dtype), query.shape[1]) for x in (query, key, value))
    weights, logsumexp = _attention_weights(q, k, attn_mask, is_causal, scale, None)
    attention = weights * dropout_factors(seed, weights, dropout_p) @ v
    output = attention
    if head_gate is not None:
        gate = head_gate.to(dtype)[..., None, None]
        output = attention * gate
        if not gate_grad:
            output = torch.where(gate == 0, 0, output)
            logsumexp = torch.where(gate.squeeze(-1) == 0, 0, logsumexp)
    ungated = _apart(attention, query) if gate_grad else query.new_empty(0)
    return _apart(output, query), ungated, logsumexp.contiguous()


def gated_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_gate: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    gate_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients to query, key, value and, where ``gate_grad``, the gate: ``output`` is then that without gates."""
    dtype = accumulation_dtype(query)
    grad_output, q, k, v = (_for_each_head(x.to(dtype), query.shape[1]) for x in (grad_output, query, key, value))
    weights, _ = _attention_weights(q, k, attn_mask, is_causal, scale, logsumexp)
    factors = dropout_factors(seed, weights, dropout_p)
    mean = (grad_output * output.to(dtype)).sum(-1, keepdim=True)  # under the weights, of their gradients
    grad_gate = query.new_empty(0)
    if head_gate is not None:
        gate = head_gate.to(dtype)[..., None, None]
        grad_output = grad_output * gate
        if gate_grad:
            by_example = mean.sum((-1, -2))
            grad_gate = (by_example if head_gate.dim() == 2 else by_example.sum(0)).to(head_gate.dtype)
            mean = mean * gate
    grad_value = (weights * factors).mT @ grad_output
    grad_scores = scale * weights * (grad_output @ v.mT * factors - mean)
    grad_query, grad_key = grad_scores @ k, grad_scores.mT @ q
    if head_gate is not None:
        grad_query, grad_key, grad_value = (torch.where(gate == 0, 0, x) for x in (grad_query, grad_key, grad_value))
    grad_key, grad_value = (_over_groups(x, key.shape[1]) for x in (grad_key, grad_value))
    return _apart(grad_query, query), _apart(grad_key, query), _apart(grad_value, query), grad_gate
