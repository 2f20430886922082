"""What a run says at its end: tables to read, and results.json for programs."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
"""By model: its metric, loss, parameters, examples_per_second, and what else was found. Of several seeds these are
means, and "spread" is the metric's sample standard deviation."""


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
    *tables: Table,
    plots: Sequence[Path] = (),
    **more: Any,
) -> Report:
    """Write `output`/results.json, with `more`; the models' table is the last."""
    record = {
        "task": task.name,
        "metric": task.metric,
        "results": results,
        **more,
        "settings": settings,
        "versions": versions(),
        "seconds": round(seconds, 1),
    }
    file = output / "results.json"
    if PartialState().is_main_process:
        write_json(file, record)
    return Report(record, file, (*tables, results_table(task, results)), tuple(plots))


def summary(metric: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and of the metric each value and, of two or more, the sample standard deviation."""
    values = [result[metric] for result in results]
    spread = {"spread": statistics.stdev(values)} if len(values) > 1 else {}
    measured = (metric, "loss", "examples_per_second", "seconds", "parameters")
    mean = {key: statistics.fmean(result[key] for result in results) for key in measured}
    return {**mean, **spread, "values": values, "parameters": round(mean["parameters"])}


def percent(result: Mapping[str, Any], metric: str) -> str:
    """A metric, with its spread where there is one."""
    return f"{100 * result[metric]:.1f}" + (f" ± {100 * result['spread']:.1f}" if "spread" in result else "")


def results_table(task: Task, results: Results) -> Table:
    """One row a model: its metric in percent, with its spread over seeds, if there were several, its parameters,
    and how many examples a second it evaluates."""
    table = Table("model", title=task.name)
    for column in (f"{task.metric} %", "parameters", "examples/s"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            percent(result, task.metric),
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
