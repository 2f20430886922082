from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastdistill.data.tasks import Task
from fastdistill.recipes.bootstrap import Interval, bootstrap

TASK = Task("t", ("sentence1",), ("no", "yes"), "accuracy", 8)
N = 400


def right(share: float, labels: Any, draw: Any) -> Any:
    """Logits that are right on about this share of the examples."""
    predicted = np.where(draw.rand(len(labels)) < share, labels, 1 - labels)
    return np.eye(2)[predicted]


def test_the_interval_is_that_of_the_theory() -> None:
    """Of one seed: the mean of paired differences has their standard error."""
    draw = np.random.RandomState(1)
    labels = draw.randint(0, 2, N)
    ours, theirs = right(0.8, labels, draw), right(0.75, labels, draw)
    found = bootstrap(TASK, labels, [ours], [theirs], resamples=2000)
    each = (ours.argmax(1) == labels).astype(float) - (theirs.argmax(1) == labels)
    assert found.value == pytest.approx(each.mean())
    error = 1.96 * each.std() / N**0.5
    assert (found.low, found.high) == pytest.approx((each.mean() - error, each.mean() + error), abs=0.15 * error)


def test_a_metric_has_an_interval_too() -> None:
    draw = np.random.RandomState(2)
    labels = draw.randint(0, 2, N)
    found = bootstrap(TASK, labels, [right(0.8, labels, draw)], resamples=2000)
    error = 1.96 * (found.value * (1 - found.value) / N) ** 0.5
    assert (found.low, found.high) == pytest.approx((found.value - error, found.value + error), abs=0.15 * error)


def test_seeds_that_differ_widen_it() -> None:
    draw = np.random.RandomState(1)
    labels = draw.randint(0, 2, N)
    theirs = [right(0.7, labels, draw) for _ in range(4)]
    alike = bootstrap(TASK, labels, [right(0.8, labels, draw) for _ in range(4)], theirs)
    apart = bootstrap(TASK, labels, [right(share, labels, draw) for share in (0.6, 0.7, 0.9, 1.0)], theirs)
    assert alike.verdict == "better"
    assert apart.high - apart.low > 2 * (alike.high - alike.low)


def test_a_model_does_not_differ_from_itself() -> None:
    labels = np.arange(20) % 2
    outputs = [np.eye(2)[labels]] * 2
    assert bootstrap(TASK, labels, outputs, outputs) == Interval(0.0, 0.0, 0.0)
    assert Interval(0.0, 0.0, 0.0).verdict == Interval(0.1, -0.1, 0.3).verdict == ""
    assert Interval(-0.1, -0.2, -0.01).verdict == "worse"
    with pytest.raises(ValueError, match="ours is of 2 seeds and theirs of 1"):
        bootstrap(TASK, labels, outputs, outputs[:1])


def test_correlations_are_resampled_too() -> None:
    draw = np.random.RandomState(0)
    labels = draw.rand(100) * 5
    close, far = (labels[:, None] + noise * draw.randn(100, 1) for noise in (0.5, 3.0))
    found = bootstrap(Task("s", ("sentence1",), None, "spearman", 8), labels, [close], [far], resamples=200)
    assert 0 < found.low < found.value < found.high
