"""Steps that leave padding out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DataCollatorWithPadding

import fastdistill
from fastdistill import PKD, LogitsKD, WeightedSum
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


@pytest.mark.parametrize("stored", [False, True])
def test_first_tokens_states_are_learned_without_padding(
    tmp_path: Path, stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the student's and, where it runs, the teacher's layers."""
    student, teacher = tiny.bert(1, layers=2, dropout=0.0), tiny.bert(2, layers=4)
    found, times, inner = [], [], packed.packed
    monkeypatch.setattr(packed, "packed", lambda *given: times.append(given[0]) or inner(*given))
    data = tiny.dataset(40)
    if stored:
        collate = DataCollatorWithPadding(tiny.tokenizer())
        cache = tmp_path / "stored.arrow"
        data = fastdistill.store(data, teacher, collate=collate, hidden_states=True, cache_file=cache)
    for is_packed in (True, False):
        if not is_packed:
            monkeypatch.setattr(packed, "worth_packing", lambda mask: False)
        times.clear()
        own = copy.deepcopy(student)
        t = bert_trainer(
            tmp_path / str(is_packed), own, teacher_model=None if stored else copy.deepcopy(teacher),
            train_dataset=data, objective=WeightedSum({"pkd": (10.0, PKD()), "kd": (1.0, LogitsKD())}),
            args_max_steps=4, args_optim="sgd", args_learning_rate=0.1, args_train_sampling_strategy="random",
        )  # fmt: skip
        t.train()
        found.append(own.state_dict())
        assert len(times) == (0 if not is_packed else 4 if stored else 8)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
