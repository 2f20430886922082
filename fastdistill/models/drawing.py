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
    """Draw these parameters again, in place, as the model's own class begins with them."""
    if not (names := drawn_anew(model)):
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        other = type(model)(plain_config(model.config))
    theirs = dict(other.named_parameters())
    for name, weight in model.named_parameters():
        if name in names:
            weight.copy_(theirs[name])
