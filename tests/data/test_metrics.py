import warnings

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from transformers import EvalPrediction

from fastdistill.data.metrics import compute_metrics, scores
from fastdistill.data.tasks import Task


def task(metric, classes=2):
    names = None if metric == "spearman" else tuple(f"class {k}" for k in range(classes))
    return Task("t", ("sentence1",), names, metric, 8)


def one_hot(classes, width=2):
    return np.eye(width, dtype=np.float32)[np.asarray(classes)]


def evaluate(metric, predictions, labels, classes=2):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compute_metrics(task(metric, classes))(EvalPrediction(predictions, np.asarray(labels)))
    assert next(iter(found)) == metric and {type(value) for value in found.values()} == {float}
    return found[metric]


def test_accuracy_takes_the_largest_logit():
    logits = np.array([[0.1, 2.0, -1.0], [3.0, 2.9, 0.0], [-5.0, -4.0, -4.5]])
    assert evaluate("accuracy", logits, [1, 0, 2], classes=3) == pytest.approx(2 / 3)


def test_f1_of_two_classes_is_that_of_class_one():
    # true positives 2, false positives 1, false negatives 1
    assert evaluate("f1", one_hot([1, 1, 1, 0, 0]), [1, 1, 0, 1, 0]) == pytest.approx(4 / 6)


def test_f1_of_more_classes_is_the_mean_over_classes():
    predictions, labels = [0, 0, 1, 2], [0, 1, 1, 2]
    assert evaluate("f1", one_hot(predictions, 3), labels, classes=3) == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_f1_without_a_right_prediction_is_zero():
    assert evaluate("f1", one_hot([0, 0, 0]), [1, 1, 0]) == 0.0
    assert evaluate("f1", one_hot([0, 0]), [0, 0]) == 0.0


def test_matthews():
    # TP 2, TN 1, FP 1, FN 1: (2*1 - 1*1) / sqrt(3*3*2*2)
    assert evaluate("matthews", one_hot([1, 1, 1, 0, 0]), [1, 1, 0, 1, 0]) == pytest.approx(1 / 6)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_spearman_follows_the_ranks(shape):
    predictions = np.array([0.0, 10.0, 100.0, 90.0]).reshape(shape)
    assert evaluate("spearman", predictions, [0.0, 1.0, 2.0, 3.0]) == pytest.approx(0.8)
    assert evaluate("spearman", -predictions, [0.0, 1.0, 2.0, 3.0]) == pytest.approx(-0.8)


@pytest.mark.parametrize("value", [0.0, 3.5, np.inf])
def test_constant_scores_correlate_with_nothing(value):
    assert evaluate("spearman", np.full(5, value), [1.0, 2.0, 3.0, 4.0, 5.0]) == 0.0
    assert evaluate("spearman", np.arange(5.0), np.full(5, 2.0)) == 0.0


@pytest.mark.parametrize("labels", [[0, 1, 1], [1, 1, 1], [0, 0, 0]])
def test_constant_classes_have_no_matthews_correlation(labels):
    assert evaluate("matthews", one_hot([1, 1, 1]), labels) == 0.0
    assert evaluate("matthews", one_hot(labels), [1, 1, 1]) == 0.0


def test_one_row():
    assert evaluate("accuracy", one_hot([1]), [1]) == 1.0
    assert evaluate("spearman", np.array([1.0]), [2.0]) == 0.0


def test_of_a_tuple_the_first_entry_is_the_logits():
    hidden_states = np.zeros((2, 7, 3))
    assert evaluate("accuracy", (one_hot([1, 0]), hidden_states), [1, 1]) == 0.5


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_bounds_and_perfection(pairs):
    labels, predictions = map(list, zip(*pairs, strict=True))
    for metric in ("accuracy", "f1", "matthews"):
        assert -1.0 <= evaluate(metric, one_hot(predictions, 4), labels, classes=4) <= 1.0
    assert evaluate("accuracy", one_hot(labels, 4), labels, classes=4) == 1.0
    assert evaluate("f1", one_hot(labels, 4), labels, classes=4) == 1.0
    if len(set(labels)) > 1:
        assert evaluate("matthews", one_hot(labels, 4), labels, classes=4) == pytest.approx(1.0)
        assert evaluate("spearman", np.exp(labels), np.asarray(labels, float)) == pytest.approx(1.0)


BESIDE = {
    "accuracy": ("accuracy",),
    "f1": ("f1", "accuracy", "accuracy_and_f1"),
    "matthews": ("matthews", "accuracy"),
    "spearman": ("spearman", "pearson", "pearson_and_spearman"),
}


def by_libraries(name, labels, predictions):
    if name == "accuracy_and_f1":
        return (by_libraries("accuracy", labels, predictions) + by_libraries("f1", labels, predictions)) / 2
    if name == "pearson_and_spearman":
        return (by_libraries("pearson", labels, predictions) + by_libraries("spearman", labels, predictions)) / 2
    return {
        "accuracy": lambda: sklearn.metrics.accuracy_score(labels, predictions),
        "f1": lambda: sklearn.metrics.f1_score(labels, predictions, average="binary" if labels.max() < 2 else "macro"),
        "matthews": lambda: sklearn.metrics.matthews_corrcoef(labels, predictions),
        "pearson": lambda: scipy.stats.pearsonr(labels, predictions).statistic,
        "spearman": lambda: scipy.stats.spearmanr(labels, predictions).statistic,
    }[name]()


@pytest.mark.parametrize(
    ("metric", "classes"), [*((m, c) for m in ("accuracy", "f1", "matthews") for c in (2, 4)), ("spearman", 1)]
)
def test_each_is_the_libraries_also_of_examples_that_count_several_times(metric, classes):
    draw = np.random.RandomState(0)
    if classes == 1:
        labels = draw.randint(0, 6, 40).astype(float)
        predictions = labels + 3 * draw.randn(40).round(1)  # with ties
    else:
        labels = draw.randint(0, classes, 40)
        predictions = np.where(draw.rand(40) < 0.6, labels, draw.randint(0, classes, 40))
    weights = np.concatenate([np.ones((1, 40), int), draw.multinomial(40, np.full(40, 1 / 40), 5)])
    found = scores(task(metric, classes), labels, predictions, weights)
    extra = ("f1",) if metric == "accuracy" and classes > 2 else ()
    assert tuple(found) == BESIDE[metric] + extra
    for place, times in enumerate(weights):
        rows = np.repeat(np.arange(40), times)
        for name, values in found.items():
            assert values[place] == pytest.approx(by_libraries(name, labels[rows], predictions[rows]), abs=1e-12), name


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews"])
@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        (np.zeros((3, 3)), [0, 1, 0], r"predictions for 't' has shape \[3, 3\]; expected \[3, 2\]"),
        (np.zeros((2, 2)), [0, 1, 0], r"has shape \[2, 2\]; expected \[3, 2\]"),
        (np.zeros(3), [0, 1, 0], r"has shape \[3\]; expected \[3, 2\]"),
        (np.zeros((3, 1, 2)), [0, 1, 0], r"has shape \[3, 1, 2\]; expected \[3, 2\]"),
        (np.zeros((3, 2)), [[0], [1], [0]], r"labels has shape \[3, 1\]; expected \[N\], N at least 1"),
        (np.zeros((0, 2)), [], r"labels has shape \[0\]; expected \[N\], N at least 1"),
        (np.array([[0, 1], [np.nan, 0], [1, np.nan]]), [0, 1, 0], "predictions .* 2 NaN of 6"),
        (np.zeros((3, 2)), [0, 2, 0], r"labels for 't' is int64 from 0 to 2; expected integers 0..1"),
        (np.zeros((3, 2)), [0, -100, 0], "from -100 to 0"),
        (np.zeros((3, 2)), [0.0, 1.0, 0.0], "is float64"),
    ],
)
def test_unusable_classes_are_refused(metric, predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        evaluate(metric, predictions, labels)


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        (np.zeros((3, 2)), [0.0, 1.0, 2.0], r"has shape \[3, 2\]; expected \[3\] or \[3, 1\]"),
        (np.zeros((1, 3)), [0.0, 1.0, 2.0], r"has shape \[1, 3\]; expected \[3\] or \[3, 1\]"),
        (np.array([0.0, np.nan, 1.0]), [0.0, 1.0, 2.0], "1 NaN of 3"),
        (np.zeros(3), [0.0, np.nan, 2.0], "labels has NaN or infinity; expected finite numbers"),
        (np.zeros(3), [0.0, np.inf, 2.0], "labels has NaN or infinity; expected finite numbers"),
    ],
)
def test_unusable_scores_are_refused(predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        evaluate("spearman", predictions, labels)


def test_f1_of_several_labels_is_sklearns():
    draw = np.random.RandomState(0)
    labels, logits = draw.randint(0, 2, (20, 4)).astype(np.float32), draw.randn(20, 4)
    of_several = Task("t", ("sentence1",), ("a", "b", "c", "d"), "f1_macro", 8, multi_label=True)
    found = compute_metrics(of_several)(EvalPrediction(logits, labels))
    expected = {
        f"f1_{mean}": f1_score(labels, logits > 0, average=mean, zero_division=0.0) for mean in ("micro", "macro")
    }
    assert found == pytest.approx(expected)
    labels[3, 1] = np.nan  # what is not known counts neither way
    logits[3, 1] = 9.0
    either = compute_metrics(of_several)(EvalPrediction(logits, labels))
    logits[3, 1] = -9.0
    assert compute_metrics(of_several)(EvalPrediction(logits, labels)) == either
    with pytest.raises(ValueError, match="labels for 't' has 2.0; expected 0 or 1"):
        compute_metrics(of_several)(EvalPrediction(logits, np.full((20, 4), 2.0)))
    with pytest.raises(ValueError, match=r"predictions for 't' has shape \[20, 3\]; expected \[20, 4\]"):
        compute_metrics(of_several)(EvalPrediction(logits[:, :3], labels))
