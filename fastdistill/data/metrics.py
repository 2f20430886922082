"""The metric of a task, in the form that Trainer's `compute_metrics` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdistill.data.tasks import Task

if TYPE_CHECKING:
    from transformers import EvalPrediction

_Array = np.ndarray[Any, np.dtype[Any]]


def compute_metrics(task: Task) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a function from an EvalPrediction to {task.metric: value}, or of several labels both of theirs.

    Predictions are logits [N, C], of which the largest is taken, for regression [N] or [N, 1], and of several labels
    [N, C], of which those above 0 are taken; of a tuple, the first entry. Labels are [N]: integers 0..C-1, or finite
    numbers for regression; several are [N, C], 0 or 1, and NaN where it is not known.

    - "accuracy": the share of right predictions.
    - "f1": with two classes that of class 1, 2TP / (2TP + FP + FN); with more the plain mean of it over the
      classes that occur among labels or predictions. It is 0 where nothing is predicted right.
    - "matthews": Matthews' correlation, in Gorodkin's form for any number of classes (Comparing two
      K-category assignments by a K-category correlation coefficient, 2004); 0 where the labels or the
      predictions are all one class.
    - "spearman": Spearman's rank correlation; 0 where the labels or the predictions are all equal.
    - "f1_micro", "f1_macro": of several labels, over all of them together, and the plain mean of each label's; 0 for
      one that is nowhere, and in no prediction.

    Raises ValueError for other shapes, no rows, predictions that are NaN, or labels that are not the task's.
    """

    def compute(evaluated: EvalPrediction) -> dict[str, float]:
        if task.multi_label:
            return _of_several(task, evaluated.label_ids, evaluated.predictions)
        labels, predictions = _checked(task, evaluated.label_ids, evaluated.predictions)
        return {task.metric: _score(task, labels, predictions)}

    return compute


def _score(task: Task, labels: _Array, predictions: _Array) -> float:
    from scipy import stats
    from sklearn import metrics

    if task.metric == "accuracy":
        return float(metrics.accuracy_score(labels, predictions))
    if task.metric == "f1":
        average = "binary" if task.num_labels == 2 else "macro"
        return float(metrics.f1_score(labels, predictions, average=average, zero_division=0.0))
    if len(np.unique(labels)) == 1 or len(np.unique(predictions)) == 1:  # no correlation is defined
        return 0.0
    if task.metric == "matthews":
        return float(metrics.matthews_corrcoef(labels, predictions))
    return float(stats.spearmanr(labels, predictions).statistic)


def _of_several(task: Task, labels: Any, predictions: Any) -> dict[str, float]:
    labels = np.asarray(labels, dtype=np.float64)
    logits = np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)
    if labels.ndim != 2 or labels.shape[1] != task.num_labels or not len(labels):
        raise ValueError(f"labels has shape {list(labels.shape)}; expected [N, {task.num_labels}], N at least 1")
    if logits.shape != labels.shape:
        raise ValueError(f"predictions for {task.name!r} has shape {list(logits.shape)}; expected {list(labels.shape)}")
    if missing := int(np.isnan(logits).sum()):
        raise ValueError(f"predictions has {missing} NaN of {logits.size}; expected numbers")
    known = ~np.isnan(labels) & (labels != -100)
    if odd := [value for value in labels[known] if value not in (0, 1)]:
        raise ValueError(f"labels for {task.name!r} has {odd[0]}; expected 0 or 1, or NaN where it is not known")
    there, said = known & (labels == 1), known & (logits > 0)
    right, all_of = (there & said).sum(0), there.sum(0) + said.sum(0)
    each = 2 * right / np.maximum(all_of, 1)
    return {"f1_micro": float(2 * right.sum() / max(all_of.sum(), 1)), "f1_macro": float(each.mean())}


def _checked(task: Task, labels: Any, predictions: Any) -> tuple[_Array, _Array]:
    """Labels and predicted classes or scores, both [N]."""
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
