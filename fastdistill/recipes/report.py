"""What a run says at its end: a table to read, and results.json for programs."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdistill.files import replacing

if TYPE_CHECKING:
    from rich.table import Table

    from fastdistill.data.tasks import Task

Results = Mapping[str, Mapping[str, Any]]
"""By model: its metric, loss, parameters, examples_per_second, and what else was found. Of several seeds these are
means, and "spread" is the metric's sample standard deviation."""


def finish(
    output: Path, settings: Mapping[str, Any], task: Task, results: Results, seconds: float, *tables: Table, **more: Any
) -> dict[str, Any]:
    """Write `output`/results.json, with `more`, and print the tables, the models' last; returns what the file holds."""
    from accelerate import PartialState  # type: ignore[import-untyped]
    from rich.console import Console

    record = {
        "task": task.name,
        "metric": task.metric,
        "results": results,
        **more,
        "settings": settings,
        "versions": versions(),
        "seconds": round(seconds, 1),
    }
    if PartialState().is_main_process:
        write_json(output / "results.json", record)
        console = Console()
        for table in (*tables, results_table(task, results)):
            console.print(table)
        console.print(f"{seconds:.0f} s; {output / 'results.json'}", highlight=False)
    return record


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
    from rich.table import Table

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
    import torch
    import transformers

    import fastdistill

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
