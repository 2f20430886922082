"""Trainings side by side: each becomes what it does alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from transformers import TrainerCallback

from fastdistill import MSE, AvgKD, LogitsKD, SampledTeacher, cuda_graphs
from fastdistill.cli import main
from fastdistill.data.load import load_task
from fastdistill.models.stacking import Stack
from fastdistill.objectives.base import Needs, Objective
from fastdistill.objectives.logits import TaskLoss
from fastdistill.objectives.pkd import PKD
from fastdistill.recipes.examples import of_text
from fastdistill.recipes.executors import Local, Stacked, Trial, picked
from fastdistill.recipes.predictions import PREDICTIONS, load_predictions
from fastdistill.recipes.splits import Splits
from fastdistill.recipes.stages import Stages
from fastdistill.recipes.training import Trained, Training
from fastdistill.teachers.team import TeacherTeam
from tests import tiny
from tests.commands import command
from tests.records import done_since, record, without_times, written
from tests.rerun import Rerun

ROUNDING = {"rtol": 1e-6, "atol": 1e-8}
TIMED = ("runtime", "per_second", "flos")


def stages(folder: Path, name: str, *, regression: bool = False, **options: Any) -> Stages:
    if not (folder / "task").exists():
        tiny.task_folder(folder / "task", train=50, regression=regression)  # the last batch is a small one
    found = load_task(folder / "task")
    splits = Splits(found.task, found.train, found.validation, found.validation, "validation", "validation")
    return Stages(folder / name, of_text(splits, tiny.tokenizer()), batch_size=16, **options)


def training(name: str, objective: Objective, **options: Any) -> Training:
    """Of a model in double precision: where there are no gradients but rounding, Adam would make much of it."""
    model = tiny.bert(1, layers=1, dropout=0.0).double()
    settings = {"model": model, "epochs": 6, "learning_rate": 0.01, "batch_size": 16}
    return Training(name=name, objective=objective, **settings | options)


def compare(folder: Path, trials: Callable[[str], list[Trial]]) -> list[tuple[Trained, Trained]]:
    """Side by side and one after another; checks that results, logs, models and predictions are the same."""
    pairs = list(zip(Stacked()(trials("stacked")), Local()(trials("local")), strict=True))
    for found, expected in pairs:
        assert close(without_times(found.result), without_times(expected.result))
        assert close(untimed(found.log), untimed(expected.log))
        torch.testing.assert_close(found.model.state_dict(), expected.model.state_dict(), **ROUNDING)
        said = [
            load_predictions(folder / name / one.result["stage"] / PREDICTIONS)[1]
            for name, one in (("stacked", found), ("local", expected))
        ]
        np.testing.assert_allclose(*said, rtol=1e-5, atol=1e-6)
    return pairs


def untimed(log: list[dict[str, float]]) -> Any:
    return [{name: value for name, value in entry.items() if not name.endswith(TIMED)} for entry in log]


def close(found: Any, expected: Any) -> bool:
    """The same but for the rounding of numbers."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    return bool(found == (pytest.approx(expected, rel=1e-6) if isinstance(expected, float) else expected))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Rerun:
    rerun = Rerun()
    monkeypatch.setattr(cuda_graphs, "capturing", lambda device: rerun)
    return rerun


@pytest.mark.slow
@pytest.mark.parametrize("by_graphs", [False, True])
def test_what_local_does(tmp_path: Path, capsys: pytest.CaptureFixture[str], graphs: Rerun, by_graphs: bool) -> None:
    """With other seeds, rates, teachers, objectives and runs, that end after other epochs."""
    teachers = [tiny.bert(seed, layers=2) for seed in (5, 6)]

    def trials(name: str) -> list[Trial]:
        begun = stages(tmp_path, name, patience=1, cuda_graphs=by_graphs and name == "stacked")
        kd = training("kd", LogitsKD(), teacher=teachers[0])
        weak = LogitsKD(kd_weight=0.3, temperature=1.0, divergence="reverse_kl", label_smoothing=0.1)
        other = replace(kd, name="other", objective=weak, teacher=teachers[1], learning_rate=0.1, best="loss")
        alone = replace(kd, name="alone", objective=TaskLoss(), teacher=None, learning_rate=0.002, run=1)
        return [Trial(begun.seeded(3), kd), Trial(begun.seeded(4), other), Trial(begun.seeded(4), alone)]

    pairs = compare(tmp_path, trials)
    said = capsys.readouterr().err
    assert "3 side by side: kd, other, alone" in said
    assert "no CUDA graphs" not in said
    assert (graphs.replayed > 0) == by_graphs
    assert len({found.log[-1]["epoch"] for found, _ in pairs}) > 1
    assert not list((tmp_path / "stacked").rglob("checkpoint-*"))


@pytest.mark.slow
def test_teams_and_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Objectives of several stored teachers, one of which draws; and of one output."""
    team = TeacherTeam({f"teacher{seed}": tiny.bert(seed, layers=2) for seed in (5, 6)})
    names = ("teacher5", "teacher6")

    def of_team(name: str) -> list[Trial]:
        begun = stages(tmp_path, name).with_team(team)
        drawn = SampledTeacher(dict(zip(names, (0.3, 0.7), strict=True)), seed=2)
        both = [training("drawn", drawn, epochs=2), training("mean", AvgKD(names), epochs=2)]
        return [Trial(begun, one) for one in both]

    def of_scores(name: str) -> list[Trial]:
        begun = stages(tmp_path / "scores", name, regression=True)
        model = tiny.bert(1, layers=1, dropout=0.0, num_labels=1).double()
        teacher = tiny.bert(3, num_labels=1)
        both = [training(f"{rate:g}", MSE(), teacher=teacher, model=model, learning_rate=rate) for rate in (0.01, 0.02)]
        return [Trial(begun, one) for one in both]

    compare(tmp_path, of_team)
    compare(tmp_path / "scores", of_scores)
    said = capsys.readouterr().err
    assert "2 side by side: drawn, mean" in said
    assert "2 side by side: 0.01, 0.02" in said


@pytest.mark.slow
def test_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in bfloat16, weights and losses not: but for its rounding, what `Local` has."""
    pairs, dtypes, call = [], set(), Stack.__call__

    def noted(self: Stack, **features: Any) -> Any:
        found = call(self, **features)
        dtypes.add(found.logits.dtype)
        return found

    monkeypatch.setattr(Stack, "__call__", noted)
    for executor in (Stacked(), Local()):
        begun = stages(tmp_path, type(executor).__name__, bf16=True)
        model = tiny.bert(1, layers=2, dropout=0.0)
        one = training("one", LogitsKD(), teacher=tiny.bert(5), model=model, epochs=2, learning_rate=0.001)
        pairs.append(executor([Trial(begun.seeded(seed), one) for seed in (3, 4)]))
    for found, expected in zip(*pairs, strict=True):
        losses = [[entry["loss"] for entry in one.log if "loss" in entry] for one in (found, expected)]
        np.testing.assert_allclose(*losses, rtol=0.03)
        assert {weight.dtype for weight in found.model.parameters()} == {torch.float32}
    assert dtypes == {torch.bfloat16}


@pytest.mark.slow
def test_what_cannot_be_side_by_side_is_trained_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is told why."""
    teacher = tiny.bert(5, layers=2)
    wide = tiny.bert(1, layers=1, intermediate_size=24)
    begun = stages(tmp_path, "stacked")
    others = [
        training("hidden", PKD(pairs=((1, 1),)), teacher=teacher, model=tiny.bert(layers=1)),
        training("function", Function(), teacher=teacher),
        training("evaluated", TaskLoss(), epochs=0),
        training("wide", TaskLoss(), model=wide),
        training("batch", TaskLoss(), batch_size=8),
    ]
    both = [training(name, TaskLoss(), epochs=1) for name in ("first", "second")]
    short = [replace(one, epochs=min(one.epochs, 1)) for one in others]
    found = Stacked()([Trial(begun, one) for one in (*short[:2], *both, *short[2:])])
    assert [one.result["stage"] for one in found] == [
        "hidden", "function", "first", "second", "evaluated", "wide", "batch"
    ]  # fmt: skip
    said = capsys.readouterr().err
    assert "hidden: trained by itself: objective PKD(" in said
    assert "is not of logits alone" in said
    assert "function: trained by itself: what its teacher says to objective Function() is not stored" in said
    assert "evaluated: trained by itself: it is evaluated only" in said
    assert "wide: trained by itself: no other is of its shape" in said
    assert "batch: trained by itself: no other is of its shape" in said
    assert "2 side by side: first, second" in said

    monkeypatch.setattr("fastdistill.recipes.executors.stacked.TOGETHER", 2)
    Stacked()([Trial(begun, training(f"{place}", TaskLoss(), epochs=1)) for place in range(4)])
    said = capsys.readouterr().err
    assert "2 side by side: 0, 2" in said
    assert "2 side by side: 1, 3" in said

    PartialState(cpu=not torch.accelerator.is_available())
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 2)
    with pytest.raises(ValueError, match="started in 2 processes; expected one"):
        Stacked()


class Cut(BaseException):
    """As a kill would, this passes by every `except Exception`."""


@dataclass
class CutOnce(TrainerCallback):  # type: ignore[misc]
    """In this training alone, before the step after this one."""

    seed: int
    step: int
    flag: Path

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.seed == self.seed and state.global_step == self.step and not self.flag.exists():
            self.flag.touch()
            raise Cut


@pytest.mark.slow
def test_what_was_cut_off_goes_on(tmp_path: Path) -> None:
    """From each one's checkpoint, of dropout's numbers, too; one that was done is not done again."""

    def trials(name: str, step: int) -> list[Trial]:
        begun = stages(tmp_path, name, checkpoints=3)
        cut = (CutOnce(4, step, tmp_path / f"{name}-{step}"),)
        one = training("one", LogitsKD(), teacher=tiny.bert(5), model=tiny.bert(1, layers=1, dropout=0.2).double())
        return [Trial(begun.seeded(seed), replace(one, callbacks=cut)) for seed in (3, 4, 5)]

    (tmp_path / "whole-0").touch()
    whole = Stacked()(trials("whole", 0))
    with pytest.raises(Cut):
        Stacked()(trials("cut", 14))
    again = Stacked()(trials("cut", 14))
    assert all(one.result["resumed"] for one in again)
    for found, expected in zip(again, whole, strict=True):
        torch.testing.assert_close(found.model.state_dict(), expected.model.state_dict(), rtol=0, atol=0)
    before = written(tmp_path / "cut")
    Stacked()(trials("cut", 14))
    assert not done_since(tmp_path / "cut", before)


@pytest.mark.slow
def test_another_executor_goes_on(tmp_path: Path) -> None:
    """Checkpoints are any trainer's; and students at other steps are side by side all the same."""

    def trials(name: str) -> list[Trial]:
        begun = stages(tmp_path, name, checkpoints=3)
        one = training("one", LogitsKD(), teacher=tiny.bert(5), callbacks=(CutOnce(4, 14, tmp_path / f"{name}-cut"),))
        return [Trial(begun.seeded(seed), one) for seed in (4, 5)]

    for name, (first, second) in {"a": (Local(), Stacked()), "b": (Stacked(), Local())}.items():
        with pytest.raises(Cut):
            first(trials(name))
        found = second(trials(name))
        assert found[0].result["resumed"]
        (tmp_path / "whole-cut").touch()
        for ours, theirs in zip(found, Local()(trials("whole")), strict=True):
            torch.testing.assert_close(ours.model.state_dict(), theirs.model.state_dict(), **ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["kd", "stark"])
def test_recipes(tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.task_folder(tmp_path / "task", train=48)
    encoder = tiny.bert(layers=3, num_attention_heads=4, dropout=0.0).double()
    tiny.model_folder(tmp_path / "encoder", encoder.bert)
    own = {"kd": ["--seeds", "0,1", "--baselines"], "stark": ["--sparsity", "0.2,0.5", "--no-plots"]}
    more = ["--student-layers", "1", "--learning-rate-grid", "0.01,0.02", *own[recipe]]
    arguments = command(recipe, tmp_path, tmp_path / "OUTPUT", *more)
    at = arguments.index("--learning-rate")
    del arguments[at : at + 2]
    for executor in ("local", "stacked"):
        there = [argument.replace("OUTPUT", executor) for argument in arguments]
        assert main([*there, "--executor", executor]) == 0
    assert "side by side: " in capsys.readouterr().err
    found, expected = (record(tmp_path / executor) for executor in ("stacked", "local"))
    for one in (found, expected):
        for key in ("executor", "output"):
            one["settings" if "settings" in one else "record"].pop(key, None)
    assert close(without_times(found), without_times(expected))


def test_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    assert picked() == ("local", "there is no GPU, and a CPU gains nothing by training students side by side")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert picked()[0] == "stacked"
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 2)
    assert picked() == ("local", "several processes share each training")


@dataclass(frozen=True)
class Function(Objective):
    """Of a teacher's outputs, of which it does not say which."""

    def parts(self, student: Any, teacher: Any, labels: Any) -> Any:
        return (student.logits - teacher.logits).square().mean(), {}

    @property
    def needs(self) -> Needs:
        return Needs(all_tokens=False)
