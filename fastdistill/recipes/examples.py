"""A task's examples as models take them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc
import torch

from fastdistill.data.aspects import AspectCollator, measured
from fastdistill.data.images import Augmented, ImageCollator, pixels, size_of
from fastdistill.data.load import tokenize
from fastdistill.data.padding import PaddingCollator
from fastdistill.data.parsing import Parser
from fastdistill.data.tasks import Task
from fastdistill.recipes.splits import Splits
from fastdistill.teachers.store import Collate

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Examples:
    """Columns are the models' inputs and `labels`; of text also `length`. What the best is selected by is `validation`,
    and results are of `report`, which may be the same one: a model is then asked once."""

    task: Task
    train: Dataset
    validation: Dataset
    report: Dataset
    collate: Collate
    tokenizer: PreTrainedTokenizerBase | None = None
    """Is saved beside models."""
    mismatched: Dataset | None = None
    """Of which the task's metric is told beside, as "mismatched_" and its name."""
    augment: Callable[..., Augmented] | None = None
    """Makes of training examples, and a seed, those that students see, others in each epoch."""

    def tokens(self) -> torch.Tensor | None:
        """The ids that models may be given, padding's among them; None for images."""
        if self.tokenizer is None:
            return None
        splits = (self.train, self.validation, self.report, self.mismatched)
        columns = (split.data.column("input_ids") for split in splits if split is not None)
        found = [pc.unique(pc.list_flatten(column)).to_numpy() for column in columns]
        return torch.from_numpy(np.unique(np.concatenate([*found, [self.tokenizer.pad_token_id]]))).long()


def of_text(data: Splits, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Examples:
    """All but `train` are in the order of their length: there is less padding so."""

    def by_length(split: Dataset) -> Dataset:
        tokenized = tokenize(split, tokenizer, data.task, max_length)
        return tokenized.select(np.argsort(tokenized["length"][:], kind="stable"))

    train = tokenize(data.train, tokenizer, data.task, max_length)
    mismatched = None if data.mismatched is None else by_length(data.mismatched)
    evaluated = _both(data, by_length)
    return Examples(data.task, train, *evaluated, PaddingCollator(tokenizer), tokenizer, mismatched)


def of_aspects(data: Splits, tokenizer: PreTrainedTokenizerFast, parser: Parser | None) -> Examples:
    """Words and their distances from the aspect; all but `train` are in the order of their length."""

    def by_length(split: Dataset) -> Dataset:
        found = measured(split, tokenizer, parser)
        return found.select(np.argsort(found["length"][:], kind="stable"))

    train = measured(data.train, tokenizer, parser)
    mismatched = None if data.mismatched is None else by_length(data.mismatched)
    evaluated = _both(data, by_length)
    return Examples(data.task, train, *evaluated, AspectCollator(), tokenizer, mismatched)


def of_images(data: Splits, *, augment: bool = False) -> Examples:
    """All of the first training image's size; with `augment` they are cropped and mirrored at random in training."""
    size = size_of(data.train)
    validation, report = _both(data, partial(pixels, size=size))
    augmented = partial(Augmented, size=size) if augment else None
    return Examples(data.task, pixels(data.train, size), validation, report, ImageCollator(size), augment=augmented)


def _both(data: Splits, made: Callable[[Dataset], Dataset]) -> tuple[Dataset, Dataset]:
    """What is made of that which selects, and of that which is reported: one, where they are one."""
    validation = made(data.select)
    return validation, validation if data.report is data.select else made(data.report)
