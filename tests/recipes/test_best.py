"""Of a training's epochs the best counts, on examples that are not those that are reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import DataCollatorWithPadding

from fastdistill.objectives.logits import TaskLoss
from fastdistill.recipes import fitting
from fastdistill.recipes.best import BestEpoch
from fastdistill.recipes.examples import Examples
from fastdistill.recipes.predictions import PREDICTIONS, load_predictions
from fastdistill.recipes.stages import Stages
from fastdistill.recipes.training import Trained, Training
from fastdistill.training.trainer import DistillationTrainer
from tests import tiny
from tests.records import without_times


def stages(output: Path, **options: Any) -> Stages:
    splits = (tiny.dataset(48, 1), tiny.dataset(24, 2), tiny.dataset(20, 3))
    return Stages(output, Examples(tiny.TASK, *splits, DataCollatorWithPadding(tiny.tokenizer())), **options)


def training(**options: Any) -> Training:
    """Three steps an epoch, at a rate at which epochs differ."""
    settings: dict[str, Any] = {"epochs": 4, "learning_rate": 0.03, "batch_size": 16}
    return Training(name="student", model=tiny.bert(layers=1), objective=TaskLoss(), **settings | options)


def said(trained: Trained, data: Any) -> torch.Tensor:
    with torch.no_grad():
        model = trained.model.eval()
        return torch.cat([model(torch.tensor([row])).logits for row in data["input_ids"]])


def evaluations(trained: Trained) -> list[dict[str, float]]:
    return [entry for entry in trained.log if "eval_loss" in entry]


@pytest.mark.parametrize("best", ["metric", "loss"])
def test_the_best_epoch_counts(tmp_path: Path, best: Any) -> None:
    kept = stages(tmp_path)
    trained = kept.train(training(best=best))
    of = evaluations(trained)
    assert [one["epoch"] for one in of] == [1, 2, 3, 4]
    by = {"metric": lambda one: (one["eval_accuracy"], -one["eval_loss"]), "loss": lambda one: -one["eval_loss"]}[best]
    expected = max(of, key=by)
    assert trained.result["epoch"] == expected["epoch"]
    assert trained.result["selection"] == expected["eval_accuracy"]
    validation, report = kept.examples.validation, kept.examples.report
    loss = F.cross_entropy(said(trained, validation), torch.tensor(validation["labels"][:]))
    assert loss.item() == pytest.approx(expected["eval_loss"], rel=1e-4)  # they are that epoch's weights
    labels = torch.tensor(report["labels"][:])
    logits = said(trained, report)
    assert trained.result["accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert trained.result["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    kept_labels, outputs = load_predictions(tmp_path / trained.result["stage"] / PREDICTIONS)
    assert kept_labels.tolist() == labels.tolist()
    torch.testing.assert_close(torch.from_numpy(outputs), logits, rtol=1e-4, atol=1e-5)
    assert not list(tmp_path.rglob("unfinished*"))


@pytest.mark.parametrize("epochs", [0, 4])
def test_what_selects_and_is_reported_is_asked_once(
    tmp_path: Path, epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = stages(tmp_path / "apart")
    apart = replace(kept.examples, report=tiny.dataset(24, 2))
    once = replace(kept, examples=replace(apart, report=apart.validation), output=tmp_path / "once", data="")
    expected = replace(kept, examples=apart, data="").train(training(epochs=epochs))
    monkeypatch.setattr(DistillationTrainer, "predict", None)
    found = once.train(training(epochs=epochs))
    for trained in (found, expected):
        trained.result.pop("stage")
    assert without_times(found.result) == without_times(expected.result)
    said = [load_predictions(tmp_path / name / "student" / PREDICTIONS) for name in ("apart", "once")]
    for one, other in zip(*said, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_metric_of_mismatched_examples_is_told_beside(tmp_path: Path) -> None:
    kept = stages(tmp_path)
    examples = replace(kept.examples, mismatched=tiny.dataset(30, 4))
    trained = replace(kept, examples=examples, data="").train(training(epochs=1))
    labels = torch.tensor(examples.mismatched["labels"][:])  # type: ignore[index]
    right = (said(trained, examples.mismatched).argmax(1) == labels).float().mean().item()
    assert trained.result["metrics"]["mismatched_accuracy"] == pytest.approx(right)
    assert trained.result["metrics"]["accuracy"] == trained.result["accuracy"]


def test_a_training_without_a_better_epoch_ends(tmp_path: Path) -> None:
    trained = stages(tmp_path, patience=1).train(training(epochs=12, best="loss"))
    losses = [one["eval_loss"] for one in evaluations(trained)]
    assert len(losses) < 12
    assert losses.index(min(losses)) == len(losses) - 2


def test_patience_is_counted_from_the_best() -> None:
    best = BestEpoch(None, Path(), "accuracy", "metric", 2)  # type: ignore[arg-type]
    log = [{"loss": 0.1}, *({"eval_accuracy": a, "eval_loss": 1.0, "step": s} for s, a in enumerate((0.5, 0.7, 0.7)))]
    assert best.best(log)["step"] == 1  # of equal ones the first
    assert not best.is_over(log)
    assert best.is_over([*log, {"eval_accuracy": 0.6, "eval_loss": 0.5, "step": 3}])
    assert not best.is_over([*log, {"eval_accuracy": 0.7, "eval_loss": 0.5, "step": 3}])


class Cut(BaseException):
    """As a kill would, this passes by every `except Exception`."""


@pytest.mark.parametrize("step", [4, 7, 10, 12])
def test_a_training_that_was_cut_off_has_the_same_best_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Checkpoints are at epochs' ends, before they are evaluated, and the best may be before the last of them."""
    options = {"checkpoints": 3}
    whole = stages(tmp_path / "whole", **options).train(training(best="loss"))

    def cut(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(fitting._ProgressBar, "on_step_begin" if step < 12 else "on_epoch_end", cut, raising=False)
        with pytest.raises(Cut):
            stages(tmp_path / "cut", **options).train(training(best="loss"))
    again = stages(tmp_path / "cut", **options).train(training(best="loss"))
    assert again.result["resumed"]
    assert [one["eval_loss"] for one in evaluations(again)] == [one["eval_loss"] for one in evaluations(whole)]
    torch.testing.assert_close(again.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("checkpoints", "apart", "saved"), [(None, 30.0, 0), (None, 0.0, 4), (1, 30.0, 2), (0, 30.0, 0)]
)
def test_checkpoints_of_a_short_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: int | None, apart: float, saved: int
) -> None:
    """As many as are asked for, with one at its end; where none are, three, but not one after the other at once."""
    steps: list[int] = []
    monkeypatch.setattr(fitting, "CHECKPOINTS_APART", apart)
    monkeypatch.setattr(
        DistillationTrainer, "_save_checkpoint", lambda self, *args: steps.append(self.state.global_step)
    )
    stages(tmp_path, checkpoints=checkpoints).train(training(epochs=4))
    assert len(steps) == saved
