"""Labels are looked at before they are on a device that computes, where asking would wait for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastdistill.models.heads import Head, label_faults


class CheckedLabels:
    """A collator whose batches have labels that the head knows; else it raises ValueError, with the dataset's row."""

    def __init__(self, collate: Any, head: Head, dataset: Any) -> None:
        self.collate, self.head, self.dataset = collate, head, dataset

    def __call__(self, examples: Any) -> Any:
        batch = self.collate(examples)
        if isinstance(batch, Mapping):
            for fault in label_faults(self.head, batch):
                raise ValueError(self._told(fault))
        return batch

    def _told(self, fault: str) -> str:
        if not hasattr(self.dataset, "__len__"):
            return f"a batch's {fault}"
        for row in range(len(self.dataset)):
            example = self.dataset[row]
            if any(label_faults(self.head, _labels(example))):
                return f"row {row} of the dataset: {fault}"
        return f"a batch's {fault}"


def _labels(example: Any) -> dict[str, Any]:
    """One example's as a batch of one."""
    if not isinstance(example, Mapping):
        return {}
    names = {"label": "labels", "label_ids": "labels"}
    found = {names.get(name, name): value for name, value in example.items()}
    wanted = ("labels", "start_positions", "end_positions")
    return {name: torch.as_tensor(found[name])[None] for name in wanted if found.get(name) is not None}
