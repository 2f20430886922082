"""An encoder's layers without padding: the tokens of a batch one after the other, as one sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.models.architectures import Block, blocks
from fastdistill.models.attention import dropout_of
from fastdistill.models.attention_scores import call
from fastdistill.models.first_token import first_token_only, looks_at_the_first_token
from fastdistill.models.hooks import forward_changed, has_hooks, hooks_of, inputs_changed, uncompiled
from fastdistill.ops.gate_rules import attention_by_pytorch
from fastdistill.ops.gated_attention import gated_attention
from fastdistill.ops.library import followed, has_kernel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKABLE = (
    "bert",
    "camembert",
    "data2vec-text",
    "distilbert",
    "electra",
    "ernie",
    "layoutlm",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "xlm-roberta",
    "xlm-roberta-xl",
)
"""Models of whose layers the attention alone sees more than one token, and of these nothing but the mask. (MPNet's
attention has relative positions, XMOD's layers see which language an example has.)"""

PADDING = 0.05
"""The least share of padding of a batch that is packed. MiniLM's forward passes of 2 and 6 layers, one thread, took
from equally long to 1.2 times as long with padding where it was 5 to 10 %, 1.2 to 1.4 times at 20 %, 1.5 at 40 %;
forward and backward of 2 layers from equally long to 1.06 at 6 %, 1.2 at 20 %, 1.8 at 65 %."""

_SAME = frozenset({"compact_vocabulary", "fast_linear", "first_token_only", "fused_residuals"})
"""What a model may be within: its logits are the same."""

STATES = "output_hidden_states"

_INPUTS = frozenset({
    "attention_mask", "bbox", "input_ids", "input_pronunciation_ids", "input_shape_ids", "inputs_embeds",
    "position_ids", "token_type_ids",
})  # fmt: skip


def packed_forward(
    model: Any, batch: Mapping[str, Any], mask: Tensor | None = None, *, first_states: bool = False
) -> Any:
    """``model(**batch)``, without its padding where that is known to give the same logits and to be faster.

    Args:
        model: a classifier whose head takes the first token, of an architecture in `PACKABLE`, also pruned. It may
            train: dropout then draws other numbers. Any other is called as it is; with gradients also one with "eager"
            attention, and one that trains with gradient checkpointing.
        batch: what its forward takes. If more is asked of it than logits and `first_states`, it is called as it is,
            for attention scores by `fastdistill.models.attention_scores.call`.
        mask: the batch's attention mask ``[B, S]`` on the CPU, by default that in the batch. One on a device is not
            looked at, which would wait for it, and the batch is not packed.
        first_states: of hidden states, where the batch asks for them, none but the first token's are looked at: they
            may be ``[B, 1, d]``.
    """
    mask = batch.get("attention_mask") if mask is None else mask
    others = {name: value for name, value in batch.items() if not (first_states and name == STATES)}
    if not worth_packing(mask) or not can_pack(model, others):
        return call(model, batch)
    assert mask is not None
    with packed(model, mask) as packing:
        outputs = model(**batch)
    if len(others) < len(batch) and outputs.hidden_states is not None:
        outputs.hidden_states = tuple(packing.first_of(layer) for layer in outputs.hidden_states)
    return outputs


def worth_packing(mask: object) -> bool:
    """Whether so much of a batch is padding that it takes less time without: with a share p of padding, all layers but
    the last have 1 - p of their matrix products, but attention is called for each length in the batch."""
    if not isinstance(mask, Tensor) or mask.device.type != "cpu" or mask.dim() != 2 or not mask.numel():
        return False
    lengths = (mask != 0).sum(1)
    # the first token must be there, as padding has no states here
    return bool(lengths.sum() <= (1 - PADDING) * mask.numel() and (mask[:, 0] != 0).all())


def can_pack(model: Any, batch: Mapping[str, Any]) -> bool:
    config, modules = getattr(model, "config", None), list(model.modules())
    return (
        getattr(config, "model_type", None) in PACKABLE
        and uncompiled(model) is model
        and not followed()
        and looks_at_the_first_token(model)
        and not any(m._compiled_call_impl or (m is not model and has_hooks(m)) for m in modules)
        and not any(m.training and getattr(m, "gradient_checkpointing", False) for m in modules)
        and all(dropout_of(block.attention) is not None for block in blocks(model))
        # gradients of gradients are had of "eager" attention alone
        and not (torch.is_grad_enabled() and getattr(config, "_attn_implementation", None) == "eager")
        and batch.keys() <= _INPUTS
        and hooks_of(model) <= _SAME
        and not getattr(config, "chunk_size_feed_forward", 0)
        and not getattr(config, "output_hidden_states", False)
        and not getattr(config, "output_attentions", False)
    )


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a batch are, examples in the order of their length.

    index: of each token among all places of the batch, ``[T]``.
    groups: how many examples there are of each length, and that length.
    starts: where each example's tokens begin, and where the last one's end, ``[B + 1]``, int32.
    first: where the first token of each example is, examples in the batch's order, ``[B]``.
    """

    index: Tensor
    groups: tuple[tuple[int, int], ...]
    starts: Tensor
    first: Tensor

    @classmethod
    def of(cls, mask: Tensor, device: torch.device) -> Packing:
        """Of a mask ``[B, S]`` on the CPU."""
        present = mask != 0
        lengths, order = present.sum(1).sort(stable=True)
        rows, places = present[order].nonzero(as_tuple=True)
        index = order[rows] * mask.shape[1] + places
        groups = tuple((len(list(same)), length) for length, same in groupby(lengths.tolist()))
        starts = F.pad(lengths.cumsum(0), (1, 0))
        first = starts[:-1][order.argsort()]
        index, starts, first = (x.to(device, non_blocking=True) for x in (index, starts.int(), first))
        return cls(index, groups, starts, first)

    def pack(self, states: Tensor) -> Tensor:
        """``[B, S, d] -> [1, T, d]``."""
        return states.flatten(0, 1).index_select(0, self.index).unsqueeze(0)

    def first_of(self, states: Tensor) -> Tensor:
        """The first token's, ``[B, 1, d]``, of states ``[1, T, d]``, or ``[B, any, d]``."""
        if states.shape[:2] == (1, len(self.index)):
            return states[0].index_select(0, self.first).unsqueeze(1)
        return states[:, :1]

    def unpack(self, packed: Tensor, shape: torch.Size) -> Tensor:
        """``[1, T, d] -> [B, S, d]``, with zeros for padding."""
        flat = packed.new_zeros(shape[0] * shape[1], packed.shape[-1])
        # which has one term for each place, and takes less than half of index_copy's time on a CPU
        return flat.index_add(0, self.index, packed[0]).view(*shape[:2], -1)


@contextmanager
def packed(model: PreTrainedModel, mask: Tensor) -> Iterator[Packing]:
    """Within it one batch, which has that mask, runs packed through all layers of the model but the last; of this there
    is the first token alone."""
    *inner, last = blocks(model)
    packing = Packing.of(mask, model.device)

    def pack(hidden_states: Tensor, *others: Any) -> tuple[Any, ...]:
        return packing.pack(hidden_states), *others

    def unpack(hidden_states: Tensor, *others: Any) -> tuple[Any, ...]:
        return packing.unpack(hidden_states, mask.shape), *others

    with ExitStack() as leave:
        if "first_token_only" not in hooks_of(model):
            leave.enter_context(first_token_only(model))
        if inner:
            leave.enter_context(inputs_changed(inner[0].layer, pack))
            leave.enter_context(inputs_changed(last.layer, unpack))
        for block in (block for block in inner if block.heads):
            leave.enter_context(forward_changed(block.attention, partial(_attention_forward, block, packing)))
        yield packing


def _attention_forward(
    block: Block, packing: Packing, forward: Any, hidden_states: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """Of a layer's attention module: the mask that it is given is that of the batch with padding."""
    scale = getattr(block.attention, "scaling", block.head_size**-0.5)
    query, key, value = (linear(hidden_states[0]).unflatten(-1, (-1, block.head_size)) for linear in block.head_in)
    dropout = dropout_of(block.attention) or 0.0
    context = packed_attention(query, key, value, packing, scale, dropout).flatten(1).unsqueeze(0)
    if block.names.head_out.startswith(block.names.attention + "."):
        context = block.head_out(context)
    return context, None


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float, dropout: float = 0.0
) -> Tensor:
    """``[T, H, D] -> [T, H, D]``: on CUDA flash's of varying lengths, where it takes the dtype; else for the examples
    of each length this package's on a CPU, or PyTorch's."""
    size = query.shape[-1]
    takes = query.dtype in (torch.float16, torch.bfloat16) and size % 8 == 0 and size <= 256 and scale == size**-0.5
    if query.is_cuda and takes and not dropout and query.shape[1] and (varlen := _varlen_attn()) is not None:
        starts, longest = packing.starts, packing.groups[-1][1]
        found: Tensor = varlen(query, key, value, starts, starts, longest, longest)
        return found
    sizes = [number * length for number, length in packing.groups]
    by_kernel = query.is_cpu and has_kernel("gated_attention", "CPU")
    contexts = []
    for (_, length), *of_group in zip(packing.groups, *(x.split(sizes) for x in (query, key, value)), strict=True):
        q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in of_group)
        if by_kernel and not attention_by_pytorch(q, length, dropout):
            context = gated_attention(q, k, v, dropout_p=dropout, scale=scale)
        else:
            context = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
        contexts.append(context.transpose(1, 2).flatten(0, 1))
    return torch.cat(contexts)


def _varlen_attn() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # from PyTorch 2.10 on
        return None
    return varlen_attn
