"""Attention of one query, the first token's, without keys and values of all tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.models.architectures import Block
from fastdistill.models.attention import HARMLESS, dropout_of, has_gate
from fastdistill.models.hooks import forward_changed, is_plain
from fastdistill.models.stacking import StackedLinear


@contextmanager
def first_token_attention(block: Block) -> Iterator[None]:
    r"""Within it that layer's attention gives the first token's context alone, ``[B, 1, H D]``.

    With one query a head's keys and values need not be computed: with the states :math:`x_t` that attention is given

    .. math::
        q \cdot (W_K x_t + b_K) = (W_K^\top q) \cdot x_t + q \cdot b_K, \qquad
        \sum_t p_t (W_V x_t + b_V) = W_V \sum_t p_t x_t + b_V \sum_t p_t

    which is two products with each weight an example in place of two a token: DeepSeek-V2 (2024, section 2.1.2) so
    absorbs its keys' and values' projections. Contexts and gradients are the same within rounding, in float32 or wider
    also under autocast; dropout is on the same probabilities, but draws other numbers.

    Where more is asked of attention than that, it is the layer's own: of a masked model's gated heads, "eager"
    attention, whose weights can be had, masks that are none of ``[B, H, S, S]``, relative positions, adapters or hooks
    on the projections, other keywords, and layers without heads.
    """
    with forward_changed(block.attention, partial(_forward, block)):
        yield


def _forward(
    block: Block,
    own: Callable[..., Any],
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    *others: Any,
    **keywords: Any,
) -> Any:
    attention, dropout = block.attention, dropout_of(block.attention)
    is_asked_more = any(other is not None for other in others) or any(
        value is not None and value is not False and name not in HARMLESS for name, value in keywords.items()
    )
    if is_asked_more or dropout is None or not _is_plain(block) or not _is_mask(attention_mask):
        return own(hidden_states, attention_mask, *others, **keywords)
    query, key, value = block.head_in
    queries = query(hidden_states[:, :1])
    scale = getattr(attention, "scaling", block.head_size**-0.5)
    with torch.autocast(hidden_states.device.type, enabled=False):
        states = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        context = _attend(states, queries.to(states.dtype), key, value, block, attention_mask, dropout, scale)
    context = context.to(queries.dtype)
    if block.names.head_out.startswith(block.names.attention + "."):
        context = block.head_out(context)
    return context, None


def _attend(
    states: Tensor,
    queries: Tensor,
    key: nn.Module,
    value: nn.Module,
    block: Block,
    mask: Tensor | None,
    dropout: float,
    scale: float,
) -> Tensor:
    """``[B, S, d], [B, 1, H D] -> [B, 1, H D]``."""
    (key_weight, key_bias), (value_weight, value_bias) = (
        _by_head(one, block.head_size, states) for one in (key, value)
    )
    stacked, heads, size, _ = key_weight.shape
    query = queries.view(stacked, -1, heads, size)
    of_states = torch.einsum("nbhe,nhed->nbhd", query, key_weight).flatten(0, 1)
    scores = of_states @ states.mT
    if (
        key_bias is not None
    ):  # it is the same for all keys, and so of no effect, but has a gradient of about 0, not none
        scores = scores + (query * key_bias).sum(-1).flatten(0, 1).unsqueeze(-1)
    scores = scores * scale
    if mask is None:
        probabilities = scores.softmax(-1)
    elif mask.dtype != torch.bool:
        probabilities = (scores + mask[:, :, 0]).softmax(-1)
    else:
        masked = ~mask[:, :, 0]
        probabilities = scores.masked_fill(masked, -torch.inf).softmax(-1).masked_fill(masked, 0)  # NaN where all are
    probabilities = nn.functional.dropout(probabilities, dropout)
    means = (probabilities @ states).unflatten(0, (stacked, -1))
    context = torch.einsum("nbhd,nhed->nbhe", means, value_weight)
    if value_bias is not None:
        context = context + probabilities.sum(-1).view(stacked, -1, heads, 1) * value_bias
    return context.reshape(len(states), 1, heads * size)


def _by_head(linear: Any, size: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight ``[N, H, D, d]`` and bias ``[N, 1, H, D]`` of N models, one unless they are stacked."""
    weight, bias = linear.weight.to(like.dtype), linear.bias
    weight = weight.view(-1, *weight.shape[-2:]).unflatten(1, (-1, size))
    return weight, None if bias is None else bias.to(like.dtype).view(len(weight), 1, -1, size)


def _is_plain(block: Block) -> bool:
    implementation = getattr(getattr(block.attention, "config", None), "_attn_implementation", "eager")
    maps = all(is_plain(linear, nn.Linear, StackedLinear) for linear in block.head_in)
    return maps and implementation != "eager" and block.heads > 0 and not has_gate(block.attention)


def _is_mask(mask: object) -> bool:
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)
