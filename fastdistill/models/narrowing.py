"""Heads and neurons taken out of a model's layers, layer by layer as many as are not wanted."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastdistill.models.architectures import Block, blocks
from fastdistill.models.widths import CONFIG_KEY, declare_widths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Model = TypeVar("Model", bound=PreTrainedModel)


def without(model: Model, heads: Sequence[Tensor], neurons: Sequence[Tensor]) -> Model:
    """A copy of the model with these heads and neurons of its layers, and with those that groups need beside."""
    smaller = copy.deepcopy(model)
    layers = blocks(smaller)
    before = getattr(model.config, CONFIG_KEY, None)
    original = [list(range(block.heads)) for block in layers] if before is None else before["heads"]
    numbers = []
    for block, open_heads, own_neurons, was in zip(layers, heads, neurons, original, strict=True):
        own_heads = made_up(open_heads, block)
        closed = own_heads[~torch.isin(own_heads, open_heads)]
        with torch.no_grad():
            block.head_out.weight.index_fill_(*channels(block.head_out, closed, block.heads, rows=False), 0)
        numbers.append([was[head] for head in own_heads.tolist()])
        narrow(block, own_heads, own_neurons, numbers[-1])
    declare_widths(smaller, numbers, [len(own) for own in neurons])
    return smaller.requires_grad_(True)


def made_up(heads: Tensor, block: Block) -> Tensor:
    """These heads, and those of the same groups without which the groups would differ in size."""
    if not len(heads) or block.heads == block.groups:
        return heads
    stays = torch.zeros(block.heads, dtype=torch.bool, device="cpu").index_fill(0, heads, True)
    groups = stays.view(block.groups, -1)
    number = groups.sum(1)
    first = groups.int().argsort(dim=1, descending=True, stable=True)[:, : int(number.max())]  # those that stay, then
    filled = torch.zeros_like(groups).scatter(1, first, True) & (number > 0).unsqueeze(1)
    return filled.flatten().nonzero().squeeze(1)


def narrow(block: Block, heads: Tensor, neurons: Tensor, numbers: Sequence[int]) -> None:
    """Keep these heads and neurons of a layer; `numbers` are those that the heads had when nothing was pruned.

    What is left of a linear map without rows, or columns, is there, so that it takes its place among the weights: a
    model that does not know of it finds a weight of another size, and none that is missing."""
    names = block.names
    if len(heads) < block.heads:
        groups, per_group = block.groups, block.heads // max(block.groups, 1)
        own_groups = (heads // per_group).unique()
        for module, is_shared in list(block.head_rows()):
            if is_shared:
                _select(module, own_groups, groups, rows=True)
            else:
                _select(module, heads, block.heads, names.head_parts, rows=True)
        _select(block.head_out, heads, block.heads, rows=False)
        if len(heads):
            _set_heads(block, numbers, per_group=len(heads) // len(own_groups))
        else:
            _mend(block, names.head_out)
            within = names.head_out.removeprefix(names.attention + ".")
            output = within if within != names.head_out else ""
            block.replace(names.attention, _NoHeads(block.attention, block.head_size, output, names.norm))
    if len(neurons) < block.neurons:
        for module in block.neuron_in:
            _select(module, neurons, block.neurons, names.neuron_parts, rows=True)
        _select(block.neuron_out, neurons, block.neurons, rows=False)
        _mend(block, names.neuron_out)


def channels(linear: Any, kept: Tensor, units: int, parts: int = 1, *, rows: bool) -> tuple[int, Tensor]:
    """The dimension of the weight's rows, or columns, and those that are the kept units'."""
    dim = 0 if rows != isinstance(linear, Conv1D) else 1
    size = linear.weight.shape[dim]
    places = torch.arange(size, device="cpu").view(parts, units, size // max(parts * units, 1))
    return dim, places[:, kept.cpu()].flatten().to(linear.weight.device)


def _select(linear: Any, kept: Tensor, units: int, parts: int = 1, *, rows: bool) -> None:
    dim, places = channels(linear, kept, units, parts, rows=rows)
    linear.weight = nn.Parameter(linear.weight.detach().index_select(dim, places))
    if rows and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach().index_select(0, places))
    if isinstance(linear, Conv1D):
        linear.nx, linear.nf = linear.weight.shape
    else:
        linear.out_features, linear.in_features = linear.weight.shape


def _mend(block: Block, name: str) -> None:
    """`Conv1D` computes nothing of no columns."""
    linear = block.layer.get_submodule(name)
    if isinstance(linear, Conv1D) and not linear.nx:
        block.replace(name, _NoColumns(linear))


def heads_known(attention: nn.Module, heads: int, per_group: int, size: int) -> dict[str, int]:
    """What an attention module knows of its heads beside the width of its projections, as it is of so many."""
    known = {
        "num_attention_heads": heads,
        "num_heads": heads,
        "n_heads": heads,
        "num_key_value_groups": per_group,
        "num_key_value_heads": heads // per_group,
        "all_head_size": heads * size,
        "split_size": heads * size,
    }
    return {name: value for name, value in known.items() if hasattr(attention, name)}


def _set_heads(block: Block, numbers: Sequence[int], per_group: int) -> None:
    attention: Any = block.attention
    for name, value in heads_known(attention, len(numbers), per_group, block.head_size).items():
        setattr(attention, name, value)
    if type(attention).__name__ == "MPNetSelfAttention":  # is given a bias for all the heads that there were
        if not hasattr(attention, "kept_heads"):
            attention.register_forward_pre_hook(_own_position_bias)
        attention.kept_heads = list(numbers)


def _own_position_bias(attention: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden, mask, bias, *rest = inputs
    return hidden, mask, None if bias is None else bias[:, attention.kept_heads], *rest


class _NoColumns(Conv1D):
    def __init__(self, linear: Any) -> None:
        nn.Module.__init__(self)
        self.nx, self.nf, self.weight, self.bias = linear.nx, linear.nf, linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def _retire(module: nn.Module) -> None:
    """Make its weights buffers: they are saved, but nothing uses them."""
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, weight.detach())


class _NoHeads(nn.Module):
    """Attention without heads: of its weights, those that are left, with what it does after its output projection."""

    def __init__(self, attention: nn.Module, head_size: int, output: str, norm: str) -> None:
        super().__init__()
        for name, child in attention.named_children():
            self.add_module(name, child)
            if name != output.partition(".")[0] and name != norm:
                _retire(child)
        self.head_dim, self.output, self.norm = head_size, output, norm
        self.layer_idx = getattr(attention, "layer_idx", None)
        self.config = getattr(attention, "config", None)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        for name in ("past_key_values", "layer_past"):
            if (cache := kwargs.get(name)) is not None:  # which counts the tokens
                none = hidden_states.new_zeros(*hidden_states.shape[:1], 1, hidden_states.shape[1], 1)
                getattr(cache, "self_attention_cache", cache).update(none, none, self.layer_idx)
        context = hidden_states[..., :0]
        if self.output:
            context = self.get_submodule(self.output)(context)
        return (self.get_submodule(self.norm)(hidden_states + context) if self.norm else context), None
