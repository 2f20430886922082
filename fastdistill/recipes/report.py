"""What a run says at its end: tables to read, and results.json for programs."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table

import fastdistill
from fastdistill.data.tasks import Task
from fastdistill.files import replacing

Results = Mapping[str, Mapping[str, Any]]
"""By model what `Trained.result` has, and what else was found. Of several seeds these are means, "values" and "stages"
have those of each, and "spread" is the metric's sample standard deviation. "against" has, by baseline, the difference
from it and the interval that holds 95 % of its resamples (`fastdistill.recipes.bootstrap.bootstrap`)."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """Of what results are, and by what the best was selected."""

    seeds: int
    select_on: str
    select_examples: int
    report_on: str
    report_examples: int
    student_from: str | None = None

    @property
    def first_seed(self) -> str:
        """What of the first seed alone is of."""
        return "1 seed" if self.seeds == 1 else f"the first of {self.seeds} seeds"

    def __str__(self) -> str:
        seeds = "1 seed" if self.seeds == 1 else f"{self.seeds} seeds"
        slice_of = "held out of " if self.select_on == "train" else ""
        return (
            f"{self.report_on}, {self.report_examples:,} examples, {seeds}; selected on {self.select_examples:,} "
            f"examples {slice_of}{self.select_on}"
        )

    @property
    def no_teacher(self) -> str:
        """What a student without a teacher is."""
        if self.student_from is None:
            return "finetuned has no teacher, and begins with weights at random"
        begins = {
            "teacher": "a cut of the fine-tuned teacher",
            "pretrained": "a cut of the pretrained encoder",
            "another": "a pretrained encoder that is none of the teachers'",
        }[self.student_from]
        return f"finetuned learns from the labels alone; like all students it begins as {begins}"


@dataclass(frozen=True)
class Report:
    """What a recipe found.

    Attributes:
        results: by model what was measured, as in results.json.
        record: all that results.json holds: the results, what the recipe adds to them, the settings, versions and time.
        file: where it is.
        tables: the same to read; ``str(report)`` is them as text.
        plots: the files of those that were drawn.
    """

    record: Mapping[str, Any]
    file: Path
    tables: tuple[Table, ...]
    plots: tuple[Path, ...] = ()

    @property
    def results(self) -> Results:
        results: Results = self.record["results"]
        return results

    def show(self, console: Console | None = None) -> None:
        """Print the tables, in the main process."""
        if PartialState().is_main_process:
            console = console or Console()
            for table in self.tables:
                console.print(table)
            console.print(f"{self.record['seconds']:.0f} s; {self.file}", highlight=False)

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as captured:
            self.show(console)
        return captured.get()


def finish(
    output: Path,
    settings: Mapping[str, Any],
    task: Task,
    results: Results,
    seconds: float,
    told: Told,
    *tables: Table,
    plots: Sequence[Path] = (),
    **more: Any,
) -> Report:
    """Write `output`/results.json, with `more`; the models' table is the last, and before it that of differences."""
    record = {
        "task": task.name,
        "metric": task.metric,
        **asdict(told),
        "results": results,
        **more,
        "settings": settings,
        "versions": versions(),
        "seconds": round(seconds, 1),
    }
    file = output / "results.json"
    if PartialState().is_main_process:
        write_json(file, record)
    ending = (differences_table(task, results), results_table(task, results, told))
    return Report(record, file, (*tables, *(table for table in ending if table is not None)), tuple(plots))


def summary(metric: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and of the metric each value and, of two or more, the sample standard deviation."""
    values = [result[metric] for result in results]
    spread = {"spread": statistics.stdev(values)} if len(values) > 1 else {}
    measured = (metric, "loss", "selection", "examples_per_second", "seconds", "parameters")
    mean = {key: statistics.fmean(result[key] for result in results) for key in measured}
    for key in ("trained_examples_per_second", "peak_memory"):  # which not every stage, or system, has
        if told := [result[key] for result in results if result.get(key) is not None]:
            mean[key] = max(told) if key == "peak_memory" else statistics.fmean(told)
    metrics = {name: statistics.fmean(one["metrics"][name] for one in results) for name in results[0]["metrics"]}
    each = {"values": values, "epochs": [one["epoch"] for one in results], "stages": [one["stage"] for one in results]}
    return {**mean, **spread, **each, "metrics": metrics, "parameters": round(mean["parameters"])}


def percent(result: Mapping[str, Any], metric: str) -> str:
    """A metric, with its spread where there is one."""
    return f"{100 * result[metric]:.1f}" + (f" ± {100 * result['spread']:.1f}" if "spread" in result else "")


def against(result: Mapping[str, Any], reference: str) -> str:
    """The difference from a baseline in points, its interval, and "better" or "worse" only where that excludes 0."""
    if (found := result.get("against", {}).get(reference)) is None:
        return ""
    difference, low, high = (100 * found[name] for name in ("difference", "low", "high"))
    verdict = f" {found['verdict']}" if found["verdict"] in ("better", "worse") else ""
    return f"{difference:+.1f} [{low:.1f}, {high:.1f}]{verdict}"


def differences_table(task: Task, results: Results) -> Table | None:
    """One row a student: its differences from the baselines, where there are any."""
    references = list(dict.fromkeys(name for of in results.values() for name in of.get("against", {})))
    if not references:
        return None
    table = Table("student", title=f"{task.name}: differences in points, with 95 % intervals")
    for reference in references:
        table.add_column(f"from {reference}", justify="right")
    for name, result in results.items():
        if "against" in result:
            table.add_row(name, *(against(result, reference) for reference in references))
    return table


def results_table(task: Task, results: Results, told: Told) -> Table:
    """One row a model: its metrics in percent, with the spread over seeds, if there were several, its parameters,
    and how many examples a second it evaluates."""
    has_no_teacher = f"; {told.no_teacher}" if "finetuned" in results else ""
    table = Table("model", title=task.name, caption=f"{told}{has_no_teacher}")
    others = [name for name in next(iter(results.values()))["metrics"] if name != task.metric]
    for column in (*(f"{metric} %" for metric in (task.metric, *others)), "parameters", "examples/s"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            percent(result, task.metric),
            *(f"{100 * result['metrics'][other]:.1f}" for other in others),
            f"{result['parameters'] / 1e6:.2f} M",
            f"{result['examples_per_second']:,.0f}",
        )
    return table


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    return {
        "fastdistill": fastdistill.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write_json(path: Path, value: object) -> None:
    """Write JSON so that the file is the old one or the new one, whole, at any moment."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, default=str) + "\n")
