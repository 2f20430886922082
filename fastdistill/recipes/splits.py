"""The splits of a run: what students learn, what selects among them, and what is reported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastdistill.data.load import TaskData, hold_out
from fastdistill.data.tasks import Task
from fastdistill.recipes.settings import RecipeSettings

if TYPE_CHECKING:
    from datasets import Dataset

MOST = 2000
"""Of the training examples at most so many select."""


@dataclass(frozen=True)
class Splits:
    """As `TaskData` has them. The best epoch, candidate or setting is that on `select`; results are of `report`, and
    the metric of `mismatched` is told beside.

    The names say of which split they are: a `select_on` of "train" are training examples that are not learned."""

    task: Task
    train: Dataset
    select: Dataset
    report: Dataset
    select_on: str
    report_on: str
    mismatched: Dataset | None = None

    @property
    def names(self) -> dict[str, str]:
        return {"select_on": self.select_on, "report_on": self.report_on}


def splits_of(settings: RecipeSettings, data: TaskData) -> Splits:
    """Raises ValueError for a test split that is not there."""
    if settings.report_on == "test" and data.test is None:
        raise ValueError(f"--report-on is test, but {data.task.name} has no labelled test split; expected validation")
    report_on = settings.report_on or ("validation" if data.test is None else "test")
    select_on = settings.select_on or ("train" if report_on == "validation" else "validation")
    report = data.validation if report_on == "validation" else data.test
    assert report is not None
    train, select = data.train, data.validation
    if select_on == "train":
        train, select = hold_out(data.task, train, settings.seed, every=max(10, -(-len(train) // MOST)))
    return Splits(data.task, train, select, report, select_on, report_on, data.mismatched)
