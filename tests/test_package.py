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


def lines(node: ast.stmt) -> int:
    return (node.end_lineno or 0) - node.lineno + 1


def test_files_and_functions_are_short() -> None:
    """400 lines a file, 60 a function without its docstring; kernels take what they need."""
    root = Path(__file__).parents[1]
    for path in (path for folder in ("fastdistill", "benchmarks", "tests") for path in (root / folder).rglob("*.py")):
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                docstring = lines(node.body[0]) if ast.get_docstring(node) else 0
                assert lines(node) - docstring <= 60, f"{path}: {node.name}"


def test_the_lowest_versions_are_tried() -> None:
    """What pyproject.toml allows, `make lowest` installs; of torch, whose lowest is for GPUs alone, what the package is
    compiled for."""
    root = Path(__file__).parents[1]
    needed = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    known, tried = (
        dict(line.split("==") for line in (root / name).read_text().splitlines() if not line.startswith("#"))
        for name in ("constraints.txt", "constraints-lowest.txt")
    )
    for name, lowest in (line.split(">=") for line in needed if not line.startswith("torch>")):
        assert tried[name].startswith(lowest)
    assert tried["torch"] == known["torch"]
