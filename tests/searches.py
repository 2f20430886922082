"""A search among three teachers, one of which is right, one at random, and one wrong."""

from __future__ import annotations

from typing import Any

import datasets
import torch
from transformers import DataCollatorWithPadding

from fastdistill.autoskd import search as autoskd
from fastdistill.autoskd.search import Found
from fastdistill.autoskd.settings import Settings
from fastdistill.autoskd.theta import Batch
from tests import tiny

NAMES = ("a", "b", "c")
N = len(NAMES)


def data(number: int = 40) -> datasets.Dataset:
    """Teacher "a" knows the labels, "b" nothing, "c" the opposite."""
    dataset = tiny.dataset(number)
    sure = {"a": 3.0, "b": 0.0, "c": -3.0}
    for name, scale in sure.items():
        logits = [[scale * (1 - 2 * label), scale * (2 * label - 1)] for label in dataset["labels"]]
        dataset = dataset.add_column(f"{name}_logits", logits)
    return dataset


SETTINGS = Settings(
    drop=1,
    candidates=3,
    epochs=5,
    batch_size=8,
    learning_rate=1e-2,
    theta_optimizer="adam",  # it moves much in few steps
    theta_learning_rate=1e-2,
)


def search(settings: Settings = SETTINGS, student: Any = None, **options: Any) -> Found:
    collate = DataCollatorWithPadding(tiny.tokenizer())
    return autoskd.search(student or tiny.bert(layers=1), data(), NAMES, settings, collate=collate, **options)


def batches(number: int, seed: int, columns: list[int]) -> Batch:
    features = tiny.tokenizer().pad(
        tiny.dataset(number, seed).select_columns(["input_ids", "attention_mask"])[:], return_tensors="pt"
    )
    draw = torch.Generator().manual_seed(seed)
    return Batch(dict(features), torch.randn(number, N, 2, generator=draw, dtype=torch.float64)[:, columns] * 2)
