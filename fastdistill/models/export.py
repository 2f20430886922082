"""Models that fastdistill reshaped, as plain ones of transformers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fastdistill.models.architectures import Architecture, Block, architecture, blocks, layer_stack
from fastdistill.models.hooks import refuse_hooked
from fastdistill.models.sharing import CONFIG_KEY as SHARED_KEY
from fastdistill.models.widths import CONFIG_KEY, plain_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def export(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a model that was pruned, or has shared layers, as a plain one, which transformers' ``from_pretrained``, and
    all that reads its folders, load. Logits are equal within rounding.

    Args:
        model: pruned so that its layers are alike (``fastdistill.prune(..., uniform=True)``), with shared layers
            (`fastdistill.shuffled_sharing`), each of which is written out, or neither.
        folder: of the new model: config.json and safetensors, without a tokenizer.

    Where the config has no size of heads (BERT, GPT-2, ModernBERT), their number says it, and there cannot be fewer:
    heads that were removed come back, as zeros, and only neurons are fewer.

    Raises ValueError for an unknown architecture, for layers of different widths or without heads or neurons, and for
    widths that the config has no name for, or transformers refuses (Llama: a number of heads that does not divide the
    hidden size).
    """
    refuse_hooked(model)
    layers, names = blocks(model), architecture(model)
    config, weights = plain_config(model.config), dict(model.state_dict())
    places = {id(module): name for name, module in model.named_modules()}
    if getattr(config, SHARED_KEY, None) is not None:
        prefix = places[id(layer_stack(model))] + "."
        weights = {name: weight.clone() if name.startswith(prefix) else weight for name, weight in weights.items()}
        delattr(config, SHARED_KEY)
    if (pruned := getattr(config, CONFIG_KEY, None)) is not None:
        _set_widths(config, names, layers)
        for block, numbers in zip(layers, pruned["heads"], strict=True):
            if not names.head_size and len(numbers) < config.num_attention_heads:
                _widen(block, numbers, config.num_attention_heads, weights, places[id(block.layer)])
        delattr(config, CONFIG_KEY)
    plain = copy.copy(model)
    plain.config = config
    plain.save_pretrained(folder, state_dict=weights)


def _set_widths(config: Any, names: Architecture, layers: list[Block]) -> None:
    widths = {(block.heads, block.groups, block.neurons) for block in layers}
    heads, groups, neurons = next(iter(widths))
    if len(widths) > 1 or not heads or not neurons:
        found = ", ".join(f"{block.heads} and {block.neurons}" for block in layers)
        raise ValueError(
            f"model has layers of {found} heads and neurons; expected the same of all, as fastdistill.prune(..., "
            "uniform=True) makes them, and some"
        )
    if not names.width or (not names.head_size and groups != heads):
        raise ValueError(f"model is a {config.model_type}, whose config has no name for such widths")
    setattr(config, names.width, neurons)
    if names.head_size:
        setattr(config, names.head_size, layers[0].head_size)
        config.num_attention_heads = heads
        if hasattr(config, "num_key_value_heads"):
            config.num_key_value_heads = groups
    if hasattr(config, "validate"):
        try:
            config.validate()
        except Exception as error:
            raise ValueError(f"model has {heads} heads, which transformers refuses: {error}") from error


def _widen(block: Block, numbers: Sequence[int], heads: int, weights: dict[str, Tensor], prefix: str) -> None:
    """Give the layer as many heads as there were, of zeros."""
    rows = [(name, block.names.head_parts) for name in (*block.names.head_in, *block.names.relative)]
    for name, parts, is_row in [*((*row, True) for row in rows), (block.names.head_out, 1, False)]:
        for kind in ("weight", "bias") if is_row else ("weight",):
            value = weights.get(key := f"{prefix}.{name}.{kind}")
            if value is None:
                continue
            is_turned = kind == "weight" and isinstance(block.layer.get_submodule(name), Conv1D)
            dim = 0 if is_row != is_turned else 1
            value = value.unflatten(dim, (parts, len(numbers), -1))
            shape = [*value.shape[: dim + 1], heads, *value.shape[dim + 2 :]]
            places = torch.tensor(numbers, device=value.device)
            weights[key] = value.new_zeros(shape).index_copy(dim + 1, places, value).flatten(dim, dim + 2)
