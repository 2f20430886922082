from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from fastdistill import DistillationTrainer, LogitsKD, MetaKD, MetaTrainer
from fastdistill.training.meta import feedback
from tests import tiny

STEP = 0.3


def examples(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]


def by_hand(student: Any, teacher: Any, train: Any, quiz: Any, classes: int) -> list[Tensor]:
    """By differentiating through the student's step."""
    weights = dict(student.named_parameters())

    def forward(of: Any, features: Any) -> Tensor:
        return functional_call(student, of, kwargs=features).logits  # type: ignore[no-any-return]

    ours, theirs = forward(weights, train[0]), teacher(**train[0]).logits
    if classes == 1:
        kd = (ours - theirs).square().mean()
        ce = (ours[:, 0] - train[1]).square().mean()
    else:
        p, q = ((z / 3).softmax(-1) for z in (theirs, ours))
        kd, ce = 9 * (p * (p / q).log()).sum(-1).mean(), F.cross_entropy(ours, train[1])
    slope = torch.autograd.grad(2 * kd + 0.5 * ce, list(weights.values()), create_graph=True, materialize_grads=True)
    moved = {name: weight - STEP * step for (name, weight), step in zip(weights.items(), slope, strict=True)}
    reached = forward(moved, quiz[0])
    loss = F.cross_entropy(reached, quiz[1]) if classes > 1 else (reached[:, 0] - quiz[1]).square().mean()
    return list(torch.autograd.grad(loss, list(teacher.parameters()), materialize_grads=True))


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_the_teachers_gradient_is_that_through_the_students_step(classes: int) -> None:
    teacher, student = tiny.pair(classes)
    for model in (teacher, student):
        model.eval().set_attn_implementation("eager")  # whose second derivative there is
    first, second = (examples(batch) for batch in tiny.batches(classes=classes))
    problem: Any = "regression" if classes == 1 else "classification"
    objective = MetaKD(3.0, 2.0, 0.5, problem=problem)
    wanted = by_hand(student, teacher, first, second, classes)
    teacher.train()
    said = feedback(student, teacher, objective, first, second, STEP)
    found = torch.autograd.grad(said, list(teacher.parameters()), materialize_grads=True)
    assert teacher.training
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10)
    assert sum(one.abs().sum() for one in found) > 0
    assert all(weight.grad is None for weight in student.parameters())


def trainer(folder: Path, **options: Any) -> MetaTrainer:
    data = tiny.dataset(80)
    given = {"teacher_model": tiny.bert(0, layers=2, dropout=0.0), "objective": MetaKD(), **options}
    args = given.pop("args", {})
    return MetaTrainer(
        model=tiny.bert(1, layers=1, dropout=0.0),
        args=tiny.config(folder, num_train_epochs=2, logging_steps=4, **args),
        train_dataset=data.select(range(64)),
        quiz_dataset=data.select(range(64, 80)),
        processing_class=tiny.tokenizer(),
        **given,
    )


def weights(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_both_learn_and_the_teacher_that_was_given_does_not(tmp_path: Path) -> None:
    teacher = tiny.bert(0, layers=2, dropout=0.0)
    before, one = weights(teacher), trainer(tmp_path, teacher_model=teacher)
    started = weights(one.model)
    one.train()
    assert torch.equal(weights(teacher), before) and not any(p.grad is not None for p in teacher.parameters())
    assert not torch.equal(weights(one.teacher_model), before) and not torch.equal(weights(one.model), started)
    rates = [group["initial_lr"] for group in one.optimizer.param_groups]  # type: ignore[union-attr]
    assert rates[-1] == pytest.approx(1e-2 / 3) and set(rates[:-1]) == {1e-2}
    logs = [log for log in one.state.log_history if "kd" in log]
    assert all(log["loss"] == pytest.approx(log["kd"] + log["ce"], rel=1e-3) for log in logs)


def test_a_teacher_that_hardly_moves_leaves_plain_distillation(tmp_path: Path) -> None:
    """The student's own gradient is that of its loss."""
    found, options = [], {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.1}
    for objective in (MetaKD(teacher_rate=1e-12), MetaKD(teacher_rate=1.0)):
        one = trainer(tmp_path, objective=objective, args=options)
        one.train()
        found.append(weights(one.model))
    plain = DistillationTrainer(
        model=tiny.bert(1, layers=1, dropout=0.0),
        teacher_model=tiny.bert(0, layers=2, dropout=0.0),
        objective=LogitsKD(),
        args=tiny.config(tmp_path, num_train_epochs=2, **options),
        train_dataset=tiny.dataset(80).select(range(64)),
        processing_class=tiny.tokenizer(),
    )
    plain.train()
    torch.testing.assert_close(found[0], weights(plain.model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_it_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    whole.train()
    cut = trainer(tmp_path / "cut", args={"save_strategy": "steps", "save_steps": 5})
    cut.train()
    again = trainer(tmp_path / "cut", args={"save_strategy": "steps", "save_steps": 5})
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-5"))
    for one in (cut, again):
        torch.testing.assert_close(weights(one.model), weights(whole.model))
        torch.testing.assert_close(weights(one.teacher_model), weights(whole.teacher_model))


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="objective is a LogitsKD; expected MetaKD"):
        trainer(tmp_path, objective=LogitsKD())
    for given, message in (
        ({"quiz": 1.0}, "quiz is 1.0; expected"),
        ({"teacher_rate": 0}, "teacher_rate is 0; expected"),
        ({"kd_weight": 0}, "kd_weight is 0; expected"),
        ({"problem": "x"}, "problem is 'x'; expected"),
    ):
        with pytest.raises(ValueError, match=message):
            MetaKD(**given)
