"""Tasks that are known by their names: of the package, and of the Hugging Face Hub."""

import datasets
import pytest

from fastdistill.data.load import load_task
from fastdistill.data.tasks import TASKS


@pytest.mark.slow
def test_docstrings():
    data = load_task("docstrings", max_train_examples=500)
    assert data.task is TASKS["docstrings"] and data.test is None
    assert (len(data.train), len(data.validation)) == (500, 720)
    assert set(data.train["label"][:]) == set(range(8))
    assert data.train.features == {"sentence1": datasets.Value("string"), "label": datasets.Value("int64")}


def hub(monkeypatch, expected, splits):
    def load_dataset(*arguments):
        assert arguments == expected
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def hub_split(rows, names=None, **types):
    label = datasets.ClassLabel(names=names) if names else datasets.Value("float32")
    return datasets.Dataset.from_list(rows, features=datasets.Features(
        {name: label if name == "label" else datasets.Value(types.get(name, "string")) for name in rows[0]}
    ))  # fmt: skip


def test_hub_columns_and_splits(monkeypatch):
    names = ["entailment", "neutral", "contradiction"]
    row = {"idx": 0, "label": 2, "hypothesis": "h", "premise": "p"}
    train = hub_split([row] * 3, names, idx="int32")
    matched = hub_split([row | {"premise": "matched"}], names, idx="int32")
    unlabelled = hub_split([row | {"label": -1}], names, idx="int32")
    splits = {"train": train, "validation_matched": matched, "validation_mismatched": train}
    hub(monkeypatch, ("nyu-mll/glue", "mnli"), splits | {"test_matched": unlabelled})
    data = load_task("mnli")
    assert data.task is TASKS["mnli"] and data.test is None and len(data.mismatched) == 3
    assert data.validation[0] == {"sentence1": "matched", "sentence2": "h", "label": 2}
    assert data.train.features["label"] == datasets.Value("int64") and len(data.train) == 3


def test_hub_without_validation(monkeypatch):
    rows = [{"text": f"text {k}", "label": k % 2} for k in range(40)]
    split = hub_split(rows, ["neg", "pos"])
    hub(monkeypatch, ("stanfordnlp/imdb", None), {"train": split, "test": split, "unsupervised": split})
    data = load_task("imdb", max_eval_examples=3)
    assert (len(data.train), len(data.validation), len(data.test)) == (36, 3, 3)
    assert not {*data.train["sentence1"][:]} & {*data.validation["sentence1"][:]}


def test_hub_scores(monkeypatch):
    rows = [{"sentence1": "a", "sentence2": "b", "label": score} for score in (0.0, 5.0)]
    hub(monkeypatch, ("nyu-mll/glue", "stsb"), {"train": hub_split(rows), "validation": hub_split(rows)})
    assert load_task("stsb").train["label"][:] == [0.0, 5.0]
    hub(monkeypatch, ("nyu-mll/glue", "stsb"), {"train": hub_split(rows[:1] + [rows[0] | {"label": -1.0}])})
    with pytest.raises(ValueError, match=r"nyu-mll/glue has labels outside 0.0..5.0"):
        load_task("stsb")


def test_hub_labels_that_are_not_the_tasks(monkeypatch):
    rows = [{"sentence": "a", "label": 0}, {"sentence": "b", "label": 1}]
    hub(monkeypatch, ("nyu-mll/glue", "sst2"), {"train": hub_split(rows, ["positive", "negative"])})
    with pytest.raises(ValueError, match=r"has labels \['positive', 'negative'\]; task 'sst2' has"):
        load_task("sst2")
    rows[1]["label"] = -1
    hub(monkeypatch, ("nyu-mll/glue", "sst2"), {"train": hub_split(rows, ["negative", "positive"])})
    with pytest.raises(ValueError, match="labels outside 0..1 in a split of task 'sst2'"):
        load_task("sst2")


def test_without_a_network_the_error_says_what_to_do(monkeypatch):
    def load_dataset(*arguments):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    expected = r"'rte' could not be fetched.*Couldn't reach.*local folder './rte'.*sentence1, sentence2, label"
    with pytest.raises(ConnectionError, match=expected) as caught:
        load_task("rte")
    assert caught.value.__cause__ is not None
