"""What of a batch a model is given: each what its own forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers.utils.generic import TransformersKwargs

from fastdistill.models.heads import LABELS
from fastdistill.models.hooks import unwrapped


def taken_by(model: nn.Module) -> frozenset[str] | None:
    """The inputs that a model's forward names and, if it takes others, those that transformers hands on to its layers;
    None where it takes any."""
    kind: Any = type(unwrapped(model))
    return _taken(kind)


@cache
def _taken(kind: Any) -> frozenset[str] | None:
    parameters = inspect.signature(kind.forward).parameters
    names = {name for name, one in parameters.items() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
    others = [one for one in parameters.values() if one.kind == one.VAR_KEYWORD]
    if others and not kind.forward.__module__.startswith("transformers."):  # it may hand them on to a model within
        return None
    return frozenset((names | TransformersKwargs.__annotations__.keys() if others else names) - {"self"})


def inputs_of(
    model: nn.Module, batch: Mapping[str, Any], *, others: Iterable[nn.Module] | None = None
) -> dict[str, Any]:
    """Of a batch what the model takes, without labels.

    With `others`, which get theirs, it is also given what none takes, so that it can refuse it. An encoder-decoder's
    decoder inputs are made of the labels, where there are none.
    """
    ours = taken_by(model)
    theirs = None if others is None else [taken_by(other) for other in others]

    def is_ours(name: str) -> bool:
        if ours is None or name in ours:
            return True
        return theirs is not None and all(names is not None and name not in names for names in theirs)

    inputs = {name: value for name, value in batch.items() if name not in LABELS and is_ours(name)}
    make = getattr(unwrapped(model), "prepare_decoder_input_ids_from_labels", None)
    labels, given = batch.get("labels"), {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys()
    if make and not given and isinstance(labels, Tensor) and labels.dim() == 2:
        inputs["decoder_input_ids"] = make(labels=labels)
    return inputs
