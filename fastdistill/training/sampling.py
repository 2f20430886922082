"""Which examples a batch holds, and their lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import BatchSampler, Sampler

POOL = 50
"""Batches of similar length are cut from a random pool of this many."""


class LengthGroupedSampler(Sampler[int]):
    """Indices whose every `batch_size` have similar lengths: random pools are sorted by length and cut into
    batches, and the batches shuffled. The order depends on `seed` and `epoch()` alone.

    Which lengths follow each other depends on the epoch alone: students that are trained side by side with different
    seeds then have batches of about the same length in each step, and hardly any padding by each other."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 16) + self.epoch())
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        size, pool = self.batch_size, self.batch_size * POOL
        whole = len(shuffled) // size  # the rest, fewer than a batch, comes last
        for start in range(0, whole * size, pool):
            end = min(start + pool, whole * size)
            shuffled[start:end] = sorted(shuffled[start:end], key=self.lengths.__getitem__)
        of_epoch = torch.Generator().manual_seed(self.epoch())
        for batch in torch.randperm(whole, generator=of_epoch).tolist():
            yield from shuffled[batch * size : (batch + 1) * size]
        yield from shuffled[whole * size :]


class EvenShares(BatchSampler):
    """Batches for each of so many processes in turn, where the epoch's last round is shared evenly, too."""

    def __init__(self, batches: BatchSampler, processes: int) -> None:
        super().__init__(batches.sampler, batches.batch_size, batches.drop_last)
        self.processes = processes

    def __len__(self) -> int:
        rounds = BatchSampler(self.sampler, self.batch_size * self.processes, self.drop_last)
        return len(rounds) * self.processes

    def __iter__(self) -> Iterator[list[int]]:
        for together in BatchSampler(self.sampler, self.batch_size * self.processes, self.drop_last):
            if len(together) < self.processes:
                together = (together * self.processes)[: self.processes]
            share, more = divmod(len(together), self.processes)
            for place in range(self.processes):  # the first ones have the greater shares
                start = place * share + min(place, more)
                yield together[start : start + share + (place < more)]


def lengths_of(dataset: Any, column: str, *, read: bool = False) -> list[int] | None:
    """Of all examples, by that column or their tokens; None where they are not known without making each example, as a
    dataset of another kind than a table or a list does when it is asked for one: unless `read`, it is not."""
    is_table = hasattr(dataset, "column_names")
    is_made = is_table and dataset.format["type"] == "custom"  # by set_transform
    if not is_table and not read and not isinstance(dataset, list | tuple):
        return None
    columns = columns_of(dataset)
    if column in columns and is_table:
        return [int(length) for length in (dataset.with_format(None) if is_made else dataset)[column][:]]
    if is_table and not is_made:
        return [len(ids) for ids in dataset["input_ids"]] if "input_ids" in columns else None
    if is_made and not read:
        return None
    rows = (dataset[row] for row in range(len(dataset)))  # not iter(dataset), which may have no end
    if column in columns:
        return [int(row[column]) for row in rows]
    return [len(row["input_ids"]) for row in rows] if "input_ids" in columns else None


def columns_of(dataset: Any) -> set[str]:
    """The columns of a dataset, as far as they can be known without consuming it."""
    if getattr(dataset, "column_names", None) is not None:
        return set(dataset.column_names)
    first = dataset[0] if hasattr(dataset, "__len__") and len(dataset) else {}
    return set(first) if isinstance(first, Mapping) else set()
