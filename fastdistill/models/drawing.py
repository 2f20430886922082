"""What a pretrained model's files lack, such as the weights of a new head: each training draws it by its own seed."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from fastdistill.models.widths import plain_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DRAWN = "_drawn_anew"
"""A model's attribute, which copies have too, and no file: a model that was trained has none."""


def mark_drawn(model: PreTrainedModel, names: Collection[str]) -> None:
    """Say that the parameters of these names, and no others, are not pretrained."""
    setattr(model, DRAWN, tuple(sorted(names)))


def drawn_anew(model: PreTrainedModel) -> tuple[str, ...]:
    """The names of the parameters that are not pretrained, as far as it was said."""
    names: tuple[str, ...] = getattr(model, DRAWN, ())
    return names


@torch.no_grad()
def draw_anew(model: PreTrainedModel, seed: int) -> None:
    """Draw these parameters again, in place, as the model's own class begins with them; they do not depend on how many
    layers it has."""
    if not (names := set(drawn_anew(model))):
        return
    with torch.random.fork_rng(devices=[]):
        other = type(model)(plain_config(model.config))
        torch.manual_seed(seed)
        for place, module in other.named_modules():
            own = {f"{place}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)}
            if own & names or module is other:  # which may know better what its parts begin with
                other._init_weights(module)  # type: ignore[no-untyped-call]
    theirs = dict(other.named_parameters())
    for name, weight in model.named_parameters():
        if name in names:
            weight.copy_(theirs[name])
