from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DataCollatorWithPadding

import fastdistill
from fastdistill import DistillationTrainer, LogitsKD, MultiLabelKD
from fastdistill.data.metrics import compute_metrics
from fastdistill.data.tasks import Task
from fastdistill.objectives.logits import TaskLoss
from tests import tiny

CLASSES = 3
LABELS = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 1], [1, 1, 0]], dtype=torch.float64)


def outputs(seed: int, scale: float = 1.0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(4, CLASSES, generator=generator, dtype=torch.float64)
    return SimpleNamespace(logits=logits.requires_grad_())


def plain(z_s: Tensor, z_t: Tensor, tau: float) -> Tensor:
    p, q = (z_t / tau).sigmoid(), (z_s / tau).sigmoid()
    return tau**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())


def bert(seed: int, **config: Any) -> Any:
    return tiny.bert(seed, num_labels=CLASSES, problem_type="multi_label_classification", dropout=0.0, **config)


def data(number: int) -> Any:
    rows = tiny.dataset(number)
    labels = [[float((one + place) % 3 == 0), float(one % 2), 1.0] for place, one in enumerate(range(number))]
    return rows.remove_columns("labels").add_column("labels", labels)


def test_it_is_the_formula() -> None:
    student, teacher = outputs(1), outputs(2)
    loss, parts = MultiLabelKD(temperature=3, kd_weight=0.7, bce_weight=0.2).parts(student, teacher, LABELS)
    kd = plain(student.logits, teacher.logits, 3).mean()
    bce = F.binary_cross_entropy_with_logits(student.logits, LABELS)
    torch.testing.assert_close(loss, 0.7 * kd + 0.2 * bce)
    torch.testing.assert_close(parts, {"kd": kd.detach(), "bce": bce.detach()})
    expected = torch.autograd.grad(0.7 * kd + 0.2 * bce, (student.logits, teacher.logits))
    torch.testing.assert_close(torch.autograd.grad(loss, (student.logits, teacher.logits)), expected)
    assert MultiLabelKD(bce_weight=0).needs.labels is False
    assert not MultiLabelKD(kd_weight=0).needs.teacher


@pytest.mark.parametrize("unknown", [torch.nan, -100.0])
def test_what_is_not_known_counts_in_neither_term(unknown: float) -> None:
    student, teacher, labels = outputs(1), outputs(2), LABELS.clone()
    labels[1, 2] = labels[3, 0] = unknown
    known = labels == LABELS
    kd = plain(student.logits, teacher.logits, 2)[known].mean()
    bce = F.binary_cross_entropy_with_logits(student.logits[known], LABELS[known])
    torch.testing.assert_close(MultiLabelKD()(student, teacher, labels), kd + bce)
    torch.testing.assert_close(TaskLoss()(student, None, labels), bce)
    nothing = MultiLabelKD(kd_weight=0)(student, None, torch.full_like(labels, unknown))
    assert nothing.item() == 0
    assert torch.autograd.grad(nothing, student.logits)[0].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_huge_logits_give_numbers(scale: float, dtype: torch.dtype) -> None:
    wide = [outputs(seed, scale) for seed in (1, 2)]
    student, teacher = (SimpleNamespace(logits=o.logits.detach().to(dtype).requires_grad_()) for o in wide)
    loss = MultiLabelKD()(student, teacher, LABELS)
    z_s, z_t = student.logits.detach().double(), teacher.logits.detach().double()
    p = (z_t / 2).sigmoid()
    exact = p * (F.logsigmoid(z_t / 2) - F.logsigmoid(z_s / 2)) + (1 - p) * (
        F.logsigmoid(-z_t / 2) - F.logsigmoid(-z_s / 2)
    )
    expected = 4 * exact.mean() + F.binary_cross_entropy_with_logits(z_s, LABELS)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert torch.autograd.grad(loss, student.logits)[0].isfinite().all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MultiLabelKD(temperature=0), "temperature is 0"),
        (lambda: MultiLabelKD(kd_weight=0, bce_weight=0), "kd_weight and bce_weight are both 0"),
        (
            lambda: MultiLabelKD()(outputs(1), outputs(2), LABELS[:, :2]),
            r"labels has shape \(4, 2\); expected \(4, 3\)",
        ),
        (lambda: MultiLabelKD()(outputs(1), outputs(2), None), "labels is None"),
        (lambda: MultiLabelKD()(outputs(1), None, LABELS), "teacher is None"),
        (lambda: TaskLoss(0.1)(outputs(1), None, LABELS), "label_smoothing is 0.1 but labels are torch.float64"),
    ],
)
def test_what_is_wrong_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def trainer(folder: Path, rows: Any = None, **options: Any) -> DistillationTrainer:
    rows = data(12) if rows is None else rows
    settings = {"model": bert(1), "teacher_model": bert(2), "train_dataset": rows, "eval_dataset": rows}
    args = tiny.config(folder, max_steps=2, logging_steps=1, per_device_eval_batch_size=12)
    return DistillationTrainer(args=args, processing_class=tiny.tokenizer(), **settings | options)


def test_it_is_trained_evaluated_and_measured(tmp_path: Path) -> None:
    """ "eval_loss" is transformers' own."""
    task = Task("t", ("sentence1",), ("a", "b", "c"), "f1_micro", 16, multi_label=True)
    t = trainer(tmp_path, compute_metrics=compute_metrics(task))
    assert t.objective == MultiLabelKD()
    found = t.evaluate()
    batch = DataCollatorWithPadding(tiny.tokenizer())(list(data(12).remove_columns("length")))
    with torch.no_grad():
        expected = t.model.eval()(**batch).loss.item()
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert {"eval_f1_micro", "eval_f1_macro"} <= found.keys()
    t.train()
    assert {"kd", "bce"} <= t.state.log_history[1].keys()


def test_stored_logits_stand_for_the_teacher(tmp_path: Path) -> None:
    rows = data(12)
    collate = DataCollatorWithPadding(tiny.tokenizer())
    stored = fastdistill.store(rows, bert(2), collate=collate, cache_file=tmp_path / "x.arrow")
    losses = []
    for options in ({}, {"train_dataset": stored, "teacher_model": None}):
        t = trainer(tmp_path, rows, **options)
        t.train()
        losses.append([entry["loss"] for entry in t.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_label_that_is_none_is_an_error_that_names_the_row(tmp_path: Path) -> None:
    rows = data(12)
    labels = rows["labels"][:]
    labels[4] = [0.0, 2.0, 1.0]
    with pytest.raises(ValueError, match="row 4 of the dataset: labels holds 2.0; expected 0 to 1, or -100 or NaN"):
        trainer(tmp_path, rows.remove_columns("labels").add_column("labels", labels)).train()
    with pytest.raises(
        ValueError, match=r"objective is LogitsKD\(.*\), for classification, but model is for multi_lab"
    ):
        trainer(tmp_path, objective=LogitsKD())


@pytest.mark.parametrize("with_student", [True, False])
def test_scores_are_those_of_a_loop_over_examples(with_student: bool) -> None:
    teacher, student = bert(2).double(), bert(1, layers=1).double()
    batch = dict(DataCollatorWithPadding(tiny.tokenizer())(list(data(4).remove_columns("length"))))
    found = fastdistill.score(teacher, [batch], student if with_student else None, progress=False)
    ps, qs = [], []
    teacher.eval(), student.eval()
    for row in range(4):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        labels = one.pop("labels")
        with fastdistill.gate(teacher) as gates:
            z_t, z_s = teacher(**one).logits, student(**one).logits.detach()
            p_t, log_q = (z_t / 2).sigmoid(), F.logsigmoid(z_s / 2)
            soft = -4 * (p_t * log_q + (1 - p_t) * F.logsigmoid(-z_s / 2)).mean()
            losses = F.binary_cross_entropy_with_logits(z_t, labels.double()), soft
            for loss, kept in zip(losses, (ps, qs), strict=True):
                gradients = torch.autograd.grad(loss, gates.tensors, retain_graph=True)
                kept.append([g.abs() for g in gradients])
    for scores, kept in ((found.expressiveness, ps), (found.friendliness, qs)):
        if scores is None:
            assert not with_student
            continue
        mine = [torch.stack(layer).mean(0).float() for layer in zip(*kept, strict=True)]
        torch.testing.assert_close([*scores.heads, *scores.neurons], mine, rtol=1e-4, atol=1e-7)
