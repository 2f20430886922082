"""Rates by width, and what students begin as."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill.cli import main
from fastdistill.recipes import KDSettings, fitting
from fastdistill.recipes.begin import begin
from tests import commands, tiny

ENCODER = {"layers": 3}


def command(sources: Path, output: Path, *more: str, task: str = "task", teacher: str = "encoder") -> list[str]:
    """Two epochs of six steps a stage, unless `more` says otherwise."""
    own = ("--student-layers", "1", "--epochs", "2", "--teacher-epochs", "2", "--teacher", str(sources / teacher))
    return commands.command("kd", sources, output, *own, *more, task=task)


@pytest.mark.slow
def test_each_seed_draws_a_head_of_its_own(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for all students of that seed; all else is pretrained."""
    begun: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    compute = fitting.DistillationTrainer.compute_loss

    def watched(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        *_, seed, name = Path(self.args.output_dir).parts
        begun.setdefault((seed, name), {key: value.clone() for key, value in model.state_dict().items()})
        return compute(self, model, *args, **kwargs)

    monkeypatch.setattr(fitting.DistillationTrainer, "compute_loss", watched)
    monkeypatch.setattr(fitting, "can_compact", lambda model: False)
    options = ("--student-from", "pretrained", "--seeds", "3,4", "--epochs", "0.2", "--teacher-epochs", "0.2")
    assert main(command(sources, tmp_path / "run", *options)) == 0
    same = [
        torch.equal(begun["seed-3", "distilled"][name], other) for name, other in begun["seed-4", "distilled"].items()
    ]
    heads = [name.startswith("classifier.weight") for name in begun["seed-4", "distilled"]]
    assert [not head for head in heads] == same
    for seed in ("seed-3", "seed-4"):
        torch.testing.assert_close(begun[seed, "finetuned"], begun[seed, "distilled"], rtol=0, atol=0)


@pytest.mark.parametrize("width, rates", [(16, (3e-4, 1e-4)), (768, (7.5e-5, 2.5e-5))])
def test_wide_encoders_learn_slower(sources: Path, tmp_path: Path, width: int, rates: tuple[float, float]) -> None:
    tiny.model_folder(tmp_path, tiny.bert(layers=1, hidden_size=width).bert)
    asked = KDSettings(task=str(sources / "task"), teacher=str(tmp_path), student_layers=1, output="o")
    found = begin(asked)
    assert (found.learning_rate, found.teacher_learning_rate) == pytest.approx(rates)
    found = begin(replace(asked, learning_rate=0.1))
    assert (found.learning_rate, found.teacher_learning_rate) == pytest.approx((0.1, rates[1]))
    assert asked.learning_rate is None
