"""Seeds, baselines and chains beside a method."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdistill.cli import main
from tests import commands
from tests.records import record

ENCODER = {"layers": 3}


@pytest.mark.slow
def test_more_is_compared(sources: Path, tmp_path: Path) -> None:
    """Every seed in a folder of its own; plain distillation at its default is the method itself, and trained once."""
    more = ("--seeds", "0,7", "--baselines", "--chain", "3,2,1", "--epochs", "1")
    assert main(commands.kd(sources, tmp_path, *more)) == 0
    found = record(tmp_path)["results"]
    assert list(found) == ["teacher", "assistant-2", "finetuned", "takd", "distilled", "kd"]
    assert found["kd"] == found["distilled"]
    assert all(len(found[name]["values"]) == 2 for name in ("finetuned", "takd", "distilled"))
    for seed in (0, 7):
        assert {path.name for path in (tmp_path / f"seed-{seed}").iterdir()} == {"finetuned", "takd", "distilled"}
    assert main(commands.kd(sources, tmp_path / "hot", "--baselines", "--kd-temperature", "5", "--epochs", "1")) == 0
    assert {"kd", "distilled"} < {path.name for path in (tmp_path / "hot").iterdir()}
