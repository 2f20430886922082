from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastdistill.data.load import load_task
from fastdistill.data.tasks import TASKS
from fastdistill.recipes.settings import KDSettings
from fastdistill.recipes.splits import Splits, splits_of
from tests import tiny


def splits(folder: Path, test: bool, **asked: Any) -> Splits:
    tiny.task_folder(folder / "task", train=60, validation=24)
    if test:
        (folder / "task" / "test.jsonl").write_text((folder / "task" / "validation.jsonl").read_text())
    settings = KDSettings(task=str(folder / "task"), teacher="minilm", student_layers=1, output="o", **asked)
    return splits_of(settings, load_task(settings.task))


def test_mismatched_examples_are_read(tmp_path: Path) -> None:
    """Of a local MNLI, and of the hub's."""
    tiny.task_folder(tmp_path / "task", train=60, validation=24)
    kept = (tmp_path / "task" / "train.jsonl").read_text()
    (tmp_path / "task" / "validation_mismatched.jsonl").write_text(kept)
    settings = KDSettings(task=str(tmp_path / "task"), teacher="minilm", student_layers=1, output="o")
    found = splits_of(settings, load_task(settings.task)).mismatched
    assert found is not None
    assert len(found) == 60
    assert TASKS["mnli"].hub is not None
    assert TASKS["mnli"].hub.mismatched == "validation_mismatched"


@pytest.mark.parametrize(
    "test, asked, select_on, report_on",
    [
        (False, {}, "train", "validation"),
        (True, {}, "validation", "test"),
        (True, {"report_on": "validation"}, "train", "validation"),
        (True, {"select_on": "train"}, "train", "test"),
        (False, {"select_on": "validation"}, "validation", "validation"),
    ],
)
def test_what_selects_is_not_what_is_reported(
    tmp_path: Path, test: bool, asked: dict[str, str], select_on: str, report_on: str
) -> None:
    found = splits(tmp_path, test, **asked)
    assert found.names == {"select_on": select_on, "report_on": report_on}
    texts = [of["sentence1"][:] for of in (found.train, found.select, found.report)]
    assert len(texts[2]) == 24
    if select_on == "train":
        assert sorted(texts[0] + texts[1]) == sorted(row["sentence1"] for row in tiny.rows(60, 1))
        assert 5 <= len(texts[1]) <= 7
        assert set(found.select["label"][:]) == {0, 1}
    else:
        assert len(texts[0]) == 60
        assert len(texts[1]) == 24


def test_there_must_be_a_test_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--report-on is test, but task has no labelled test split; expected validat"):
        splits(tmp_path, False, report_on="test")
