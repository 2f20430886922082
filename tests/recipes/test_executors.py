"""Trainings one after another, and as tasks of Ray."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate import PartialState
from transformers import TrainerCallback

from fastdistill import LogitsKD
from fastdistill.cli import main
from fastdistill.data.load import load_task
from fastdistill.objectives.base import Objective
from fastdistill.recipes.examples import of_text
from fastdistill.recipes.executors import Local, Ray, Trial
from fastdistill.recipes.executors import ray as tasks_of_ray
from fastdistill.recipes.splits import Splits
from fastdistill.recipes.stages import Stages
from fastdistill.recipes.training import Training
from tests import tiny
from tests.commands import command
from tests.records import done_since, record, written

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@dataclass
class DiesOnce(TrainerCallback):  # type: ignore[misc]
    """As if the process had run out of memory, after the first checkpoint."""

    flag: Path

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        if not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Wrong(Objective):
    """Cannot be computed."""

    def parts(self, student: Any, teacher: Any, labels: Any) -> Any:
        raise ValueError("there is no such loss")


def stages(folder: Path, name: str) -> Stages:
    if not (folder / "task").exists():
        tiny.task_folder(folder / "task", train=48)
    found = load_task(folder / "task")
    splits = Splits(found.task, found.train, found.validation, found.validation, "validation", "validation")
    return Stages(folder / name, of_text(splits, tiny.tokenizer()), batch_size=16, checkpoints=3)


@pytest.mark.slow
def test_ray_trains_what_local_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a process dies; and a run started again repeats nothing."""
    teacher, student = tiny.bert(layers=2), tiny.bert(1, layers=1)

    def trials(name: str, **options: Any) -> list[Trial]:
        begun = stages(tmp_path, name)
        once = Training(
            name="once",
            model=student,
            objective=LogitsKD(),
            teacher=teacher,
            epochs=1,
            learning_rate=0.001,
            batch_size=16,
        )
        return [Trial(begun, replace(once, learning_rate=0.01, **options)), Trial(begun.seeded(3), once)]

    executor = Ray()
    expected = Local()(trials("local"))
    found = executor(trials("ray", callbacks=(DiesOnce(tmp_path / "died"),)))
    assert [one.result["resumed"] for one in found] == [True, False]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.result["accuracy"] == theirs.result["accuracy"]
        assert ours.result["parameters"] == theirs.result["parameters"]
        torch.testing.assert_close(ours.model.state_dict(), theirs.model.state_dict(), rtol=1e-4, atol=1e-5)
    assert len(list((tmp_path / "ray" / "stored").iterdir())) == 1

    before = written(tmp_path / "ray")
    with monkeypatch.context() as patched:  # nothing is sent
        patched.setattr(Ray, "_connect", None)
        again = executor(trials("ray"))
    assert [one.result for one in again] == [one.result for one in found]
    assert not done_since(tmp_path / "ray", before)


@pytest.mark.slow
def test_a_trial_that_fails_tells_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are trained."""
    monkeypatch.setattr(tasks_of_ray, "RETRIES", 0)  # a process more takes seconds
    begun = stages(tmp_path, "ray")
    right = Training(
        name="right",
        model=tiny.bert(layers=1),
        objective=LogitsKD(),
        teacher=tiny.bert(),
        epochs=1,
        learning_rate=0.01,
        batch_size=16,
    )
    trials = [Trial(begun, right), Trial(begun, replace(right, name="wrong", objective=Wrong()))]
    with (
        patch.object(ray, "cancel") as cancelled,
        pytest.raises(ValueError, match="^ray/wrong: there is no such loss"),
    ):
        Ray()(trials)
    assert not cancelled.called  # of what has ended: Ray might take this process down
    assert begun.load("right").result["accuracy"] > 0

    def interrupted(running: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks_of_ray, "_wait_for", interrupted)
    with patch.object(ray, "cancel", wraps=ray.cancel) as cancelled, pytest.raises(KeyboardInterrupt):
        Ray()([Trial(begun, replace(right, name="other", epochs=50))])
    assert cancelled.call_count == 1


@pytest.mark.slow
def test_stark(tmp_path: Path) -> None:
    tiny.task_folder(tmp_path / "task", train=48)
    tiny.model_folder(tmp_path / "encoder", tiny.bert(layers=3, num_attention_heads=4).bert)
    more = ("--student-layers", "1", "--sparsity", "0.5", "--no-plots")
    for executor in ("local", "ray"):
        assert main(command("stark", tmp_path, tmp_path / executor, *more, "--executor", executor)) == 0
    found, expected = (record(tmp_path / executor) for executor in ("ray", "local"))
    for name, one in expected["results"].items():
        assert found["results"][name]["accuracy"] == one["accuracy"]
    for kind, one in expected["sparsities"]["stark"]["0.5"].items():
        if kind != "sparsity":
            assert found["sparsities"]["stark"]["0.5"][kind]["accuracy"] == one["accuracy"]


def test_a_cluster_of_its_own_says_nothing_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def put(value: Any) -> Any:
        calls.append("put")
        raise OSError("store is full")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: calls.append(f"init {options['log_to_driver']}"))
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    monkeypatch.setattr(ray, "put", put)
    once = Training(
        name="once", model=tiny.bert(layers=1), objective=LogitsKD(), teacher=tiny.bert(), epochs=1,
        learning_rate=0.01, batch_size=16,
    )  # fmt: skip
    with pytest.raises(OSError, match="store is full"):
        Ray()([Trial(stages(tmp_path, "ray"), once)])
    gc.collect()
    assert calls == ["init False", "put", "shutdown"]


@pytest.mark.slow
def test_ray_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdistill.recipes.executors.ray.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'fastdistill\[ray\]'"):
        Ray()
    monkeypatch.undo()
    PartialState(cpu=not torch.accelerator.is_available())
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 2)
    with pytest.raises(ValueError, match="started in 2 processes; expected one"):
        Ray()
