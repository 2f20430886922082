"""Architectures that users make known, and whether their names are a model's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastdistill.models.architectures import ARCHITECTURES, Architecture, Block, head_size_of, in_features, out_features

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def register_architecture(model_type: str, architecture: Architecture, *, model: PreTrainedModel | None = None) -> None:
    """Make an architecture known to `fastdistill.gate`, `score`, `prune`, `first_layers` and all that uses them.

    .. code-block:: python

        fastdistill.register_architecture("opt", fastdistill.Architecture(
            layers="decoder.layers",
            attention="self_attn",
            head_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            head_out="self_attn.out_proj",
            neuron_in=("fc1",),
            neuron_out="fc2",
        ))

    Args:
        model_type: as configs of transformers have it.
        architecture: where its models keep what is pruned.
        model: one of them, any, on which the names are checked: by default `transformers.AutoModel` makes one of the
            type's default config, without weights.

    Names are all that is checked here: that a model pruned by them is equal to one with gates at 0 is worth a test.
    Raises TypeError for arguments of other types, and ValueError for a type that is known with other names, that
    transformers does not know where no model is given, and for names, or shapes, that are not the model's.
    """
    if not isinstance(architecture, Architecture):
        raise TypeError(f"architecture is a {type(architecture).__name__}; expected a fastdistill.Architecture")
    if not isinstance(model_type, str) or not model_type:
        raise TypeError(f"model_type is {model_type!r}; expected a text, as configs of transformers have it")
    if ARCHITECTURES.get(model_type, architecture) != architecture:
        raise ValueError(f"model_type is {model_type!r}, which is known with other names; expected another")
    if model is not None and model.config.model_type != model_type:
        raise ValueError(f"model is a {model.config.model_type}; expected a {model_type}, which is model_type")
    check_architecture(architecture, _empty_model(model_type) if model is None else model)
    ARCHITECTURES[model_type] = architecture


def _empty_model(model_type: str) -> PreTrainedModel:
    from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoModel

    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_MAPPING:
        raise ValueError(f"model_type is {model_type!r}, of which AutoModel makes no model; expected one as model")
    with torch.device("meta"):
        return AutoModel.from_config(CONFIG_MAPPING[model_type]())  # type: ignore[no-any-return, no-untyped-call]


def check_architecture(names: Architecture, model: PreTrainedModel) -> None:
    """Raises ValueError, naming the field, for what the model does not have, or has in other shapes."""
    if len(names.head_in) not in (1, 3):
        raise ValueError(f"head_in is {names.head_in!r}; expected one name, or query, key and value")
    if len(names.neuron_in) not in (1, 2):
        raise ValueError(f"neuron_in is {names.neuron_in!r}; expected one name or two")
    linear = [("head_in", name) for name in names.head_in] + [("neuron_in", name) for name in names.neuron_in]
    linear += [("head_out", names.head_out), ("neuron_out", names.neuron_out)]
    stack = _module("layers", names.layers, model.base_model)
    if not isinstance(stack, nn.ModuleList) or not len(stack):
        raise ValueError(f"layers is {names.layers!r}, a {type(stack).__name__}; expected a ModuleList with layers")
    layers: Any = [layer for group in stack for layer in _module("inner", names.inner, group)] if names.inner else stack
    for layer in layers:
        attention = _module("attention", names.attention, layer)
        if names.norm:
            _module("norm", names.norm, attention)
        if names.alone:
            _module("alone", names.alone, layer)
        for field, name in linear:
            if not isinstance(module := _module(field, name, layer), nn.Linear | Conv1D):
                raise ValueError(f"{field} is {name!r}, a {type(module).__name__}; expected a Linear or Conv1D")
        _check_widths(Block(layer, names, head_size_of(attention, model.config)))


def _check_widths(block: Block) -> None:
    names, size = block.names, block.head_size
    rows, columns = [out_features(module) for module in block.head_in], in_features(block.head_out)
    fits = rows == [3 * columns] if len(rows) == 1 else rows[1] == rows[2] and rows[0] == columns
    if columns % size or not fits or any(row % size for row in rows) or (len(rows) == 3 and columns % rows[1]):
        raise ValueError(
            f"head_in is {names.head_in!r} with {', '.join(map(str, rows))} rows and head_out is {names.head_out!r} "
            f"with {columns} columns; expected those of heads of {size} channels"
        )
    if names.head_parts not in (1, 3) or (names.head_parts == 3 and len(rows) == 3):
        raise ValueError(f"head_parts is {names.head_parts}; expected 1, or 3 where head_in is one linear map")
    for name, module in zip(names.neuron_in, block.neuron_in, strict=True):
        if out_features(module) != names.neuron_parts * block.neurons:
            raise ValueError(
                f"neuron_in is {name!r} with {out_features(module)} rows and neuron_out is {names.neuron_out!r} with "
                f"{block.neurons} columns; expected {names.neuron_parts} (neuron_parts) times as many"
            )


def _module(field: str, name: str, parent: nn.Module) -> Any:
    if not name:
        raise ValueError(f"{field} is {name!r}; expected a module's name")
    try:
        return parent.get_submodule(name)
    except AttributeError:
        depth = name.count(".")
        there = ", ".join(sorted(part for part, _ in parent.named_modules() if part and part.count(".") == depth))
        raise ValueError(f"{field} is {name!r}, which {type(parent).__name__} does not have; it has {there}") from None
