"""Attention whose heads are each multiplied by a gate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops import reference
from fastdistill.ops.checks import (
    FLOATING,
    LARGEST,
    NUMBERS,
    STRIDED,
    autocast_dtype,
    check_bool,
    check_number,
    check_same_device,
    check_tensor,
    is_floating,
)
from fastdistill.ops.library import define, define_autograd


def gated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_gate: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    r"""Scaled dot-product attention, each head's output multiplied by that head's gate.

    .. math::
        O_{b,h} = g_{b,h}\,\mathrm{softmax}\big(s\,Q_{b,h} K_{b,h}^\top + M_{b,h}\big)\,V_{b,h}

    as :func:`torch.nn.functional.scaled_dot_product_attention` computes it, by blocks and without ever holding the
    weights of a head (flash attention: Dao et al. 2022; Dao 2023, algorithms 1 and 2). Gates of heads are those of
    Michel et al. 2019; their gradient, by which heads are scored, costs no pass over query, key and value: with
    :math:`A` the output without gates, :math:`\partial L/\partial g_{b,h}` is the sum of
    :math:`\partial L/\partial O_{b,h} \cdot A_{b,h}` over tokens and channels.

    **Grouped heads** (Ainslie et al. 2023). Key and value may have G heads where query has H = n·G: query head h then
    attends to key-value head h // n, as with ``enable_gqa=True`` of PyTorch's attention. Gates stay those of query
    heads; the gradients to key and value are sums over the heads of a group.

    **A gate of 0.** Where ``head_gate`` needs no gradient, a head whose gate is 0 is not computed: its output is 0, and
    so are its gradients to query, key and value, whatever those hold, NaN too; so it is with a key-value head all of
    whose group is closed. Where it needs one, the head is computed, and the gate's gradient is exact at 0 as elsewhere;
    the gradients to query, key and value are still 0.

    Args:
        query, key, value: ``[B, H, S, D]``, ``[B, G, T, D]``, ``[B, G, T, D]``, G dividing H, in one dtype of float32,
            float64, bfloat16 or float16; with any strides, those of ``[B, S, H, D]`` transposed among them. Under
            autocast they are cast to its dtype. Sums are in float32 (float64 for float64).
        head_gate: ``[H]``, or ``[B, H]`` for a gate of each example; any floating dtype, any values. None: no gates.
        attn_mask: broadcastable to ``[B, H, S, T]``, not copied to that size; bool (True: attend) or floating, added to
            the scores. A query that may attend to nothing has output 0; one all of whose keys are given the dtype's
            least finite number attends to all of them alike, as in PyTorch. It gets no gradient.
        dropout_p: probability of leaving out a weight, in [0, 1); the others are divided by 1 - dropout_p. Always
            applied: pass 0 in evaluation. Which weights go is drawn by PyTorch's generator of the device.
        is_causal: query i attends to keys 0 to i only, also where S and T differ; not together with ``attn_mask``.
        scale: s; None for :math:`1/\sqrt{D}`.

    Returns:
        ``[B, H, S, D]`` in the query's dtype, laid out in memory as ``[B, S, H, D]``, so that
        ``.transpose(1, 2).flatten(2)`` copies nothing.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit (heads of key and value that do not divide the query's among them), different
            devices, a number out of its range, a mask beside ``is_causal`` or one that requires a gradient.

    Differentiable once, and not by torch.func; torch.vmap calls it once for each example of its batch. On CUDA, heads
    of up to 128 channels are computed by Triton; wider ones, and float64, in plain PyTorch, with the weights in memory,
    and so is dropout on CPU with gates, or of more than 256 keys (with AVX2 64, without either any). Where PyTorch's
    own attention would be cuDNN's (Hopper), in 16 bits, from 512 tokens (256 with more than 64 channels), with no mask,
    dropout or groups, and without gates or for their gradient, cuDNN makes the products. Its gradients' last digits
    differ from call to call, and where inputs hold NaN those under a gate of 0 do, too; by Triton neither is so, which
    ``torch.use_deterministic_algorithms(True)`` and ``torch.backends.cuda.enable_cudnn_sdp(False)`` ask for.
    """
    if not (is_floating(query) and is_floating(key) and is_floating(value)):
        _explain_tensors(query, key, value)
    device, shape = query.device, query.shape
    to = autocast_dtype(device)
    if to is not None:
        query, key, value = (x if x.dtype == torch.float64 else x.to(to) for x in (query, key, value))
    if not (
        len(shape) == 4
        and shape[3] > 0
        and key.dtype is query.dtype
        and value.dtype is query.dtype
        and key.device == device
        and value.device == device
        and key.shape == value.shape
        and len(key.shape) == 4
        and key.shape[::3] == shape[::3]
        and (key.shape[1] == shape[1] or _divides(key.shape[1], shape[1]))
    ):
        _explain_shapes(query, key, value)
    if head_gate is not None and not (
        is_floating(head_gate)
        and (head_gate.shape == shape[1:2] or head_gate.shape == shape[:2])
        and head_gate.device == device
    ):
        _explain_gate(head_gate, query)
    if attn_mask is not None:
        _check_mask(attn_mask, query, key, is_causal)
    if not (type(is_causal) is bool and type(dropout_p) in NUMBERS and 0 <= dropout_p < 1):
        check_bool("is_causal", is_causal)
        check_number("dropout_p", dropout_p, minimum=0, below=1)
    if scale is None:
        scale = 1 / math.sqrt(shape[3])
    elif not (type(scale) in NUMBERS and -LARGEST <= scale <= LARGEST):
        check_number("scale", scale)
    # A seed drawn here, not a mask drawn in the op, leaves the op a function: it can be compiled, and run again.
    seed = torch.randint(2**63 - 1, (), device=device) if dropout_p > 0 else None
    gate_grad = head_gate is not None and head_gate.requires_grad and torch.is_grad_enabled()
    output: Tensor = _op(query, key, value, head_gate, attn_mask, seed, dropout_p, is_causal, scale, gate_grad)[0]
    return output


def _divides(groups: int, heads: int) -> bool:
    return groups > 0 and heads % groups == 0


def _explain_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, x, FLOATING)


def _explain_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected 4 dimensions, [batch, heads, length, size]")
        check_same_device(name, x, "query", query)
    batch, heads, _, size = query.shape
    groups, keys = key.shape[1:3]
    if not (groups == heads or _divides(groups, heads)):
        raise ValueError(f"key has {groups} heads, query {heads}; expected {heads}, or for grouped heads its divisor")
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}, query {query.dtype}; expected the same")
        if x.shape != (batch, groups, keys, size):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, query {tuple(query.shape)}, key {tuple(key.shape)}; expected "
                f"{(batch, groups, keys, size)}"
            )
    if size == 0:
        raise ValueError(f"query has shape {tuple(query.shape)}; expected heads of at least 1 channel")


def _explain_gate(head_gate: Tensor, query: Tensor) -> None:
    batch, heads = query.shape[:2]
    check_tensor("head_gate", head_gate, FLOATING)
    if head_gate.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"head_gate has shape {tuple(head_gate.shape)}; expected {(heads,)} ([heads]) or {(batch, heads)} "
            "([batch, heads])"
        )
    check_same_device("head_gate", head_gate, "query", query)


def _check_mask(attn_mask: Tensor, query: Tensor, key: Tensor, is_causal: bool) -> None:
    scores = (*query.shape[:3], key.shape[2])
    if not (
        isinstance(attn_mask, Tensor)
        and (attn_mask.dtype is torch.bool or attn_mask.dtype in FLOATING)
        and attn_mask.layout is STRIDED
        and not attn_mask.is_nested
        and _broadcasts(attn_mask.shape, scores)
        and attn_mask.device == query.device
        and is_causal is False
    ):
        _explain_mask(attn_mask, query, scores, is_causal)


def _broadcasts(shape: tuple[int, ...], scores: tuple[int, ...]) -> bool:
    if len(shape) < 4:
        shape = (1,) * (4 - len(shape)) + shape
    return (
        len(shape) == 4
        and (shape[3] == scores[3] or shape[3] == 1)
        and (shape[2] == 1 or shape[2] == scores[2])
        and (shape[1] == 1 or shape[1] == scores[1])
        and (shape[0] == scores[0] or shape[0] == 1)
    )


def _explain_mask(attn_mask: Tensor, query: Tensor, scores: tuple[int, ...], is_causal: bool) -> None:
    check_tensor("attn_mask", attn_mask, (torch.bool, *FLOATING))
    if not _broadcasts(attn_mask.shape, scores):
        raise ValueError(
            f"attn_mask has shape {tuple(attn_mask.shape)}; expected one that broadcasts to {scores} "
            "([batch, heads, queries, keys])"
        )
    check_same_device("attn_mask", attn_mask, "query", query)
    check_bool("is_causal", is_causal)
    raise ValueError("is_causal is True and attn_mask is given; expected one of them (a mask may be causal itself)")


def _empty_heads(x: Tensor) -> Tensor:
    """Like x, laid out as [B, S, H, D]."""
    return torch.empty_permuted(x.shape, (0, 2, 1, 3), dtype=x.dtype, device=x.device)


def _fake(
    query: Tensor, key: Tensor, value: Tensor, head_gate: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    ungated = _empty_heads(query) if args[-1] else query.new_empty(0)
    return _empty_heads(query), ungated, query.new_empty(query.shape[:3], dtype=reference.accumulation_dtype(query))


def _fake_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, head_gate: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_gate = query.new_empty(0)
    if args[-1] and head_gate is not None:
        grad_gate = head_gate.new_empty(head_gate.shape)
    return _empty_heads(query), _empty_heads(key), _empty_heads(value), grad_gate


# `ungated` is the output without gates, where the gate needs a gradient: at a gate of 0 it cannot be had from the
# output. The backward takes it then in the place of the output. Otherwise the gated one is enough: of the output the
# backward needs the sums over channels of (grad_output * gate) * ungated, which are those of grad_output * output.
# `logsumexp` is [B, H, S], the log of each query's softmax denominator; 0 where there is nothing to attend to and, if
# no gradient to the gate is needed, in a head whose gate is 0. `seed` is dropout's.
_op = define(
    "gated_attention(Tensor query, Tensor key, Tensor value, Tensor? head_gate, Tensor? attn_mask, Tensor? seed, "
    "float dropout_p, bool is_causal, float scale, bool gate_grad) "
    "-> (Tensor output, Tensor ungated, Tensor logsumexp)",
    reference.gated_attention,
    _fake,
    triton="gated_attention",
)
_backward_op = define(
    "gated_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? head_gate, "
    "Tensor? attn_mask, Tensor? seed, Tensor output, Tensor logsumexp, float dropout_p, bool is_causal, float scale, "
    "bool gate_grad) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_gate)",
    reference.gated_attention_backward,
    _fake_backward,
    triton="gated_attention",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    if ctx.needs_input_grad[4]:
        raise ValueError("attn_mask requires a gradient, which is not computed; expected attn_mask.detach()")
    gate_grad = inputs[-1] or ctx.needs_input_grad[3]
    if gate_grad and not inputs[-1]:  # torch.vmap hid it from the caller
        output = _op(*inputs[:-1], True)
    attention, ungated, logsumexp = output
    ctx.options = (*inputs[6:-1], gate_grad)
    ctx.save_for_backward(*inputs[:6], ungated if gate_grad else attention, logsumexp)


def _backward(ctx: Any, grad_output: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("gated_attention cannot be differentiated twice (create_graph=True)")
    if grad_output is None:
        return (None,) * 10
    *grads, grad_gate = _backward_op(grad_output, *ctx.saved_tensors, *ctx.options)
    return *grads, grad_gate if ctx.options[-1] else None, *(None,) * 6


define_autograd("gated_attention", _backward, _setup_context)
