"""Recipes over two processes, and over one, to compare."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastdistill.cli import main
from tests import commands, tiny
from tests.processes import run_module, start
from tests.records import record, without_times

ONE, TWO = "one", "two"
RECIPES = {
    "kd": ["--student-layers", "1", "--epochs", "2"],
    "stark": [
        "--student-layers", "1", "--sparsity", "0.25", "--selection", "knowledge", "--objective", "pkd",
        "--no-plots",
    ],
    "dekd": ["--student-layers", "1", "--without", "ds,ta,doa", "--no-plots"],
    "autoskd": [
        "--student-layers", "1", "--team", "1,2,3", "--candidates", "2", "--search-epochs", "2",
        "--theta-optimizer", "adam", "--theta-learning-rate", "0.01", "--drop", "1", "--no-plots",
    ],
    "peakd": ["--student-layers", "1"],
}  # fmt: skip
"""Of DeKD the student that is compared selects nothing: which rows of a batch are uncertain, each process says of its
own."""


def command(recipe: str, sources: Path, output: Path) -> list[str]:
    rates = ("--learning-rate", "0.003", "--teacher-learning-rate", "0.003")
    return commands.command(recipe, sources, output / recipe, *rates, "--checkpoints", "1", *RECIPES[recipe])


def run(sources: Path, output: Path, recipes: list[str]) -> None:
    for recipe in recipes:
        assert main(command(recipe, sources, output)) == 0


def make_sources(folder: Path) -> Path:
    tiny.task_folder(folder / "task", train=51, validation=23)
    tiny.model_folder(folder / "encoder", tiny.bert(layers=3, dropout=0.0).bert)
    return folder


@contextmanager
def launched(module: str, *arguments: str) -> Iterator[None]:
    """Two processes that run it meanwhile, told what `torchrun` tells them."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
        server.close()
        said = Path(folder) / "said"
        there = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        two = [
            start(run_module, module, *arguments, said=said, RANK=rank, LOCAL_RANK=rank, **there) for rank in ("0", "1")
        ]
        try:
            yield
            for process in two:
                process.join(timeout=300)
        finally:
            for process in two:
                process.kill()
        assert [process.exitcode for process in two] == [0, 0], said.read_text()


def assert_alike(found: Any, expected: Any, path: str = "") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_alike(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other, path)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3), path
    else:
        assert found == expected, path


def assert_alike_runs(two: Path, one: Path, but: tuple[str, ...] = ()) -> None:
    """Results and models, but for those students."""
    found, expected = (record(folder) for folder in (two, one))
    for said in (found, expected):
        for key in ("settings", "versions"):
            said.pop(key)
        for name in but:
            said["results"].pop(name)
    assert_alike(without_times(found), without_times(expected))
    stages = [path.parent.relative_to(one) for path in one.rglob("stage.json")]
    models = [stage for stage in stages if (one / stage / "model.safetensors").exists() and stage.name not in but]
    assert len(models) >= 3
    for model in models:
        assert_alike_weights(two / model, one / model)


def assert_alike_weights(two: Path, one: Path) -> None:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (two, one))
    for weights in (ours, theirs):
        for name in [name for name in weights if name.endswith("key.bias")]:
            weights.pop(name)  # changes no output: its gradient is rounding alone, which Adam makes steps of
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=5e-4, msg=lambda said: f"{one}: {said}")
