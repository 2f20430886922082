"""Batches of few lengths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastdistill.models.first_token import looks_at_the_first_token
from fastdistill.models.inputs import taken_by
from fastdistill.models.packed import PACKABLE

MULTIPLE = 8
"""Lengths of batches are multiples of it: of texts of up to 128 tokens there are then 16."""


class Padded:
    """A collator whose batches have a multiple of `MULTIPLE` tokens, where models take nothing of each but its id, type
    and mask, and as many positions. Nothing that they say changes by more than rounding.

    Args:
        collate: makes a batch, padded on either side.
        models: that `can_pad` is true of.
    """

    def __init__(self, collate: Any, models: Iterable[Any]) -> None:
        self.collate, self.models = collate, list(models)
        self.fill = {"attention_mask": 0, "token_type_ids": 0}

    def __call__(self, examples: Any) -> Any:
        batch = self.collate(examples)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return batch
        tokens = mask.shape[1]
        more = -tokens % MULTIPLE
        taken = {name for model in self.models for name in (taken_by(model) or ()) if name in batch} - {"labels"}
        room = all(tokens + more <= model.config.max_position_embeddings for model in self.models)
        fits = room and all(name in {"input_ids", *self.fill} and batch[name].shape == mask.shape for name in taken)
        if not more or not fits:
            return batch
        pad = self.models[0].config.pad_token_id
        # without one any token will do that the model has: it may be without some
        fill = self.fill | {"input_ids": int(batch["input_ids"][0, 0]) if pad is None else pad}
        return {**batch, **{name: F.pad(batch[name], (0, more), value=fill[name]) for name in taken}}


def can_pad(model: Any) -> bool:
    """Whether it is known that padding does not matter to a classifier, and that it has so many positions."""
    config = getattr(model, "config", None)
    known = getattr(config, "model_type", None) in PACKABLE and hasattr(config, "max_position_embeddings")
    return known and looks_at_the_first_token(model)
