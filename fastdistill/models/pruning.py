"""Really smaller models: heads and neurons taken out, layer by layer as many as are not wanted."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from fastdistill.models.architectures import Block, blocks
from fastdistill.models.hooks import refuse_hooked
from fastdistill.models.scores import Scores
from fastdistill.models.sharing import refuse_shared

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Model = TypeVar("Model", bound=PreTrainedModel)

CONFIG_KEY = "fastdistill_pruned"
"""In a pruned model's config: for each layer the indices of the heads that are left, of those that the dense model
had, and the number of neurons."""


def prune(model: Model, scores: Scores, sparsity: float, *, round_to: int = 1) -> Model:
    r"""A new model without the heads and neurons of the lowest scores: smaller, and equal to masking them.

    All heads of all layers are ranked together, and so are all neurons; of both the lowest
    :math:`\mathrm{round}(s \cdot \mathrm{total})` are removed (STARK, Yang et al. 2022, section 3.2); ties go
    to the first. Layers are then of different widths, and may be left without heads or neurons; such a layer
    keeps its output bias, as a mask would. Embeddings, pooler and the head stay as they are. The logits are those of
    the model with the same gates at 0, within rounding.

    Args:
        model: a BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, MPNet, DistilBERT or ViT, with any head; also one that
            was pruned before.
        scores: as `fastdistill.score` finds them.
        sparsity: s, from 0 to 1: the share of the heads, and of the neurons, that are removed.
        round_to: the number of neurons that a layer keeps is rounded to the nearest multiple of it.

    The new model is saved by its own ``save_pretrained`` and loaded by `fastdistill.from_pretrained`. All its weights
    train. Raises TypeError for what are no scores, and ValueError for an unknown architecture, for a model with shared
    layers, for scores of another model, that are NaN, or arguments out of their range.
    """
    if not isinstance(scores, Scores):
        raise TypeError(f"scores is a {type(scores).__name__}; expected Scores, as fastdistill.score finds them")
    refuse_shared(model)
    refuse_hooked(model)
    smaller = copy.deepcopy(model)
    layers = blocks(smaller)
    found = [(len(heads), len(neurons)) for heads, neurons in zip(scores.heads, scores.neurons, strict=True)]
    if found != (wanted := [(block.heads, block.neurons) for block in layers]):
        raise ValueError(f"scores has (heads, neurons) {found} by layer; expected the model's, {wanted}")
    heads, neurons = scores.kept(sparsity, round_to)
    before = getattr(model.config, CONFIG_KEY, None)
    original = [list(range(block.heads)) for block in layers] if before is None else before["heads"]
    numbers = [[was[i] for i in now.tolist()] for was, now in zip(original, heads, strict=True)]
    for layer in zip(layers, heads, neurons, numbers, strict=True):
        narrow(*layer)
    setattr(smaller.config, CONFIG_KEY, {"heads": numbers, "neurons": [len(now) for now in neurons]})
    return smaller.requires_grad_(True)


def narrow(block: Block, heads: Tensor, neurons: Tensor, numbers: Sequence[int]) -> None:
    """Keep these heads and neurons of a layer; `numbers` are those that the heads had when nothing was pruned."""
    names = block.names
    if len(heads) < block.heads:
        channels = (heads.unsqueeze(1) * block.head_size + torch.arange(block.head_size, device="cpu")).flatten()
        for name in names.head_in if len(heads) else ():
            _select(block.layer.get_submodule(name), channels, rows=True)
        if len(heads):
            _select(block.head_out, channels, rows=False)
            _set_heads(block.attention, numbers, block.head_size)
        else:
            block.replace(names.head_out, _Bias(block.head_out.bias))
            within = names.head_out.startswith(names.attention + ".")
            block.replace(names.attention, _NoHeads(names.head_out, block.head_out) if within else _NoHeads())
    if len(neurons) < block.neurons:
        if len(neurons):
            _select(block.layer.get_submodule(names.neuron_in), neurons, rows=True)
            _select(block.neuron_out, neurons, rows=False)
        else:
            block.replace(names.neuron_in, _Nothing())
            block.replace(names.neuron_out, _Bias(block.neuron_out.bias))


def _select(linear: Any, channels: Tensor, *, rows: bool) -> None:
    channels = channels.to(linear.weight.device)
    linear.weight = nn.Parameter(linear.weight.detach().index_select(0 if rows else 1, channels))
    if rows and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach().index_select(0, channels))
    linear.out_features, linear.in_features = linear.weight.shape


def _set_heads(attention: Any, numbers: Sequence[int], head_size: int) -> None:
    """What attention modules know of their heads beside the width of their projections."""
    for name, value in (
        ("num_attention_heads", len(numbers)),
        ("n_heads", len(numbers)),
        ("all_head_size", len(numbers) * head_size),
    ):
        if hasattr(attention, name):
            setattr(attention, name, value)
    if type(attention).__name__ == "MPNetSelfAttention":  # is given a bias for all the heads that there were
        if not hasattr(attention, "kept_heads"):
            attention.register_forward_pre_hook(_own_position_bias)
        attention.kept_heads = list(numbers)


def _own_position_bias(attention: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden, mask, bias, *rest = inputs
    return hidden, mask, None if bias is None else bias[:, attention.kept_heads], *rest


class _Bias(nn.Module):
    """The bias that is left of a linear map of nothing."""

    in_features = 0

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, inputs: Tensor) -> Tensor:
        return self.bias.expand(*inputs.shape[:-1], -1)


class _Nothing(nn.Module):
    """A linear map to no neurons."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs[..., :0]


class _NoHeads(nn.Module):
    """Attention without heads. Where its output projection is within it, what that leaves has the same place."""

    def __init__(self, name: str = "", projection: nn.Module | None = None) -> None:
        super().__init__()
        self._projection = name.rpartition(".")[2]
        if projection is not None:
            self.add_module(self._projection, projection)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return (getattr(self, self._projection)(hidden_states) if self._projection else hidden_states[..., :0]), None
