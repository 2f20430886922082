import dataclasses

import pytest

from fastdistill.data.docstrings import LABEL_NAMES
from fastdistill.data.tasks import METRICS, TASKS, Task

GLUE = {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"}


def test_registry_holds_every_task_under_its_own_name():
    assert set(TASKS) == GLUE | {"ag_news", "emotion", "imdb", "docstrings"}
    assert all(task.name == name for name, task in TASKS.items())
    with pytest.raises(TypeError):
        TASKS["mine"] = TASKS["sst2"]


def test_metrics_are_those_of_the_benchmarks():
    other = {"cola": "matthews", "mrpc": "f1", "qqp": "f1", "stsb": "spearman"}
    assert {name: task.metric for name, task in TASKS.items()} == dict.fromkeys(TASKS, "accuracy") | other


def test_maximum_lengths():
    other = {"sst2": 64, "emotion": 64, "docstrings": 64, "imdb": 256}
    assert {name: task.max_length for name, task in TASKS.items()} == dict.fromkeys(TASKS, 128) | other


def test_number_of_labels():
    sizes = {"stsb": 1, "mnli": 3, "ag_news": 4, "emotion": 6, "docstrings": 8}
    assert {name: task.num_labels for name, task in TASKS.items()} == dict.fromkeys(TASKS, 2) | sizes
    assert [name for name, task in TASKS.items() if task.is_regression] == ["stsb"]
    assert TASKS["stsb"].label_range == (0.0, 5.0)
    assert TASKS["docstrings"].label_names == LABEL_NAMES


def test_text_columns_agree_with_the_hubs():
    pairs = {"mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"}
    for name, task in TASKS.items():
        assert task.text_columns == (("sentence1", "sentence2") if name in pairs else ("sentence1",))
        if task.hub is not None:
            assert len(task.hub.text_columns) == len(task.text_columns)
    assert TASKS["docstrings"].hub is None


def test_labels_withheld_on_the_hub_are_not_used():
    assert {name for name, task in TASKS.items() if task.hub and task.hub.test} == {
        "ag_news",
        "emotion",
        "imdb",
    }
    assert TASKS["mnli"].hub.validation == "validation_matched"
    assert TASKS["imdb"].hub.validation is None and TASKS["ag_news"].hub.validation is None


def test_a_task_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TASKS["sst2"].max_length = 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"text_columns": ("sentence2",)}, "text_columns"),
        ({"text_columns": ("sentence1", "other")}, "text_columns"),
        ({"metric": "bleu"}, "metric is 'bleu'; expected one of accuracy, f1, spearman, matthews"),
        ({"metric": "spearman"}, "metric 'spearman' does not fit"),
        ({"label_names": None}, "metric 'accuracy' does not fit"),
        ({"label_names": ("only",)}, "label_names"),
        ({"label_names": ("a", "a")}, "label_names"),
        ({"max_length": 0}, "max_length"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused(change, named):
    fields = {"name": "t", "text_columns": ("sentence1",), "label_names": ("a", "b"), "metric": "accuracy"}
    Task(**fields, max_length=8)
    with pytest.raises(ValueError, match=named):
        Task(**({**fields, "max_length": 8} | change))


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_fits_some_task(metric):
    names = None if metric == "spearman" else ("a", "b")
    assert Task("t", ("sentence1",), names, metric, 8).metric == metric
