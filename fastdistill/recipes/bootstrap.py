"""How sure a difference between two models is: paired resampling of the examples and the seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdistill.data.metrics import checked, scores

if TYPE_CHECKING:
    from fastdistill.data.tasks import Task

_Array = np.ndarray[Any, np.dtype[Any]]

RESAMPLES = 1000
AT_ONCE = 100
"""Resamples whose weights of all examples are in memory together."""


@dataclass(frozen=True)
class Difference:
    """Of two models' metrics, each the mean over seeds, and the interval that holds 95 % of its resamples."""

    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """"better" or "worse" where the interval excludes 0."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else ""

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict or "no difference shown"}


def paired_bootstrap(
    task: Task, labels: _Array, ours: Sequence[_Array], theirs: Sequence[_Array], resamples: int = RESAMPLES
) -> Difference:
    """The task's metric of one model less that of another, on the same examples with the same seeds.

    Each resample draws the seeds and the examples again, with replacement, the same for both models (Efron and
    Tibshirani 1993); with one seed only examples vary. The draws are always the same.

    Args:
        labels: ``[N]``.
        ours, theirs: of each seed, in the same order, the outputs: logits ``[N, C]``, or scores ``[N, 1]``.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"ours is of {len(ours)} seeds and theirs of {len(theirs)}; expected as many, one or more")
    draw = np.random.RandomState(0)
    predicted = [tuple(checked(task, labels, of)[1] for of in pair) for pair in zip(ours, theirs, strict=True)]
    labels = np.asarray(labels)

    def differences(weights: _Array) -> _Array:
        """By seed and row of weights."""
        pairs = [[scores(task, labels, one, weights)[task.metric] for one in pair] for pair in predicted]
        return np.array([mine - other for mine, other in pairs])

    number, seeds, found = len(labels), len(ours), []
    for start in range(0, resamples, AT_ONCE):
        size = min(AT_ONCE, resamples - start)
        by_seed = differences(draw.multinomial(number, np.full(number, 1 / number), size).astype(float))
        drawn = draw.randint(0, seeds, (seeds, size))
        found.append(by_seed[drawn, np.arange(size)].mean(0))
    low, high = np.percentile(np.concatenate(found), (2.5, 97.5))
    return Difference(float(differences(np.ones((1, number))).mean()), float(low), float(high))
