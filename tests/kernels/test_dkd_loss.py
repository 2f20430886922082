"""The kernels of kd_ce_loss with the target apart, and what both losses say of their terms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastdistill.kernels import kd_ce_loss as module
from torch import Tensor

from tests.kernels import oracle
from tests.kernels.conftest import DEVICE
from tests.kernels.interpreter import interpreted

pytestmark = interpreted

DIVERGENCES = ("forward_kl", "soft_ce", "reverse_kl")
REDUCTIONS = ("mean", "sum", "none")
TILED, SWEPT = 130, 4100  # numbers of classes that take one kernel and the other


def make(rows: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and labels of which the second is ignored, the first and the last are the last class and the first."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (
        (torch.randn(rows, classes, generator=g, dtype=torch.float64) * 3).to(DEVICE, dtype) for _ in "ab"
    )
    labels = torch.randint(classes, (rows,), generator=g)
    labels[0], labels[1:2], labels[-1] = classes - 1, -100, 0
    return student, teacher, labels.to(DEVICE)


def options(
    temperature: float = 2.0, target_weight: float = 0.7, nontarget_weight: float = 3.0, ce_weight: float = 0.3,
    divergence: str = "forward_kl", scale_by_temperature: bool = True, ignore_index: int = -100,
    label_smoothing: float = 0.0, reduction: str = "mean",
) -> tuple:  # fmt: skip
    return (
        temperature, target_weight, nontarget_weight, ce_weight, divergence, scale_by_temperature, ignore_index,
        label_smoothing, reduction,
    )  # fmt: skip


def check(student: Tensor, teacher: Tensor, labels: Tensor, rtol: float = 2e-5, **changes: Any) -> None:
    chosen = options(**changes)
    ours = module.dkd_loss(student, teacher, labels, *chosen, True, True)
    exact = oracle.with_gradients(student.double(), teacher.double(), labels, *chosen, loss=oracle.dkd_loss)
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    for value, answer, dtype in zip(ours, exact, (wide, student.dtype, teacher.dtype), strict=True):
        assert value.dtype == dtype
        rtol = max(rtol, 2 * torch.finfo(dtype).eps)
        atol = rtol * answer.abs().max().item() / 4
        torch.testing.assert_close(value.double(), answer, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [3, SWEPT])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_option(classes: int, reduction: str, divergence: str) -> None:
    common = {"reduction": reduction, "divergence": divergence}
    check(*make(3, classes), **common, scale_by_temperature=False, label_smoothing=0.1, temperature=3.7)
    check(*make(3, classes), **common, ce_weight=0.0, temperature=1.0)


@pytest.mark.parametrize("classes", [2, 7, TILED, SWEPT])
def test_every_width(classes: int) -> None:
    check(*make(3, classes), reduction="none")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [TILED, SWEPT])
def test_every_dtype(dtype: torch.dtype, classes: int) -> None:
    check(*make(2, classes, dtype), label_smoothing=0.1)


@pytest.mark.parametrize("classes", [TILED, SWEPT])
@pytest.mark.parametrize("margin", [60.0, -60.0])
def test_a_target_that_is_nearly_certain(classes: int, margin: float) -> None:
    student, teacher, labels = make(3, classes)
    labels[1] = 1
    for logits, more in ((student, 0.0), (teacher, 1.0)):
        logits.scatter_add_(-1, labels[:, None], torch.full((3, 1), margin + more, device=DEVICE))
    check(student, teacher, labels, reduction="none")
    chosen = options(nontarget_weight=0.0, ce_weight=0.0, reduction="none")
    ours = module.dkd_loss(student, teacher, labels, *chosen, True, False)[1].gather(-1, labels[:, None])
    exact = module.dkd_loss(student.double(), teacher.double(), labels, *chosen, True, False)[1]
    assert (ours != 0).all()
    torch.testing.assert_close(ours.double(), exact.gather(-1, labels[:, None]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("classes", [6, SWEPT])
def test_unusual_logits(classes: int) -> None:
    """-inf is no probability, also of the target; a NaN or an infinity spoils its row, wherever it stands."""
    student, teacher, labels = make(6, classes)
    labels[:] = 2
    student[0, 3:5] = teacher[0, 3:5] = -torch.inf
    student[1, 2] = teacher[1, 2] = -torch.inf
    student[2, 2], teacher[3, 2], student[4, 1], teacher[5, 3] = torch.inf, torch.inf, torch.nan, torch.inf
    loss, *grads = module.dkd_loss(student, teacher, labels, *options(ce_weight=0.0, reduction="none"), True, True)
    assert loss.isnan().tolist() == [False, False, True, True, True, True]
    for grad in grads:
        assert grad.isnan().any(-1).tolist() == [False, False, True, True, True, True]
        assert (grad[0, 3:5] == 0).all() and grad[1, 2] == 0
    kept = torch.ones(classes, dtype=torch.bool)
    kept[3:5] = False
    inner = student[:1, kept].contiguous(), teacher[:1, kept].contiguous(), labels[:1]
    expected = module.dkd_loss(*inner, *options(ce_weight=0.0, reduction="none"), False, False)[0]
    torch.testing.assert_close(loss[:1], expected)


@pytest.mark.parametrize("classes", [TILED, SWEPT])
def test_rows_that_do_not_count(classes: int) -> None:
    student, teacher, labels = make(4, classes)
    labels[:] = torch.tensor([1, -100, classes, 2])
    student[1] = torch.nan
    loss, *grads = module.dkd_loss(student, teacher, labels, *options(reduction="none"), True, True)
    assert loss.isnan().tolist() == [False, False, True, False] and loss[1] == 0
    assert all((g[1] == 0).all() and g[2].isnan().all() and g[::3].isfinite().all() for g in grads)


@pytest.mark.slow
@pytest.mark.parametrize("rows, classes", [(5, 3), (700, 3), (3, SWEPT)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_terms_stand_behind_the_loss(rows: int, classes: int, reduction: str) -> None:
    inputs = make(rows, classes)
    chosen = options(reduction=reduction, label_smoothing=0.1)
    for op, *own in (("dkd_loss", *chosen), ("kd_ce_loss", chosen[0], *chosen[2:])):
        found = getattr(module, op)(*inputs, *own, False, False, True)[0]
        plain = getattr(module, op)(*inputs, *own, False, False)[0]
        wide = inputs[0].double(), inputs[1].double(), inputs[2]
        assert torch.equal(found[0], plain)
        torch.testing.assert_close(found.double(), getattr(oracle, op)(*wide, *own, True), rtol=1e-5, atol=1e-5)


def test_no_rows() -> None:
    student, teacher, labels = make(3, 5)
    for reduction, shape in (("mean", (4,)), ("none", (4, 0))):
        loss = module.dkd_loss(student[:0], teacher[:0], labels[:0], *options(reduction=reduction), True, True, True)[0]
        assert loss.shape == shape and (reduction == "none" or loss.isnan().all())
