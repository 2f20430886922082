"""`gated_attention` as an attention implementation of transformers: ``attn_implementation="fastdistill"``.

It is registered when `fastdistill.models`, or anything of it, is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, eager_mask, sdpa_mask

from fastdistill.ops import gate_rules
from fastdistill.ops.gated_attention import gated_attention

IMPLEMENTATION = "fastdistill"

_GATE = "_fastdistill_head_gate"
_GATED_OR_SDPA = "fastdistill_gated_or_sdpa"  # for the time of a call, in a config

HARMLESS = frozenset({
    "cache_position", "deterministic", "num_items_in_batch", "output_hidden_states", "output_router_logits",
    "position_ids", "return_dict", "token_type_ids", "use_cache",
})  # fmt: skip
"""What models hand down to their attention and plain attention does not look at either: the mask has all that it needs
to know of positions and types, and what is deterministic is for torch.use_deterministic_algorithms to say."""


@contextmanager
def head_gate(attention: nn.Module, gate: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Within it that attention module's heads have the gates that `gate` gives for the query of each call."""
    setattr(attention, _GATE, gate)
    try:
        yield
    finally:
        delattr(attention, _GATE)


def has_gate(attention: nn.Module) -> bool:
    """Whether it is within `head_gate`."""
    return _GATE in vars(attention)


def dropout_of(attention: nn.Module) -> float | None:
    """Of an attention module's probabilities; None where it is not known."""
    if not attention.training:
        return 0.0
    found = getattr(attention, "attention_dropout", getattr(attention, "dropout", None))
    found = getattr(found, "p", found)
    return found if isinstance(found, float | int) else None


def gates_heads(attention: nn.Module) -> bool:
    """Whether the attention module calls `attention_forward`, at present. MPNet's, which cannot, has no config."""
    return getattr(getattr(attention, "config", None), "_attn_implementation", None) == IMPLEMENTATION


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers calls: ``[B, H, S, D]`` in, ``[B, S, H, D]`` out; key and value may have
    fewer heads. As in PyTorch's attention there, a causal module without a mask has its first query at its first key
    (transformers makes a mask for all other queries in a cache), and a single query attends to every key.

    Raises ValueError for what it cannot do, and models ask for by keyword: giving the attention weights, soft-capping,
    sinks, biases, a sliding window that is not in a mask, and whatever else is not known to make no difference.
    """
    _check_keywords(kwargs, attention_mask, key.shape[2])
    if scaling is None:  # with which GPT-2 says these of itself in later versions of transformers
        for name, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
            if getattr(module, name, usual) != usual:
                _refuse(name, not usual, str(usual))
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1  # a mask says all
    own_gate = getattr(module, _GATE, None)
    gate = own_gate and own_gate(query)
    exported = torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()  # which does not know the op
    if exported or (gate is None and gate_rules.attention_by_pytorch(query, key.shape[2], dropout)):
        if key.shape[1] != query.shape[1]:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        context = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, is_causal, scale=scaling)
        if gate is not None:
            context = (context * gate[..., None, None]).to(context.dtype)
    else:
        context = gated_attention(query, key, value, gate, attention_mask, dropout, is_causal, scaling)
    return context.transpose(1, 2).contiguous(), None


def _gated_or_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """`attention_forward` where it is faster and can do what is asked for, otherwise PyTorch's attention."""
    own = {"dropout", "scaling", "is_causal"}
    refused = _unknown({k: v for k, v in options.items() if k not in own}, attention_mask, key.shape[2])
    if refused is None and gate_rules.heads_by_kernel(query):
        return attention_forward(module, query, key, value, attention_mask, **options)
    context: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]
    return context, None


@contextmanager
def gated_if_faster(attention: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it the module's attention, if it is PyTorch's, is `gated_attention` where that is faster."""
    config: Any = getattr(attention, "config", None)
    if device.type not in gate_rules.HEADS_BY_KERNEL or getattr(config, "_attn_implementation", None) != "sdpa":
        yield
        return
    config._attn_implementation = _GATED_OR_SDPA
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def _check_keywords(keywords: dict[str, Any], attention_mask: Tensor | None, keys: int) -> None:
    if (name := _unknown(keywords, attention_mask, keys)) is not None:
        _refuse(name, keywords[name], "None")


def _unknown(keywords: dict[str, Any], attention_mask: Tensor | None, keys: int) -> str | None:
    """The first that asks for what `gated_attention` does not do."""
    for name, value in keywords.items():
        if value is None or name in HARMLESS or (name == "output_attentions" and value is False):
            continue
        if name == "sliding_window" and (attention_mask is not None or value >= keys):
            continue
        return name
    return None


def _refuse(name: str, value: object, expected: str) -> None:
    shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise ValueError(
        f"{name} is {shown}, which {IMPLEMENTATION!r} attention cannot do; "
        f"expected {expected}, or a model with attn_implementation='eager'"
    )


def create_mask(mask_function: Callable[..., Any], **options: Any) -> Tensor | None:
    """As transformers makes one for PyTorch's attention, but of one row where all queries attend to the same keys; for
    models whose attention is their own in any case, as MPNet's and RoFormer's, one to be added to the scores."""
    if mask_function is bidirectional_mask_function:
        options["q_length"] = 1
    name = type(options.get("config")).__module__
    modeling = name.replace("configuration_", "modeling_")
    own = modeling != name and modeling in sys.modules and not hasattr(sys.modules[modeling], "ALL_ATTENTION_FUNCTIONS")
    return (eager_mask if own else sdpa_mask)(mask_function=mask_function, **options)


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionInterface.register(_GATED_OR_SDPA, _gated_or_sdpa)
AttentionMaskInterface.register(IMPLEMENTATION, create_mask)
