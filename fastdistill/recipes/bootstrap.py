"""How sure a metric, or the difference between two models, is: resampling of the examples and the seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
class Interval:
    """A metric, or the difference of two models' metrics, the mean over seeds; 95 % of its resamples lie within."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Of a difference "better" or "worse", where the interval excludes 0."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else ""

    def record(self) -> dict[str, Any]:
        """Of a difference."""
        verdict = self.verdict or "no difference shown"
        return {"difference": self.value, "low": self.low, "high": self.high, "verdict": verdict}


def bootstrap(
    task: Task,
    labels: _Array,
    ours: Sequence[_Array],
    theirs: Sequence[_Array] | None = None,
    resamples: int = RESAMPLES,
) -> Interval:
    """The task's metric of one model or, paired, less that of another on the same examples with the same seeds.

    Each resample draws the seeds and the examples again, with replacement, the same for both models (Efron and
    Tibshirani 1993); with one seed only examples vary. The draws are always the same.

    Args:
        labels: ``[N]``.
        ours, theirs: of each seed, in the same order, the outputs: logits ``[N, C]``, or scores ``[N, 1]``.
    """
    if not ours or (theirs is not None and len(ours) != len(theirs)):
        number = "none" if theirs is None else len(theirs)
        raise ValueError(f"ours is of {len(ours)} seeds and theirs of {number}; expected as many, one or more")
    draw, labels = np.random.RandomState(0), np.asarray(labels)
    models = [[checked(task, labels, outputs)[1] for outputs in of] for of in (ours, theirs) if of is not None]

    def of_seeds(weights: _Array) -> _Array:
        """By seed and row of weights."""
        mine, *others = (np.array([scores(task, labels, one, weights)[task.metric] for one in of]) for of in models)
        return mine - others[0] if others else mine

    number, seeds, found = len(labels), len(ours), []
    for start in range(0, resamples, AT_ONCE):
        size = min(AT_ONCE, resamples - start)
        by_seed = of_seeds(draw.multinomial(number, np.full(number, 1 / number), size).astype(float))
        drawn = draw.randint(0, seeds, (seeds, size))
        found.append(by_seed[drawn, np.arange(size)].mean(0))
    low, high = np.percentile(np.concatenate(found), (2.5, 97.5))
    return Interval(float(of_seeds(np.ones((1, number))).mean()), float(low), float(high))
