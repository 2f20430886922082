"""Whether the weights and the config of a folder go together, by what transformers tells, and are numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fastdistill.models.hooks import unwrapped

SHOWN = 3
"""Names that a message has of each kind."""


def check_fit(
    source: str | Path, model: PreTrainedModel, loading: Mapping[str, Any], *, may_lack_head: bool = False
) -> list[str]:
    """Raises ValueError where weights were drawn anew, or left out, because the config asks for others.

    `loading` is what ``from_pretrained`` gives with ``output_loading_info``. What a file has beside the encoder, such
    as another head or an unused pooler, does no harm. With `may_lack_head` it may lack these, too, or have a head of
    other sizes. Returns the names of the weights that were drawn anew.
    """
    is_of_encoder = _is_of_encoder(model)
    sizes = {
        name: f"{name}, {list(by_config)} by the config but {list(there)} in the file"
        for name, there, by_config in loading["mismatched_keys"]
    }
    faults = {
        "missing keys": [name for name in loading["missing_keys"] if not may_lack_head or is_of_encoder(name)],
        "unexpected keys": [name for name in loading["unexpected_keys"] if is_of_encoder(name)],
        "other sizes:": [told for name, told in sizes.items() if not may_lack_head or is_of_encoder(name)],
    }
    if told := "; ".join(f"{kind} {', '.join(sorted(names)[:SHOWN])}" for kind, names in faults.items() if names):
        raise ValueError(f"{source} has weights and a config that do not go together: {told}")
    return sorted([*loading["missing_keys"], *sizes])


def check_model(argument: str, model: object) -> None:
    """Raises TypeError for what is no model of transformers, and ValueError for one without values."""
    if not isinstance(unwrapped(model), PreTrainedModel):
        raise TypeError(f"{argument} is a {type(model).__name__}; expected a transformers.PreTrainedModel")
    check_has_values(argument, model)  # type: ignore[arg-type]


def check_has_values(argument: str, model: nn.Module) -> None:
    """Raises ValueError for a model on the meta device."""
    if any(weight.is_meta for weight in model.parameters()):
        raise ValueError(f"{argument} is on the meta device, where weights have no values; expected one that is loaded")


def check_finite(what: str | Path, model: nn.Module) -> None:
    """Raises ValueError for a model with weights that are NaN or infinite."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.is_floating_point()}
    if not weights:
        return
    flags = torch.stack([weight.detach().isfinite().all().cpu() for weight in weights.values()])
    if bad := [name for name, is_finite in zip(weights, flags.tolist(), strict=True) if not is_finite]:
        raise ValueError(f"{what} has NaN or infinity in {', '.join(bad[:SHOWN])}; expected numbers")


def _is_of_encoder(model: PreTrainedModel) -> Callable[[str], bool]:
    """Of weights' names, with or without the prefix that they have in a classifier."""
    prefix = f"{model.base_model_prefix}."
    modules = {name for name, _ in model.base_model.named_children()} - {"pooler"}
    buffers = {name.removeprefix(prefix) for name, _ in model.named_buffers()}  # which older files have
    return lambda name: (
        name.removeprefix(prefix).partition(".")[0] in modules and name.removeprefix(prefix) not in buffers
    )
