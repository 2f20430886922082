"""What a run says at its end: a table to read, and results.json for programs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from fastdistill.tasks import Task

Results = Mapping[str, Mapping[str, Any]]
"""By model: its metric, loss, parameters, examples_per_second, and what else was found. Of several seeds these are
means, and "spread" is the metric's sample standard deviation."""


def finish(output: Path, settings: Mapping[str, Any], task: Task, results: Results, seconds: float) -> dict[str, Any]:
    """Write `output`/results.json and print the table; returns what the file holds."""
    from accelerate import PartialState  # type: ignore[import-untyped]
    from rich.console import Console

    record = {
        "task": task.name,
        "metric": task.metric,
        "results": results,
        "settings": settings,
        "versions": versions(),
        "seconds": round(seconds, 1),
    }
    if PartialState().is_main_process:
        write_json(output / "results.json", record)
        console = Console()
        console.print(results_table(task, results))
        console.print(f"{seconds:.0f} s; {output / 'results.json'}", highlight=False)
    return record


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
            f"{100 * result[task.metric]:.1f}" + (f" ± {100 * result['spread']:.1f}" if "spread" in result else ""),
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2, default=str) + "\n")
    os.replace(temporary, path)
