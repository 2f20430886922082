"""kd_ce_loss of labels that do not count, and of logits that are infinite, huge, NaN or not there."""

from __future__ import annotations

import math

import pytest
import torch

from fastdistill import kd_ce_loss
from tests import eager
from tests.ops.losses import DIVERGENCES, REDUCTIONS, make, with_gradients


@pytest.mark.parametrize("classes", [5, 50])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_count_for_nothing(device: str, classes: int, reduction: str, nan_filled: None) -> None:
    student, teacher, labels = make(20, classes, device=device, dtypes=(torch.float32, torch.float32))
    labels[:] = torch.arange(20) % classes
    labels[::3] = 7 - 10
    with torch.no_grad():
        student[::3], teacher[::3] = torch.nan, torch.nan
    loss, *grads = with_gradients(kd_ce_loss, student, teacher, labels, ignore_index=-3, reduction=reduction)
    kept = labels != -3
    expected = kd_ce_loss(student[kept], teacher[kept], labels[kept], reduction=reduction)
    torch.testing.assert_close(loss[kept] if reduction == "none" else loss, expected)
    if reduction == "none":
        assert (loss[~kept] == 0).all()
    for grad in grads:
        assert (grad[~kept] == 0).all() and torch.isfinite(grad).all() and (grad[kept] != 0).any()


def test_all_rows_ignored_is_nan_with_no_gradient(device: str) -> None:
    student, teacher, labels = make(4, 3, device=device)
    loss, *grads = with_gradients(kd_ce_loss, student, teacher, torch.full_like(labels, -100))
    assert loss.isnan() and all((g == 0).all() for g in grads)


@pytest.mark.parametrize("bad", [-1, 5, 10**12, -101])
@pytest.mark.parametrize("ce_weight", [0.0, 1.0])
def test_label_outside_is_an_error(bad: int, ce_weight: float) -> None:
    student, teacher, labels = make(4, 5)
    labels[2] = bad
    with pytest.raises(ValueError, match=rf"labels holds {bad} at row 2; expected 0 <= label < 5"):
        kd_ce_loss(student, teacher, labels, ce_weight=ce_weight)


@pytest.mark.parametrize("classes", [6, 60])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_minus_infinity_is_no_probability(device: str, classes: int, divergence: str) -> None:
    student, teacher, labels = make(5, classes, device=device)
    masked_student, masked_teacher = student.detach().clone(), teacher.detach().clone()
    masked_student[:, 3:] = masked_teacher[:, 3:] = -torch.inf
    labels %= 3
    options = dict(divergence=divergence, temperature=2.0)
    masked = with_gradients(
        kd_ce_loss, masked_student.requires_grad_(), masked_teacher.requires_grad_(), labels, **options
    )
    plain = with_gradients(
        kd_ce_loss, *(x.detach()[:, :3].requires_grad_() for x in (student, teacher)), labels, **options
    )
    torch.testing.assert_close(masked[0], plain[0])
    for whole, part in zip(masked[1:], plain[1:], strict=True):
        torch.testing.assert_close(whole[:, :3], part)
        assert (whole[:, 3:] == 0).all()


@pytest.mark.parametrize("classes", [6, 60])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, "all -inf"])
def test_what_is_not_finite_spoils_only_its_row(
    device: str, classes: int, divergence: str, side: str, poison: float | str
) -> None:
    student, teacher, _ = make(4, classes, device=device, dtypes=(torch.float32, torch.float32))
    with torch.no_grad():
        target = student if side == "student" else teacher
        if poison == "all -inf":
            target[1] = -torch.inf
        else:
            target[1, 2] = poison
    loss, *grads = with_gradients(kd_ce_loss, student, teacher, None, divergence=divergence, reduction="none")
    assert torch.isnan(loss).tolist() == [False, True, False, False]
    for grad in grads:
        assert torch.isnan(grad).any(-1).tolist() == [False, True, False, False]


def test_disjoint_support_is_infinitely_far(device: str) -> None:
    student = torch.tensor([[-torch.inf, 0.0, 0.0]], device=device)
    teacher = torch.tensor([[0.0, 0.0, 0.0]], device=device)
    assert kd_ce_loss(student, teacher) == math.inf
    assert kd_ce_loss(student, teacher, divergence="soft_ce") == math.inf
    assert torch.isfinite(kd_ce_loss(student, teacher, divergence="reverse_kl"))


@pytest.mark.parametrize("classes", [4, 90])
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits(device: str, classes: int, size: float) -> None:
    student, teacher, labels = make(8, classes, device=device, dtypes=(torch.float32, torch.float32), scale=size)
    for divergence in DIVERGENCES:
        loss, *grads = with_gradients(kd_ce_loss, student, teacher, labels, divergence=divergence)
        exact = with_gradients(
            eager.kd_ce_loss, *(x.detach().double().requires_grad_() for x in (student, teacher)), labels,
            divergence=divergence,
        )  # fmt: skip
        torch.testing.assert_close(loss.double(), exact[0], rtol=1e-5, atol=0)
        assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows(device: str, reduction: str) -> None:
    student, teacher, labels = make(0, 5, device=device)
    loss, *grads = with_gradients(kd_ce_loss, student, teacher, labels, reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert reduction != "mean" or loss.isnan()
    assert reduction != "sum" or loss == 0
    assert all(g.shape == (0, 5) for g in grads)
