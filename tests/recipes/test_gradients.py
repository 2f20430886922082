from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithPadding

from fastdistill import MSE, PKD, AvgKD, DeKD, LogitsKD, SampledTeacher, WeightedSum
from fastdistill.objectives.base import Objective
from fastdistill.objectives.logits import TaskLoss
from fastdistill.recipes.gradients import gradient_norms, gradients_table
from fastdistill.recipes.training import Training
from tests import tiny

KD, CE = LogitsKD(temperature=5.0, ce_weight=0.0), TaskLoss()


def outputs(seed: int, layers: int, classes: int = 4) -> Any:
    draw = torch.Generator().manual_seed(seed)
    states = tuple(torch.randn(6, 3, 8, generator=draw, dtype=torch.float64) for _ in range(layers + 1))
    return SimpleNamespace(logits=torch.randn(6, classes, generator=draw, dtype=torch.float64), hidden_states=states)


@pytest.mark.parametrize(
    "objective, names",
    [
        (TaskLoss(), ["loss"]),
        (LogitsKD(kd_weight=0.3, ce_weight=0.7, label_smoothing=0.1), ["kd", "ce"]),
        (LogitsKD(ce_weight=0.0), ["kd"]),
        (WeightedSum({"logits": (2.0, LogitsKD()), "pkd": (100.0, PKD())}), ["logits/kd", "logits/ce", "pkd"]),
        (DeKD(assistant=False), ["ce", "ta", "da"]),
        (DeKD(), ["ce", "ta", "da"]),
        (DeKD(da_weight=0.0), ["ce", "ta"]),
    ],
)
def test_an_objective_is_the_sum_of_its_terms(objective: Objective, names: list[str]) -> None:
    student, labels = outputs(1, 2), torch.tensor([0, 3, 1, 2, 2, 0])
    teacher = outputs(2, 4)
    given = {"teacher": teacher, "assistant": outputs(3, 3)} if objective.needs.teachers else teacher
    terms = objective.summands(student, given, labels)
    assert list(terms) == names
    torch.testing.assert_close(sum(terms.values()), objective(student, given, labels))


def test_so_is_one_for_scores() -> None:
    student, teacher, labels = outputs(1, 1, 1), outputs(2, 1, 1), torch.rand(6).double()
    terms = MSE(kd_weight=0.5, label_weight=2.0).summands(student, teacher, labels)
    assert list(terms) == ["kd", "label"]
    torch.testing.assert_close(sum(terms.values()), MSE(0.5, 2.0)(student, teacher, labels))


def training(objective: Any, **options: Any) -> Training:
    teacher = tiny.bert(2, layers=3, hidden_size=32)
    settings: dict[str, Any] = {"epochs": 1, "learning_rate": 0.01, "batch_size": 12, "teacher": teacher}
    student = tiny.bert(1, hidden_size=32)
    return Training(name="student", model=student, objective=objective, **settings | options)


def norms(objective: Any, **options: Any) -> dict[str, float]:
    collate = DataCollatorWithPadding(tiny.tokenizer())
    found = gradient_norms(training(objective, **options), tiny.dataset(20), collate)
    return {name: one["gradient"] for name, one in found.items()}


def by_hand(objective: Any, weight: float = 1.0) -> float:
    """Of the weighted loss of the first twelve examples, without dropout."""
    asked = training(CE)
    rows = tiny.dataset(20).select(range(12))
    batch = tiny.tokenizer().pad(rows.select_columns(["input_ids", "attention_mask"])[:], return_tensors="pt")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "output_hidden_states": True}
    student, teacher = asked.model.eval(), asked.teacher.eval()  # type: ignore[union-attr]
    with torch.no_grad():
        theirs = teacher(**inputs)
    loss = weight * objective(student(**inputs), theirs, torch.tensor(rows["labels"][:]))
    loss.backward()
    return sum(p.grad.double().square().sum().item() for p in student.parameters() if p.grad is not None) ** 0.5


def test_norms_are_those_of_each_weighted_term() -> None:
    found = norms(WeightedSum({"ce": (0.3, CE), "kd": (0.7, KD), "pkd": (100.0, PKD())}))
    expected = {"ce": by_hand(CE, 0.3), "kd": by_hand(KD, 0.7), "pkd": by_hand(PKD(), 100.0)}
    assert found == pytest.approx(expected, rel=1e-4)


def test_pkd_was_as_many_times_too_strong_as_the_hidden_size() -> None:
    mean, total = (norms(WeightedSum({"pkd": (100.0, PKD(over=over))}))["pkd"] for over in ("mean", "sum"))
    assert total == pytest.approx(32 * mean, rel=1e-4)


def test_without_the_temperatures_square_teachers_hardly_teach() -> None:
    """DeKD's default is the one of the four under which no term is invisible beside the labels'."""
    teachers = {"teacher": tiny.bert(2, layers=3, hidden_size=32), "assistant": tiny.bert(3, hidden_size=32)}
    shares = {
        (scaled, over): norms(DeKD(scale_by_temperature=scaled, over_layers=over), teacher=teachers)
        for scaled in (True, False)
        for over in ("sum", "mean")
    }
    for over in ("sum", "mean"):
        assert shares[True, over]["ta"] == pytest.approx(25 * shares[False, over]["ta"], rel=1e-4)
    for scaled in (True, False):
        assert shares[scaled, "sum"]["da"] == pytest.approx(2 * shares[scaled, "mean"]["da"], rel=0.5)
    default = norms(DeKD(), teacher=teachers)
    assert default == shares[True, "sum"]
    assert min(default["ta"], default["da"]) > 0.05 * default["ce"]


def test_of_stored_teachers_too() -> None:
    """As autoskd has them: no model runs."""
    data = tiny.dataset(20).add_column("a_logits", [[1.0, -1.0]] * 20).add_column("b_logits", [[-2.0, 1.0]] * 20)
    for objective in (AvgKD(("a", "b")), SampledTeacher({"a": 0.5, "b": 0.5})):
        asked = training(objective, teacher=None)
        found = gradient_norms(asked, data, DataCollatorWithPadding(tiny.tokenizer()))
        assert found["loss"]["gradient"] > 0
    one = gradient_norms(training(AvgKD(("a",)), teacher=None), data, DataCollatorWithPadding(tiny.tokenizer()))
    target = torch.tensor([[1.0, -1.0]] * 12)

    def soft_ce(student: Any, teacher: Any, labels: Any) -> Any:
        return -(target.softmax(-1) * student.logits.log_softmax(-1)).sum(-1).mean()

    assert one["loss"]["gradient"] == pytest.approx(by_hand(soft_ce), rel=1e-4)


def test_what_is_measured_changes_nothing() -> None:
    asked = training(DeKD(assistant=False, select_per="epoch", da_weight=0.0))
    before = {name: value.clone() for name, value in asked.model.state_dict().items()}
    found = gradient_norms(replace(asked), tiny.dataset(20), DataCollatorWithPadding(tiny.tokenizer()))
    assert list(found) == ["ce", "ta"]
    torch.testing.assert_close(asked.model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None and p.requires_grad for p in asked.model.parameters())
    table = gradients_table({"student": found})
    assert table.row_count == 2
