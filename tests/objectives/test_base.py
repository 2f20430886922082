from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

from fastdistill import PKD, TeacherOutputs
from fastdistill.objectives import logits
from fastdistill.objectives.base import Needs, Objective, WeightedSum, as_objective
from fastdistill.objectives.logits import MSE, LogitsKD, TaskLoss
from fastdistill.ops import kd_ce_loss


def outputs(*shape: int, seed: int = 0, grad: bool = False) -> SimpleNamespace:
    logits = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return SimpleNamespace(logits=logits.requires_grad_(grad))


STUDENT, TEACHER = outputs(6, 4, seed=1), outputs(6, 4, seed=2)
LABELS = torch.tensor([0, 3, 1, -100, 2, 2])


def test_logits_kd_is_the_papers_formula() -> None:
    labels = LABELS.clamp(min=0)
    p = (TEACHER.logits / 2).softmax(-1)
    kl = (p * ((TEACHER.logits / 2).log_softmax(-1) - (STUDENT.logits / 2).log_softmax(-1))).sum(-1).mean()
    expected = 4 * kl + F.cross_entropy(STUDENT.logits, labels)
    torch.testing.assert_close(LogitsKD()(STUDENT, TEACHER, labels), expected)


@pytest.mark.parametrize("divergence", ["forward_kl", "soft_ce", "reverse_kl"])
def test_logits_kd_hands_every_setting_on(divergence: Any) -> None:
    settings: dict[str, Any] = {
        "temperature": 3.0,
        "kd_weight": 0.7,
        "ce_weight": 0.4,
        "divergence": divergence,
        "scale_by_temperature": False,
        "label_smoothing": 0.2,
    }
    found = LogitsKD(**settings)(STUDENT, TEACHER, LABELS)
    torch.testing.assert_close(found, kd_ce_loss(STUDENT.logits, TEACHER.logits, LABELS, **settings))


def test_gradients_reach_student_and_teacher() -> None:
    student, teacher = outputs(5, 3, seed=1, grad=True), outputs(5, 3, seed=2, grad=True)
    LogitsKD(divergence="soft_ce")(student, teacher, torch.tensor([0, 1, 2, 0, 1])).backward()
    assert student.logits.grad.abs().sum() > 0
    assert teacher.logits.grad.abs().sum() > 0


@pytest.mark.parametrize("kd_weight, ce_weight", [(1.0, 1.0), (0.3, 2.0), (2.0, 0.0), (0.0, 0.5)])
def test_the_parts_of_logits_kd_add_up(kd_weight: float, ce_weight: float) -> None:
    student = outputs(6, 4, seed=1, grad=True)
    objective = LogitsKD(kd_weight=kd_weight, ce_weight=ce_weight, temperature=3)
    loss, parts = objective.parts(student, TEACHER if kd_weight else None, LABELS)
    weights = {name: weight for name, weight in (("kd", kd_weight), ("ce", ce_weight)) if weight}
    assert parts.keys() == weights.keys()
    assert not any(part.requires_grad for part in parts.values())
    torch.testing.assert_close(loss.detach(), sum(weights[name] * parts[name] for name in weights))
    if ce_weight:
        torch.testing.assert_close(parts["ce"], F.cross_entropy(STUDENT.logits, LABELS))


def test_the_logits_are_swept_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(logits, "kd_ce_loss", lambda *a, **options: calls.append(1) or kd_ce_loss(*a, **options))
    LogitsKD().parts(STUDENT, TEACHER, LABELS)
    assert len(calls) == 1


def test_logits_kd_needs_what_its_weights_ask_for() -> None:
    assert LogitsKD().needs.teacher
    assert not LogitsKD(kd_weight=0).needs.teacher
    unlabelled = LogitsKD(ce_weight=0)(STUDENT, TEACHER, None)
    torch.testing.assert_close(unlabelled, kd_ce_loss(STUDENT.logits, TEACHER.logits, temperature=2.0))
    with pytest.raises(ValueError, match="labels is None"):
        LogitsKD()(STUDENT, TEACHER, None)
    with pytest.raises(ValueError, match="teacher is None"):
        LogitsKD()(STUDENT, None, LABELS)


def test_mse() -> None:
    student, teacher = outputs(5, 1, seed=1, grad=True), outputs(5, 1, seed=2)
    labels = torch.tensor([0.0, 1, 2, 3, 4])
    z_s, z_t = student.logits.squeeze(-1), teacher.logits.squeeze(-1)
    loss, parts = MSE(kd_weight=0.5, label_weight=2)(student, teacher, labels), MSE().parts(student, teacher, labels)[1]
    torch.testing.assert_close(loss, 0.5 * (z_s - z_t).square().mean() + 2 * (z_s - labels).square().mean())
    torch.testing.assert_close(parts["kd"], (z_s - z_t).square().mean().detach())
    torch.testing.assert_close(parts["label"], (z_s - labels).square().mean().detach())

    assert MSE(label_weight=0).parts(student, teacher, None)[1].keys() == {"kd"}
    assert MSE(kd_weight=0).parts(student, None, labels)[1].keys() == {"label"}
    assert not MSE(kd_weight=0).needs.teacher
    with pytest.raises(ValueError, match="labels is None"):
        MSE()(student, teacher, None)
    with pytest.raises(ValueError, match="teacher is None"):
        MSE()(student, None, labels)
    with pytest.raises(ValueError, match=r"labels has shape \(5, 1\); expected \(5,\)"):
        MSE()(student, teacher, labels[:, None])
    with pytest.raises(ValueError, match=r"student.logits has shape \(6, 4\)"):
        MSE()(STUDENT, teacher, labels)
    with pytest.raises(ValueError, match=r"teacher.logits has shape \(6, 4\)"):
        MSE()(student, TEACHER, labels)


def test_low_precision_squared_errors_are_computed_in_float32() -> None:
    student = SimpleNamespace(logits=torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16))
    loss = MSE(kd_weight=0)(student, None, torch.tensor([255.0, 1.5]))  # 255 is no bfloat16 near 256
    assert loss.dtype == torch.float32
    assert loss.item() == (1 + 0.25) / 2


def test_task_loss() -> None:
    smooth = F.cross_entropy(STUDENT.logits, LABELS, label_smoothing=0.1)
    torch.testing.assert_close(TaskLoss()(STUDENT, None, LABELS), F.cross_entropy(STUDENT.logits, LABELS))
    torch.testing.assert_close(TaskLoss(label_smoothing=0.1)(STUDENT, None, LABELS), smooth)
    score, scores = outputs(6, 1), torch.arange(6.0)
    torch.testing.assert_close(TaskLoss()(score, None, scores), (score.logits.squeeze(-1) - scores).square().mean())
    assert not TaskLoss().needs.teacher
    with pytest.raises(ValueError, match="label_smoothing is 0.1 but the student has one output"):
        TaskLoss(label_smoothing=0.1)(score, None, scores)
    with pytest.raises(ValueError, match="labels is None"):
        TaskLoss()(STUDENT, None, None)


@dataclass(frozen=True)
class Hidden(Objective):
    """A loss on hidden states, as PKD's is."""

    @property
    def needs(self) -> Needs:
        return Needs(hidden_states=True)

    def parts(self, student: Any, teacher: Any, labels: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        return F.mse_loss(student.hidden_states[-1], teacher.hidden_states[-1]), {}


class Fails(Objective):
    def parts(self, student: Any, teacher: Any, labels: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        raise AssertionError("a term of weight 0 was computed")


def squared_logits(student: Any, teacher: Any, labels: Tensor | None) -> Tensor:
    return F.mse_loss(student.logits, teacher.logits)


def test_weighted_sum() -> None:
    objective = WeightedSum({"task": (0.5, TaskLoss()), "squared": (3, squared_logits), "off": (0, Fails())})
    student = outputs(6, 4, seed=1, grad=True)
    loss, parts = objective.parts(student, TEACHER, LABELS)
    expected = {"task": F.cross_entropy(STUDENT.logits, LABELS), "squared": F.mse_loss(STUDENT.logits, TEACHER.logits)}
    assert parts.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value)
        assert not parts[name].requires_grad
    torch.testing.assert_close(loss, 0.5 * expected["task"] + 3 * expected["squared"])
    loss.backward()
    assert student.logits.grad is not None


def test_weighted_sum_needs_what_its_terms_need() -> None:
    assert not WeightedSum({"ce": (1, TaskLoss())}).needs.teacher
    assert WeightedSum({"ce": (1, TaskLoss()), "kd": (1, LogitsKD())}).needs.teacher
    assert not WeightedSum({"ce": (1, TaskLoss()), "kd": (0, LogitsKD())}).needs.teacher
    assert WeightedSum({"kd": (1, LogitsKD()), "pkd": (1, Hidden())}).needs.hidden_states
    assert not WeightedSum({"kd": (1, LogitsKD()), "pkd": (0, Hidden())}).needs.hidden_states
    assert WeightedSum({"ce": (1, TaskLoss()), "kd": (1, LogitsKD())}).needs.problem == "classification"
    assert WeightedSum({"ce": (1, TaskLoss())}).needs.problem is None


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: LogitsKD(temperature=0), ValueError, "temperature is 0"),
        (lambda: LogitsKD(temperature=float("inf")), ValueError, "temperature is inf"),
        (lambda: LogitsKD(temperature="2"), TypeError, "temperature is '2'"),
        (lambda: LogitsKD(kd_weight=-1), ValueError, "kd_weight is -1"),
        (lambda: LogitsKD(ce_weight=float("nan")), ValueError, "ce_weight is nan"),
        (lambda: LogitsKD(kd_weight=0, ce_weight=0), ValueError, "kd_weight and ce_weight are both 0"),
        (lambda: LogitsKD(divergence="kl"), ValueError, "divergence is 'kl'"),
        (lambda: LogitsKD(scale_by_temperature=2), TypeError, "scale_by_temperature is 2"),
        (lambda: LogitsKD(label_smoothing=1), ValueError, "label_smoothing is 1"),
        (lambda: LogitsKD(label_smoothing=0.1, ce_weight=0), ValueError, "label_smoothing is 0.1 but ce_weight is 0"),
        (lambda: MSE(kd_weight=-1), ValueError, "kd_weight is -1"),
        (lambda: MSE(kd_weight=0, label_weight=0), ValueError, "kd_weight and label_weight are both 0"),
        (lambda: TaskLoss(label_smoothing=-0.1), ValueError, "label_smoothing is -0.1"),
        (lambda: WeightedSum({}), ValueError, "terms has no positive weight"),
        (lambda: WeightedSum({"ce": (0, TaskLoss())}), ValueError, "terms has no positive weight"),
        (lambda: WeightedSum({"": (1, TaskLoss())}), ValueError, "terms has the name ''"),
        (lambda: WeightedSum({"loss": (1, TaskLoss())}), ValueError, "terms has the name 'loss'"),
        (lambda: WeightedSum({"ce": (-1, TaskLoss())}), ValueError, r"the weight of terms\['ce'\] is -1"),
        (lambda: WeightedSum({"ce": ("1", TaskLoss())}), TypeError, r"the weight of terms\['ce'\] is '1'"),
        (lambda: WeightedSum({"a": (1, LogitsKD()), "b": (1, MSE())}), ValueError, "terms mixes kinds of problem"),
        (lambda: WeightedSum({"ce": (1, TaskLoss)}), TypeError, "objective is <class"),
        (lambda: as_objective("kd"), TypeError, "objective is 'kd'"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_objectives_can_be_told_apart_by_their_text() -> None:
    """Runs keep it beside their results."""
    assert repr(LogitsKD(temperature=3)) == repr(LogitsKD(temperature=3)) != repr(LogitsKD())
    assert repr(WeightedSum({"a": (1, MSE())})) == repr(WeightedSum({"a": (1, MSE())}))
    assert repr(WeightedSum({"a": (1, MSE())})) != repr(WeightedSum({"a": (2, MSE())}))


def test_a_fingerprint_says_what_is_computed() -> None:
    assert LogitsKD(3.0).fingerprint == LogitsKD(temperature=3.0).fingerprint != LogitsKD().fingerprint
    assert PKD(pairs=[(1, 2)], widths=(4, 8)).fingerprint == "PKD(pairs=[(1, 2)], widths=(4, 8), over='mean')"
    both = WeightedSum({"kd": (0.5, MSE()), "none": (0.0, LogitsKD()), "task": (1.0, TaskLoss())})
    assert both.fingerprint == (
        "WeightedSum({'kd': (0.5, MSE(kd_weight=1.0, label_weight=1.0)), 'task': (1.0, TaskLoss(label_smoothing=0.0))})"
    )
    with pytest.raises(TypeError, match="objective is a Fails; expected a dataclass, or a fingerprint of its own"):
        _ = WeightedSum({"own": (1.0, Fails())}).fingerprint


def test_terms_are_taught_as_each_needs_it() -> None:
    """One that runs its teachers itself has them as they are given; another has their outputs."""
    seen = []

    @dataclass(frozen=True)
    class Notes(Objective):
        lazily: bool

        @property
        def needs(self) -> Needs:
            return Needs(lazily=self.lazily)

        def parts(self, student: Any, teacher: Any, labels: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
            seen.append(teacher)
            return student.logits.sum(), {}

    stored = SequenceClassifierOutput(logits=torch.zeros(1, 2))
    teacher = TeacherOutputs(None, {}, stored=stored)
    total = WeightedSum({"now": (1.0, Notes(False)), "later": (1.0, Notes(True))})
    assert total.needs.lazily
    total(STUDENT, teacher)
    assert seen[0] is stored and seen[1] is teacher
