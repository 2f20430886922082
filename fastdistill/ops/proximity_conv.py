"""Proximity-weighted convolution over n-grams of tokens, and its maximum over the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill.ops import reference_proximity_conv as reference
from fastdistill.ops.checks import (
    FLOATING,
    INTEGER,
    STRIDED,
    autocast_dtype,
    check_same_device,
    check_tensor,
    is_floating,
)
from fastdistill.ops.library import define, define_autograd

MASKS = (torch.bool, *INTEGER)


def proximity_conv(
    states: Tensor,
    proximity: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    r"""Hidden states times each token's proximity, a convolution over n-grams, and each channel's maximum over tokens.

    .. math::
        r_{b,t} = p_{b,t}\,h_{b,t}, \qquad
        \mathrm{out}_{b,c} = \max_t \Big( \mathrm{bias}_c
            + \sum_{k=0}^{K-1} W_{c,\cdot,k} \cdot r_{b,\,t + k - \lfloor K/2 \rfloor} \Big)

    over the real tokens t, r being 0 where there is none: :func:`torch.nn.functional.conv1d` with a padding of K // 2
    and the maximum over its output, of which no more than a block is ever in memory. The proximity-weighted convolution
    network (PWCN; Zhang, Li and Song 2019) is this with K = 3, or K = 1 for Point-PWCN, over the states of a BiLSTM,
    with p a token's proximity to the aspect (for Att-PWCN times its attention). PWCN takes ReLU of the convolution, the
    maximum of which is ReLU of the maximum, gradients too: apply it to what this returns.

    **Padding.** A token that ``attention_mask`` leaves out counts as the zeros beyond either end do, whatever its state
    and proximity are, NaN too: it is never the maximum, adds nothing to its neighbours, and has gradients of 0. So
    padded sentences, on the right or on the left, have the values and gradients of unpadded ones.

    Args:
        states: ``[B, S, D]``; float32, float64, bfloat16 or float16.
        proximity: ``[B, S]``, any of those dtypes.
        weight, bias: ``[C, D, K]`` and ``[C]`` or None, as of :class:`torch.nn.Conv1d`, K odd; in states' dtype.
        attention_mask: ``[B, S]``, bool or integers, 0 where there is no token; None for none left out.

    Returns:
        ``[B, C]`` in states' dtype; under autocast in autocast's, to which states, weight and bias are then cast. In
        between it is float32 (float64 for float64). NaN where a token's value is; -inf for a sentence with no real
        tokens, of which ReLU makes 0, with gradients of 0.

    The gradient goes to the token of the maximum, the first of equals, as that of :func:`torch.max`, and to the K - 1
    around it; the backward computes those alone, a few of S. Sums are in a fixed order.

    Differentiable once, and not by torch.func; torch.vmap calls it once for each example of its batch. On CUDA float64
    is computed in plain PyTorch.

    Raises:
        TypeError: an argument of the wrong type or dtype; weight or bias in another dtype than states.
        ValueError: shapes that do not fit, an even K, no tokens or no width, or tensors on different devices.
    """
    if not (is_floating(states) and is_floating(weight) and (bias is None or is_floating(bias))):
        _explain(states, proximity, weight, bias, attention_mask)
    to = autocast_dtype(states.device)
    if to is not None:
        states, weight = (x if x.dtype == torch.float64 else x.to(to) for x in (states, weight))
        bias = bias if bias is None or bias.dtype == torch.float64 else bias.to(to)
    if not _fits(states, proximity, weight, bias, attention_mask):
        _explain(states, proximity, weight, bias, attention_mask)
    if attention_mask is not None:
        attention_mask = attention_mask.bool()
    output: Tensor = _op(states, proximity, weight, bias, attention_mask)[0]
    return output


def _fits(
    states: Tensor, proximity: Tensor, weight: Tensor, bias: Tensor | None, attention_mask: Tensor | None
) -> bool:
    tokens, filters, dtype, device = states.shape[:2], weight.shape, states.dtype, states.device
    return (
        states.dim() == 3
        and min(states.shape[1:]) > 0
        and is_floating(proximity)
        and proximity.shape == tokens
        and proximity.device == device
        and len(filters) == 3
        and filters[1] == states.shape[2]
        and filters[2] % 2 == 1
        and weight.dtype is dtype
        and weight.device == device
        and (bias is None or (bias.shape == filters[:1] and bias.dtype is dtype and bias.device == device))
        and (
            attention_mask is None
            or (
                isinstance(attention_mask, Tensor)
                and attention_mask.dtype in MASKS
                and attention_mask.layout is STRIDED
                and not attention_mask.is_nested
                and attention_mask.shape == tokens
                and attention_mask.device == device
            )
        )
    )


def _explain(
    states: Tensor, proximity: Tensor, weight: Tensor, bias: Tensor | None, attention_mask: Tensor | None
) -> None:
    check_tensor("states", states, FLOATING)
    if states.dim() != 3 or min(states.shape[1:]) == 0:
        raise ValueError(
            f"states has shape {tuple(states.shape)}; expected [batch, tokens, width], at least 1 token and 1 wide"
        )
    check_tensor("weight", weight, FLOATING)
    if weight.dim() != 3 or weight.shape[1] != states.shape[2] or weight.shape[2] % 2 == 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected [channels, {states.shape[2]}, an odd number of tokens], "
            f"{states.shape[2]} being the last dimension of states"
        )
    if bias is not None:
        check_tensor("bias", bias, FLOATING)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({len(weight)},) or None")
    check_tensor("proximity", proximity, FLOATING)
    if attention_mask is not None:
        check_tensor("attention_mask", attention_mask, MASKS)
    for name, x in (("proximity", proximity), ("attention_mask", attention_mask)):
        if x is not None and x.shape != states.shape[:2]:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; expected {tuple(states.shape[:2])}, batch and tokens of states"
            )
    others = {"proximity": proximity, "weight": weight, "bias": bias, "attention_mask": attention_mask}
    for name, x in others.items():
        if x is not None:
            if name in ("weight", "bias") and x.dtype != states.dtype:
                raise TypeError(f"{name} has dtype {x.dtype}; expected {states.dtype}, that of states")
            check_same_device(name, x, "states", states)


def _fake(
    states: Tensor, proximity: Tensor, weight: Tensor, bias: Tensor | None, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = states.shape[0], weight.shape[0]
    return states.new_empty(shape), states.new_empty(shape, dtype=torch.int64)


def _fake_backward(
    grad_output: Tensor,
    states: Tensor,
    proximity: Tensor,
    weight: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    shapes: tuple[Any, ...] = (states.shape, proximity.shape, weight.shape, weight.shape[:1])
    likes = (states, proximity, weight, weight)
    return tuple(
        like.new_empty(shape) if want else states.new_empty(0)
        for like, shape, want in zip(likes, shapes, wanted, strict=True)
    )


# `positions` are the tokens of the maxima, all that is kept of the convolution; -1 where there is no real token.
_op = define(
    "proximity_conv(Tensor states, Tensor proximity, Tensor weight, Tensor? bias, Tensor? attention_mask) "
    "-> (Tensor output, Tensor positions)",
    reference.proximity_conv,
    _fake,
    triton="proximity_conv",
)
_backward_op = define(
    "proximity_conv_backward(Tensor grad_output, Tensor states, Tensor proximity, Tensor weight, "
    "Tensor? attention_mask, Tensor positions, bool want_states, bool want_proximity, bool want_weight, "
    "bool want_bias) -> (Tensor grad_states, Tensor grad_proximity, Tensor grad_weight, Tensor grad_bias)",
    reference.proximity_conv_backward,
    _fake_backward,
    triton="proximity_conv",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    states, proximity, weight, _, attention_mask = inputs
    ctx.save_for_backward(states, proximity, weight, attention_mask, output[1])


def _backward(ctx: Any, grad_output: Tensor | None, unused: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("proximity_conv cannot be differentiated twice (create_graph=True)")
    if grad_output is None:
        return (None,) * 5
    wanted = ctx.needs_input_grad[:4]
    grads = _backward_op(grad_output, *ctx.saved_tensors, *wanted)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None


define_autograd("proximity_conv", _backward, _setup_context)
