"""A task's examples as models take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from transformers import DataCollatorWithPadding

from fastdistill.data.images import ImageCollator, pixels, size_of
from fastdistill.data.load import TaskData, tokenize
from fastdistill.data.tasks import Task
from fastdistill.teachers.store import Collate

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Examples:
    """Columns are the models' inputs and `labels`; of text also `length`, by which validation is sorted."""

    task: Task
    train: Dataset
    validation: Dataset
    collate: Collate
    tokenizer: PreTrainedTokenizerBase | None = None
    """Is saved beside models."""


def of_text(data: TaskData, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Examples:
    train, validation = (tokenize(split, tokenizer, data.task, max_length) for split in (data.train, data.validation))
    validation = validation.select(np.argsort(validation["length"][:], kind="stable"))  # less padding
    return Examples(data.task, train, validation, DataCollatorWithPadding(tokenizer), tokenizer)


def of_images(data: TaskData) -> Examples:
    """All of the first training image's size."""
    size = size_of(data.train)
    return Examples(data.task, pixels(data.train, size), pixels(data.validation, size), ImageCollator(size))
