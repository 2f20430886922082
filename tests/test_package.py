"""The package's public names."""

from __future__ import annotations

import ast
import inspect
import tomllib
from pathlib import Path

import fastdistill


def test_every_public_name_is_there() -> None:
    for name in fastdistill.__all__:
        assert getattr(fastdistill, name) is not None


def test_type_checkers_see_what_is_imported_lazily() -> None:
    """The block that they read, against the table that is used."""
    module = ast.parse(inspect.getsource(fastdistill))
    [block] = [node for node in module.body if isinstance(node, ast.If)]
    seen = {name.asname: node.module for node in block.body for name in node.names}  # type: ignore[attr-defined]
    assert seen == {"ops": "fastdistill"} | {name: f"fastdistill.{place}" for name, place in fastdistill._LAZY.items()}


def test_the_lowest_versions_are_tried() -> None:
    """What pyproject.toml allows, `make lowest` installs, but for torch, whose lowest is for GPUs alone."""
    root = Path(__file__).parents[1]
    needed = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    tried = [line.split("==") for line in (root / "constraints-lowest.txt").read_text().splitlines()[2:]]
    for name, lowest in (line.split(">=") for line in needed if not line.startswith("torch>")):
        assert dict(tried)[name].startswith(lowest)
