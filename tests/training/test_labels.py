"""Labels that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill import (
    MSE,
    DistillationTrainer,
    LogitsKD,
)
from fastdistill.objectives.logits import TaskLoss
from tests import heads, tiny
from tests.training.trained import log, trainer


def test_a_label_that_is_nan_is_unlabelled(tmp_path: Path) -> None:
    data = tiny.dataset(8, regression=True)
    labels = [float("nan"), *data["labels"][1:]]
    states = []
    for kept in (data.remove_columns("labels").add_column("labels", labels), data.select(range(1, 8))):
        options = {"args": tiny.config(tmp_path, max_steps=1, logging_steps=1, optim="sgd")}
        options |= {"processing_class": tiny.tokenizer()}
        models = (tiny.bert(seed, num_labels=1, dropout=0.0) for seed in (1, 2))
        t = DistillationTrainer(next(models), teacher_model=next(models), train_dataset=kept, **options)
        states.append((log(t), t.model.state_dict()))
    assert states[0][0] == pytest.approx(states[1][0], rel=1e-5)
    torch.testing.assert_close(states[0][1], states[1][1], rtol=1e-4, atol=1e-6)


def test_without_any_label_a_regression_teaches_nothing() -> None:
    logits = torch.randn(3, 1, requires_grad=True)
    outputs = type("Outputs", (), {"logits": logits})
    loss = MSE()(outputs, outputs, torch.full((3,), torch.nan))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None and logits.grad.eq(0).all()


@pytest.mark.parametrize("objective", [LogitsKD(), LogitsKD(ce_weight=0.0), TaskLoss()])
@pytest.mark.parametrize("wrong", [2, -1])
def test_a_label_that_is_no_class_is_an_error_that_names_the_row(tmp_path: Path, objective: Any, wrong: int) -> None:
    """Found in the collator: on every device before it is there, and before weights change."""
    data = tiny.dataset(8)
    labels = [*data["labels"][:5], wrong, *data["labels"][6:]]
    data = data.remove_columns("labels").add_column("labels", labels)
    t = DistillationTrainer(
        tiny.bert(1),
        teacher_model=tiny.bert(2) if objective.needs.teacher else None,
        objective=objective,
        train_dataset=data,
        eval_dataset=data,
        args=tiny.config(tmp_path, max_steps=1),
        processing_class=tiny.tokenizer(),
    )
    message = f"row 5 of the dataset: labels holds {wrong}; expected 0 <= label < 2, or -100"
    with pytest.raises(ValueError, match=message):
        t.train()
    torch.testing.assert_close(t.model.state_dict(), tiny.bert(1).state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=message):
        t.evaluate()


def test_a_token_that_is_no_class_is_an_error(tmp_path: Path) -> None:
    rows = heads.rows("BertForTokenClassification", 4)
    rows[2]["labels"][1] = 5
    t = trainer(tmp_path, "BertForTokenClassification", train_dataset=rows)
    with pytest.raises(ValueError, match="row 2 of the dataset: labels holds 5; expected 0 <= label < 5, or -100"):
        t.train()
