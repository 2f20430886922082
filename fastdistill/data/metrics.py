"""The metrics of a task, in the form that Trainer's `compute_metrics` takes, and of examples that count many times."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdistill.data.tasks import Task
from fastdistill.models.heads import IGNORED

if TYPE_CHECKING:
    from transformers import EvalPrediction

_Array = np.ndarray[Any, np.dtype[Any]]


def compute_metrics(task: Task) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a function from an EvalPrediction to {name: value}, of which the first is the task's metric, and the
    others are those that papers tell beside it.

    Predictions are logits [N, C], of which the largest is taken, for regression [N] or [N, 1], and of several labels
    [N, C], of which those above 0 are taken; of a tuple, the first entry. Labels are [N]: integers 0..C-1, or finite
    numbers for regression; several are [N, C], 0 or 1, and NaN where it is not known.

    - "accuracy": the share of right predictions.
    - "f1": with two classes that of class 1, 2TP / (2TP + FP + FN); with more the plain mean of it over the
      classes that occur among labels or predictions. It is 0 where nothing is predicted right. Where it is the task's
      metric (MRPC, QQP) "accuracy" and the mean of both, "accuracy_and_f1", are told, too; elsewhere it is beside
      accuracy where there are more classes than two.
    - "matthews": Matthews' correlation, in Gorodkin's form for any number of classes (Comparing two
      K-category assignments by a K-category correlation coefficient, 2004); 0 where the labels or the
      predictions are all one class. "accuracy" is beside it.
    - "spearman": Spearman's rank correlation; 0 where the labels or the predictions are all equal. "pearson" is
      Pearson's, and "pearson_and_spearman" their mean.
    - "f1_micro", "f1_macro": of several labels, over all of them together, and the plain mean of each label's; 0 for
      one that is nowhere, and in no prediction.

    Raises ValueError for other shapes, no rows, predictions that are NaN, or labels that are not the task's.
    """

    def compute(evaluated: EvalPrediction) -> dict[str, float]:
        labels, predictions = checked(task, evaluated.label_ids, evaluated.predictions)
        weights = np.ones((1, len(labels)))
        return {name: float(of[0]) for name, of in scores(task, labels, predictions, weights).items()}

    return compute


def scores(task: Task, labels: _Array, predictions: _Array, weights: _Array) -> dict[str, _Array]:
    """The metrics of `compute_metrics`, each ``[R]``, with every example counted as often as one of R rows of weights
    ``[R, N]`` says; labels and predicted classes or scores are
    ``[N]``, and several labels ``[N, C]``."""
    if task.multi_label:
        return _of_several(labels, predictions, weights)
    if task.is_regression:
        of_ranks = _correlation(_ranks(labels, weights), _ranks(predictions, weights), weights)
        pearson = _correlation(labels, predictions, weights)
        return {"spearman": of_ranks, "pearson": pearson, "pearson_and_spearman": (of_ranks + pearson) / 2}
    counts = _confusion(labels, predictions, task.num_labels, weights)
    total, right = weights.sum(1), np.trace(counts, axis1=1, axis2=2)
    accuracy = right / total
    if task.metric == "matthews":
        return {"matthews": _matthews(counts), "accuracy": accuracy}
    f1 = _f1(counts)
    if task.metric == "f1":
        return {"f1": f1, "accuracy": accuracy, "accuracy_and_f1": (accuracy + f1) / 2}
    return {"accuracy": accuracy} | ({"f1": f1} if task.num_labels > 2 else {})


def _of_several(labels: _Array, predictions: _Array, weights: _Array) -> dict[str, _Array]:
    known = ~np.isnan(labels)
    there, said = known & (labels == 1), known & predictions
    right, all_of = weights @ (there & said), weights @ there + weights @ said
    each = 2 * right / np.maximum(all_of, 1)
    return {"f1_micro": 2 * right.sum(1) / np.maximum(all_of.sum(1), 1), "f1_macro": each.mean(1)}


def _confusion(labels: _Array, predictions: _Array, classes: int, weights: _Array) -> _Array:
    """How often which class was predicted as which, ``[R, C, C]``."""
    cells = labels * classes + predictions
    return np.stack([np.bincount(cells, row, classes**2).reshape(classes, classes) for row in weights])


def _f1(counts: _Array) -> _Array:
    hits, said, there = np.einsum("rcc->rc", counts), counts.sum(1), counts.sum(2)
    either = said + there
    f1: _Array = np.divide(2 * hits, either, out=np.zeros_like(either), where=either > 0)
    mean: _Array = f1[:, 1] if counts.shape[1] == 2 else f1.sum(1) / (either > 0).sum(1)
    return mean


def _matthews(counts: _Array) -> _Array:
    total, right = counts.sum((1, 2)), np.trace(counts, axis1=1, axis2=2)
    said, there = counts.sum(1), counts.sum(2)
    above = right * total - (said * there).sum(1)
    below = np.sqrt((total**2 - (said**2).sum(1)) * (total**2 - (there**2).sum(1)))
    found: _Array = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return found


def _correlation(x: _Array, y: _Array, weights: _Array) -> _Array:
    """Pearson's, of values ``[N]`` or ``[R, N]``; 0 where one of them is all equal, or infinite."""
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return np.zeros(len(weights))
    total = weights.sum(1, keepdims=True)
    x, y = (of - (weights * of).sum(1, keepdims=True) / total for of in (x.astype(float), y.astype(float)))
    above = (weights * x * y).sum(1)
    squares = (weights * x * x).sum(1) * (weights * y * y).sum(1)
    tiny = 1e-24 * total[:, 0] ** 2 * (np.abs(x).max(1) * np.abs(y).max(1)) ** 2  # what is left of equal values
    found: _Array = np.divide(above, np.sqrt(squares), out=np.zeros_like(above), where=squares > tiny)
    return found


def _ranks(values: _Array, weights: _Array) -> _Array:
    """The ranks ``[R, N]`` among as many of each as the weights say; equal values share the mean of theirs."""
    _, place = np.unique(values, return_inverse=True)
    order = place.argsort(kind="stable")
    each = np.add.reduceat(weights[:, order], np.flatnonzero(np.diff(place[order], prepend=-1)), axis=1)
    ranks: _Array = (each.cumsum(1) - (each - 1) / 2)[:, place]
    return ranks


def checked(task: Task, labels: Any, predictions: Any) -> tuple[_Array, _Array]:
    """Labels and predicted classes or scores, both [N], or of several labels [N, C]; ValueError as `compute_metrics`
    says."""
    if task.multi_label:
        return _checked_several(task, labels, predictions)
    labels = np.asarray(labels)
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"labels has shape {list(labels.shape)}; expected [N], N at least 1")
    predictions = np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)
    rows = len(labels)
    shapes = [(rows,), (rows, 1)] if task.is_regression else [(rows, task.num_labels)]
    if predictions.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"predictions for {task.name!r} has shape {list(predictions.shape)}; expected {wanted}")
    if missing := int(np.isnan(predictions).sum()):
        raise ValueError(f"predictions has {missing} NaN of {predictions.size}; expected numbers")
    if task.is_regression:
        if not np.isfinite(labels).all():
            raise ValueError("labels has NaN or infinity; expected finite numbers")
        return labels, predictions.reshape(rows)
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= task.num_labels:
        found = f"{labels.dtype} from {labels.min()} to {labels.max()}"
        raise ValueError(f"labels for {task.name!r} is {found}; expected integers 0..{task.num_labels - 1}")
    return labels, predictions.argmax(axis=1)


def _checked_several(task: Task, labels: Any, predictions: Any) -> tuple[_Array, _Array]:
    """Labels, NaN where they are not known, and which logits are above 0."""
    labels = np.asarray(labels, dtype=np.float64)
    logits = np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)
    if labels.ndim != 2 or labels.shape[1] != task.num_labels or not len(labels):
        raise ValueError(f"labels has shape {list(labels.shape)}; expected [N, {task.num_labels}], N at least 1")
    if logits.shape != labels.shape:
        raise ValueError(f"predictions for {task.name!r} has shape {list(logits.shape)}; expected {list(labels.shape)}")
    if missing := int(np.isnan(logits).sum()):
        raise ValueError(f"predictions has {missing} NaN of {logits.size}; expected numbers")
    labels = np.where(labels == IGNORED, np.nan, labels)
    if odd := [value for value in labels[~np.isnan(labels)] if value not in (0, 1)]:
        raise ValueError(f"labels for {task.name!r} has {odd[0]}; expected 0 or 1, or NaN where it is not known")
    return labels, logits > 0
