"""Commands of recipes on what is small enough to train within a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdistill.cli import main


def command(recipe: str, sources: Path, output: Path, *more: str, task: str = "task") -> list[str]:
    """One epoch a stage without checkpoints, unless `more` says otherwise."""
    return [
        recipe, "--task", str(sources / task), "--teacher", str(sources / "encoder"), "--output", str(output),
        "--epochs", "1", "--teacher-epochs", "1", "--batch-size", "16", "--learning-rate", "0.01",
        "--teacher-learning-rate", "0.01", "--select-on", "validation", "--checkpoints", "0", *more,
    ]  # fmt: skip


def kd(sources: Path, output: Path, *more: str, task: str = "task", teacher: str = "encoder") -> list[str]:
    """Two epochs of six steps a stage, unless `more` says otherwise."""
    own = ("--student-layers", "1", "--epochs", "2", "--teacher-epochs", "2", "--teacher", str(sources / teacher))
    return command("kd", sources, output, *own, *more, task=task)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that exits with 2: one line."""
    capsys.readouterr()
    try:
        status: object = main(arguments)
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    return said.err
