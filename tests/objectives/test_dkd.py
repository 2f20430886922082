from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastdistill import DKD, dkd_loss
from tests.training.trained import log, trainer

LABELS = torch.tensor([0, 3, 1, -100, 2, 2])


def outputs(seed: int, classes: int = 4) -> Any:
    logits = torch.randn(6, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return SimpleNamespace(logits=logits.requires_grad_())


STUDENT, TEACHER = outputs(1), outputs(2)


def test_it_is_the_papers_formula() -> None:
    """Equation 7 of Zhao et al. 2022, of one example at a time."""
    rows = []
    for s, t, y in zip(STUDENT.logits, TEACHER.logits, LABELS.tolist(), strict=True):
        if y == -100:
            continue
        p, q = (t / 4).softmax(0), (s / 4).softmax(0)
        others = torch.arange(4) != y
        tckd = p[y] * (p[y] / q[y]).log() + (1 - p[y]) * ((1 - p[y]) / (1 - q[y])).log()
        p, q = p[others] / (1 - p[y]), q[others] / (1 - q[y])
        rows.append(16 * (tckd + 8 * (p * (p / q).log()).sum()) + F.cross_entropy(s, torch.tensor(y)))
    torch.testing.assert_close(DKD()(STUDENT, TEACHER, LABELS), torch.stack(rows).mean())


def test_every_setting_is_handed_on() -> None:
    settings: dict[str, Any] = {
        "alpha": 0.5, "beta": 2.0, "temperature": 3.0, "kd_weight": 0.7, "ce_weight": 0.4, "divergence": "reverse_kl",
        "scale_by_temperature": False, "label_smoothing": 0.2,
    }  # fmt: skip
    found = DKD(**settings)(STUDENT, TEACHER, LABELS)
    torch.testing.assert_close(found, dkd_loss(STUDENT.logits, TEACHER.logits, LABELS, **settings))


@pytest.mark.parametrize(
    "weights",
    [
        {"kd_weight": 0.5, "ce_weight": 2.0, "alpha": 3.0},
        {"ce_weight": 0.0},
        {"kd_weight": 0.0},
        {"alpha": 0.0},
        {"beta": 0.0},
    ],
)
def test_parts_and_summands_add_up(weights: dict[str, float]) -> None:
    objective = DKD(**weights)  # type: ignore[arg-type]
    teacher = TEACHER if objective.kd_weight else None
    loss, parts = objective.parts(STUDENT, teacher, LABELS)
    of = {
        "tckd": objective.kd_weight * objective.alpha,
        "nckd": objective.kd_weight * objective.beta,
        "ce": objective.ce_weight,
    }
    assert parts.keys() == {name for name, weight in of.items() if weight}
    assert not any(part.requires_grad for part in parts.values())
    torch.testing.assert_close(loss.detach(), sum(of[name] * part for name, part in parts.items()))
    summands = objective.summands(STUDENT, teacher, LABELS)
    for name, summand in summands.items():
        torch.testing.assert_close(summand.detach(), of[name] * parts[name])
    grad = torch.autograd.grad(loss, STUDENT.logits)[0]
    each = (torch.autograd.grad(summand, STUDENT.logits)[0] for summand in summands.values())
    torch.testing.assert_close(grad, sum(each))


def test_gradients_reach_the_teacher() -> None:
    DKD()(STUDENT, TEACHER, LABELS).backward()
    assert TEACHER.logits.grad[LABELS != -100].abs().sum(-1).min() > 0
    STUDENT.logits.grad = TEACHER.logits.grad = None


def test_what_it_needs() -> None:
    assert DKD().needs.teacher and DKD().needs.labels and not DKD(kd_weight=0).needs.teacher
    with pytest.raises(ValueError, match="labels is None"):
        DKD(ce_weight=0)(STUDENT, TEACHER, None)
    with pytest.raises(ValueError, match="teacher is None"):
        DKD()(STUDENT, None, LABELS)
    moved = SimpleNamespace(logits=TEACHER.logits + torch.arange(6.0)[:, None])
    torch.testing.assert_close(DKD()(STUDENT, moved, LABELS), DKD()(STUDENT, TEACHER, LABELS))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"alpha": -1.0}, ValueError, "alpha is -1.0"),
        ({"alpha": 0.0, "beta": 0.0}, ValueError, "alpha and beta are both 0"),
        ({"kd_weight": 0.0, "ce_weight": 0.0}, ValueError, "kd_weight and ce_weight are both 0"),
        ({"temperature": 0.0}, ValueError, "temperature is 0"),
        ({"divergence": "kl"}, ValueError, "divergence is 'kl'"),
        ({"scale_by_temperature": 1}, TypeError, "scale_by_temperature is 1"),
        ({"label_smoothing": 0.1, "ce_weight": 0.0}, ValueError, "label_smoothing is 0.1 but ce_weight is 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        DKD(**settings)


def test_a_student_is_trained_by_it(tmp_path: Path) -> None:
    training = trainer(tmp_path, "BertForSequenceClassification", DKD())
    assert len(log(training)) == 2
    for name in ("tckd", "nckd", "ce"):
        assert len([entry for entry in training.state.log_history if name in entry]) == 2
