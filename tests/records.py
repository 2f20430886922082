"""What recipes write, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TIMES = ("seconds", "examples_per_second", "trained_examples_per_second", "peak_memory", "resumed")


def record(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "results.json").read_text()))


def untimed(output: Path, *keys: str) -> Any:
    """These parts of a record, without what differs from run to run: times and memory."""
    return without_times({key: record(output)[key] for key in keys})


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return value


def written(run: Path) -> dict[Path, int]:
    """When each stage was done."""
    return {marker: marker.stat().st_mtime_ns for marker in run.rglob("stage.json")}


def done_since(run: Path, before: dict[Path, int]) -> set[str]:
    """The names of stages that were not there before, or have been done again."""
    return {marker.parent.name for marker, time in written(run).items() if before.get(marker) != time}
