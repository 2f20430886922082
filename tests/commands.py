"""Commands of recipes on what is small enough to train within a test."""

from __future__ import annotations

from pathlib import Path


def command(recipe: str, sources: Path, output: Path, *more: str, task: str = "task") -> list[str]:
    """One epoch a stage, unless `more` says otherwise."""
    return [
        recipe, "--task", str(sources / task), "--teacher", str(sources / "encoder"), "--output", str(output),
        "--epochs", "1", "--teacher-epochs", "1", "--batch-size", "16", "--learning-rate", "0.01",
        "--teacher-learning-rate", "0.01", *more,
    ]  # fmt: skip
