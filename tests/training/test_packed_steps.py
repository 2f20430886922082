"""Steps that leave padding out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.models import packed
from fastdistill.objectives.base import Needs, Objective
from tests import tiny
from tests.training.trained import bert_trainer


class LastStates(Objective):
    needs = Needs(hidden_states=True)

    def parts(self, student: Any, teacher: Any, labels: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        return F.mse_loss(student.hidden_states[-1], teacher.hidden_states[-1]), {}


def test_a_student_learns_without_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it learns is the same; an objective of hidden states has them."""
    times: list[Any] = []
    inner, worth_packing = packed.packed, packed.worth_packing
    monkeypatch.setattr(packed, "packed", lambda *given: times.append(given[0]) or inner(*given))

    def trained(name: str, **options: Any) -> dict[str, Tensor]:
        times.clear()
        args = {
            "args_max_steps": 4,
            "args_learning_rate": 0.1,
            "args_optim": "sgd",
            "args_train_sampling_strategy": "random",
        }
        t = bert_trainer(tmp_path / name, tiny.bert(1, dropout=0.0), **args, **options)
        t.train()
        return t.model.state_dict()

    found = trained("packed")
    assert [model.config.num_hidden_layers for model in times].count(2) == 4
    monkeypatch.setattr(packed, "worth_packing", lambda mask: False)
    expected = trained("padded")
    assert not times
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    monkeypatch.setattr(packed, "worth_packing", worth_packing)
    trained("states", objective=LastStates(), teacher_model=tiny.bert(2))
    assert not times
