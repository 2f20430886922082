from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import dkd_loss, kd_ce_loss
from fastdistill.ops import reference
from tests import eager
from tests.accuracy import assert_accurate
from tests.ops.losses import DIVERGENCES, DTYPES, REDUCTIONS, check_against_eager, make, with_gradients


def labelled(*shape: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What `make` has, with a label in each row."""
    student, teacher, labels = make(*shape, **options)
    return student, teacher, labels.clamp_min(0)


def in_float64(student: Tensor, teacher: Tensor) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in (student, teacher)]


ONE = torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4).long()


@pytest.mark.parametrize("classes", [2, 3, 7, 16, 17, 32, 33, 100, 129, 2049, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_dtype_and_width(
    device: str, classes: int, dtype: torch.dtype, divergence: str, nan_filled: None
) -> None:
    for temperature, smoothing in ((1.0, 0.0), (2.0, 0.1), (3.7, 0.0)):
        inputs = make(37, classes, device=device, dtypes=(dtype, dtype))
        options = dict(temperature=temperature, divergence=divergence, label_smoothing=smoothing)
        check_against_eager(*inputs, loss="dkd_loss", **options)


@pytest.mark.parametrize("classes", [3, 70])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weights", [(1.0, 8.0, 1.0, 1.0), (1.0, 0.0, 0.5, 0.0), (0.0, 2.0, 0.7, 0.3)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_option(
    device: str, classes: int, reduction: str, weights: tuple, divergence: str, nan_filled: None
) -> None:
    names = ("alpha", "beta", "kd_weight", "ce_weight")
    for temperature, scaled in itertools.product((0.5, 1.0, 2.0), (True, False)):
        inputs = make(40, 5, classes, device=device, dtypes=(torch.float32, torch.float32))
        check_against_eager(
            *inputs, loss="dkd_loss", temperature=temperature, scale_by_temperature=scaled, divergence=divergence,
            reduction=reduction, **dict(zip(names, weights, strict=True)),
        )  # fmt: skip


def test_every_place_of_the_target(device: str) -> None:
    """Before it, behind it, and in vectors that it is first or last of."""
    for classes in (5, 40, 2500):
        student, teacher, _ = make(classes, classes, device=device, dtypes=(torch.float32, torch.float32))
        check_against_eager(
            student, teacher, torch.arange(classes, device=device), loss="dkd_loss", temperature=2.0, reduction="none"
        )


@pytest.mark.parametrize("classes", [2, 10, 100, 5000])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1e-4, 0.03, 8.0, 30.0, 100.0])
def test_every_temperature_is_as_good_as_eager(device: str, classes: int, divergence: str, temperature: float) -> None:
    rows, scale = 2000 if classes <= 100 else 64, min(3.0, 300 * temperature)
    inputs = make(rows, classes, device=device, dtypes=(torch.float32, torch.float32), scale=scale)
    check_against_eager(*inputs, loss="dkd_loss", temperature=temperature, divergence=divergence, reduction="none")


@pytest.mark.parametrize("temperature", [101.0, 10000.0])
def test_high_temperatures_are_right(device: str, temperature: float) -> None:
    student, teacher, labels = make(16, 10, device=device, dtypes=(torch.float32, torch.float32))
    ours = with_gradients(dkd_loss, student, teacher, labels, temperature=temperature)
    exact = with_gradients(eager.dkd_loss, *in_float64(student, teacher), labels, temperature=temperature)
    for value, answer in zip(ours, exact, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), answer, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("classes", [3, 100])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("margin", [20.0, 60.0, 150.0, -20.0, -60.0])
def test_a_target_that_is_nearly_certain(device: str, classes: int, divergence: str, margin: float) -> None:
    """Its probability rounds to 1, or the others' to 1: what is left of either must still be right."""
    student, teacher, labels = labelled(50, classes, device=device, dtypes=(torch.float32, torch.float32), scale=1.0)
    with torch.no_grad():
        student.scatter_add_(-1, labels[:, None], torch.full((50, 1), margin, device=device))
        teacher.scatter_add_(-1, labels[:, None], torch.full((50, 1), margin + 1, device=device))
    options = dict(divergence=divergence, reduction="none", alpha=2.0, beta=3.0, ce_weight=0.0)
    ours = with_gradients(dkd_loss, student, teacher, labels, **options)
    exact = with_gradients(dkd_loss, *in_float64(student, teacher), labels, **options)
    for value, answer in zip(ours, exact, strict=True):
        torch.testing.assert_close(value.double(), answer, rtol=1e-4, atol=1e-6)
    apart = dict(options, beta=0.0)  # the target's own gradient, however small
    ours = with_gradients(dkd_loss, student, teacher, labels, **apart)
    exact = with_gradients(dkd_loss, *in_float64(student, teacher), labels, **apart)
    at_target = ours[1].gather(-1, labels[:, None]).double(), exact[1].gather(-1, labels[:, None])
    torch.testing.assert_close(*at_target, rtol=1e-3, atol=torch.finfo(torch.float32).tiny)
    assert (at_target[1] != 0).any()


def test_forward_kl_is_its_parts(device: str) -> None:
    """KL = TCKD + (1 - p_target) NCKD (Zhao et al. 2022, equation 7)."""
    student, teacher, labels = labelled(20, 10, device=device)
    _, tckd, nckd, _ = dkd_loss(student, teacher, labels, temperature=2.0, reduction="none", return_terms=True)
    rest = 1 - (teacher / 2).softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    whole = kd_ce_loss(student, teacher, labels, temperature=2.0, ce_weight=0.0, reduction="none")
    torch.testing.assert_close(tckd + rest * nckd, whole)


def test_of_two_classes_nckd_is_0(device: str) -> None:
    student, teacher, labels = labelled(20, 2, device=device, dtypes=(torch.float32, torch.float32))
    for divergence in DIVERGENCES:
        _, tckd, nckd, _ = dkd_loss(student, teacher, labels, divergence=divergence, return_terms=True)
        assert nckd == 0 and tckd > 0
        loss = dkd_loss(student, teacher, labels, divergence=divergence, alpha=0.0, ce_weight=0.0)
        assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (student, teacher)))


@pytest.mark.parametrize("classes", [4, 40])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_terms_are_each_loss_alone(device: str, classes: int, reduction: str, nan_filled: None) -> None:
    student, teacher, labels = make(9, classes, device=device)
    options: dict[str, Any] = dict(temperature=2.0, label_smoothing=0.1, reduction=reduction)
    loss, tckd, nckd, ce = dkd_loss(student, teacher, labels, alpha=2.0, ce_weight=0.3, return_terms=True, **options)
    torch.testing.assert_close(loss, 2 * tckd + 8 * nckd + 0.3 * ce)
    torch.testing.assert_close(tckd, dkd_loss(student, teacher, labels, beta=0.0, ce_weight=0.0, **options))
    torch.testing.assert_close(nckd, dkd_loss(student, teacher, labels, alpha=0.0, beta=1.0, ce_weight=0.0, **options))
    torch.testing.assert_close(ce, kd_ce_loss(student, None, labels, kd_weight=0.0, **options))
    assert not any(term.requires_grad for term in (tckd, nckd, ce))
    plain = dkd_loss(student, teacher, labels, alpha=2.0, ce_weight=0.3, **options)
    grads = (torch.autograd.grad(x, (student, teacher), torch.ones_like(x)) for x in (loss, plain))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_without_distillation_it_is_cross_entropy(device: str) -> None:
    student, teacher, labels = make(9, 40, device=device)
    for given in (teacher, None):
        loss, tckd, nckd, ce = dkd_loss(student, given, labels, kd_weight=0.0, ce_weight=0.7, return_terms=True)
        torch.testing.assert_close(loss, 0.7 * torch.nn.functional.cross_entropy(student, labels))
        assert tckd == nckd == 0 and torch.equal(loss, dkd_loss(student, given, labels, kd_weight=0.0, ce_weight=0.7))
        torch.testing.assert_close(loss, 0.7 * ce)


@pytest.mark.parametrize("dtypes", [d for d in itertools.product(DTYPES, DTYPES) if d[0] != d[1]])
def test_mixed_dtypes(device: str, dtypes: tuple, nan_filled: None) -> None:
    student, teacher, labels = make(9, 40, device=device, dtypes=dtypes)
    ours = with_gradients(dkd_loss, student, teacher, labels, temperature=2.0)
    exact = with_gradients(dkd_loss, *in_float64(student, teacher), labels, temperature=2.0)
    assert ours[0].dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    for value, true, dtype in zip(ours, exact, (torch.float32, *dtypes), strict=True):
        torch.testing.assert_close(value.double(), true, rtol=4 * torch.finfo(dtype).eps, atol=4e-6)


@pytest.mark.parametrize("classes", [5, 50])
def test_any_layout(device: str, classes: int) -> None:
    student, teacher, labels = make(2, 3, classes, device=device)
    wide = torch.cat([teacher, teacher], -1)[..., :classes].detach().requires_grad_()
    moved = student.detach().movedim(-1, 0).contiguous().movedim(0, -1).requires_grad_()
    expected = with_gradients(dkd_loss, student, teacher, labels)
    for value, true in zip(with_gradients(dkd_loss, moved, wide, labels.int()), expected, strict=True):
        torch.testing.assert_close(value, true)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("classes", [4, 40])
def test_gradcheck(divergence: str, reduction: str, classes: int) -> None:
    student, teacher, labels = make(3, classes, scale=1.0)
    options = dict(temperature=1.7, divergence=divergence, reduction=reduction, label_smoothing=0.1, ce_weight=0.5)
    assert torch.autograd.gradcheck(lambda s, t: dkd_loss(s, t, labels, beta=2.0, **options), (student, teacher))


@pytest.mark.parametrize("returned", [False, True])
def test_compiles_whole(device: str, returned: bool) -> None:
    def loss(*inputs: Tensor) -> Any:
        found = dkd_loss(*inputs, temperature=2.0, return_terms=returned)
        return found[0] * 3 if returned else found * 3

    torch.compiler.reset()
    inputs = make(4, 9, device=device, dtypes=(torch.float32, torch.float32))
    compiled = with_gradients(torch.compile(loss, fullgraph=True), *inputs)
    for value, expected in zip(compiled, with_gradients(loss, *inputs), strict=True):
        torch.testing.assert_close(value, expected)


def test_autocast_computes_in_float32(device: str) -> None:
    inputs = make(8, 33, device=device, dtypes=(torch.bfloat16, torch.bfloat16))
    plain = dkd_loss(*inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(dkd_loss(*inputs), plain) and plain.dtype == torch.float32


def test_second_derivative_is_an_error() -> None:
    student, teacher, labels = make(6, 5)
    with pytest.raises(RuntimeError, match="dkd_loss cannot be differentiated twice"):
        torch.autograd.grad(dkd_loss(student, teacher, labels) ** 2, student, create_graph=True)


@pytest.mark.parametrize("classes", [5, 50])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_count_for_nothing(device: str, classes: int, reduction: str, nan_filled: None) -> None:
    student, teacher, labels = make(20, classes, device=device, dtypes=(torch.float32, torch.float32))
    labels[:] = torch.arange(20) % classes
    labels[::3] = -3
    with torch.no_grad():
        student[::3], teacher[::3] = torch.nan, torch.nan
    loss, *grads = with_gradients(dkd_loss, student, teacher, labels, ignore_index=-3, reduction=reduction)
    kept = labels != -3
    expected = dkd_loss(student[kept], teacher[kept], labels[kept], reduction=reduction)
    torch.testing.assert_close(loss[kept] if reduction == "none" else loss, expected)
    for grad in grads:
        assert (grad[~kept] == 0).all() and torch.isfinite(grad).all() and (grad[kept] != 0).any()
    terms = dkd_loss(student, teacher, labels, ignore_index=-3, reduction=reduction, return_terms=True)
    assert all(torch.isfinite(term).all() for term in terms)


def test_all_rows_ignored_is_nan_with_no_gradient(device: str) -> None:
    student, teacher, labels = make(4, 3, device=device)
    loss, *grads = with_gradients(dkd_loss, student, teacher, torch.full_like(labels, -100))
    assert loss.isnan() and all((g == 0).all() for g in grads)


@pytest.mark.parametrize("classes", [6, 60])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_minus_infinity_is_no_probability(device: str, classes: int, divergence: str) -> None:
    student, teacher, labels = labelled(5, classes, device=device)
    masked_student, masked_teacher = student.detach().clone(), teacher.detach().clone()
    masked_student[:, 3:] = masked_teacher[:, 3:] = -torch.inf
    labels %= 3
    options = dict(divergence=divergence, temperature=2.0)
    masked = with_gradients(
        dkd_loss, masked_student.requires_grad_(), masked_teacher.requires_grad_(), labels, **options
    )
    plain = with_gradients(
        dkd_loss, *(x.detach()[:, :3].requires_grad_() for x in (student, teacher)), labels, **options
    )
    torch.testing.assert_close(masked[0], plain[0])
    for whole, part in zip(masked[1:], plain[1:], strict=True):
        torch.testing.assert_close(whole[:, :3], part)
        assert (whole[:, 3:] == 0).all()


@pytest.mark.parametrize("classes", [6, 60])
def test_a_target_without_probability(device: str, classes: int) -> None:
    """On both sides it is nothing to learn, but cross-entropy is infinite; on the teacher's alone, finite."""
    student, teacher, labels = labelled(5, classes, device=device)
    target = labels[:, None]
    with torch.no_grad():
        teacher.scatter_(-1, target, -torch.inf)
    loss, *grads = with_gradients(dkd_loss, student, teacher, labels)
    assert loss.isfinite() and all(g.isfinite().all() for g in grads)
    with torch.no_grad():
        student.scatter_(-1, target, -torch.inf)
    _, tckd, nckd, ce = dkd_loss(student, teacher, labels, return_terms=True)
    assert tckd == 0 and nckd.isfinite() and ce == math.inf
    grads = torch.autograd.grad(dkd_loss(student, teacher, labels, ce_weight=0.0), (student, teacher))
    assert all(g.isfinite().all() and (g.gather(-1, target) == 0).all() for g in grads)


@pytest.mark.parametrize("classes", [6, 60])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, "all -inf", "all others -inf"])
@pytest.mark.parametrize("label", [2, 3])
def test_what_is_not_finite_spoils_only_its_row(
    device: str, classes: int, divergence: str, side: str, poison: float | str, label: int
) -> None:
    student, teacher, labels = make(4, classes, device=device, dtypes=(torch.float32, torch.float32))
    labels[:] = label
    with torch.no_grad():
        target = student if side == "student" else teacher
        if isinstance(poison, str):
            kept = target[1, label].clone()
            target[1] = -torch.inf
            if poison == "all others -inf":
                target[1, label] = kept
        else:
            target[1, 2] = poison
    loss, *grads = with_gradients(dkd_loss, student, teacher, labels, divergence=divergence, reduction="none")
    assert torch.isnan(loss).tolist() == [False, True, False, False]
    for grad in grads:
        assert torch.isnan(grad).any(-1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("classes", [4, 90])
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits(device: str, classes: int, size: float) -> None:
    student, teacher, labels = labelled(8, classes, device=device, dtypes=(torch.float32, torch.float32), scale=size)
    for divergence in DIVERGENCES:
        loss, *grads = with_gradients(dkd_loss, student, teacher, labels, divergence=divergence)
        exact_inputs = in_float64(student, teacher)
        exact = with_gradients(dkd_loss, *exact_inputs, labels, divergence=divergence)
        torch.testing.assert_close(loss.double(), exact[0], rtol=1e-5, atol=0)
        assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows(device: str, reduction: str) -> None:
    student, teacher, labels = make(0, 5, device=device)
    loss, *grads = with_gradients(dkd_loss, student, teacher, labels, reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ()) and all(g.shape == (0, 5) for g in grads)
    assert reduction != "mean" or loss.isnan()
    assert len(dkd_loss(student, teacher, labels, reduction=reduction, return_terms=True)) == 4


def logits(*shape: int) -> Tensor:
    return torch.zeros(*shape)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((logits(4, 3), logits(5, 3), torch.zeros(4).long()), {}, ValueError, "teacher_logits has shape"),
        ((logits(4, 1), logits(4, 1), torch.zeros(4).long()), {}, ValueError, "student_logits.*regression"),
        ((logits(4, 3), logits(4, 3), None), {}, TypeError, "labels is a NoneType"),
        ((logits(4, 3), logits(4, 3), torch.zeros(3).long()), {}, ValueError, "labels has shape"),
        ((logits(4, 3), logits(4, 3), torch.full((4,), 3)), {}, ValueError, "labels holds 3 at row 0"),
        ((logits(4, 3), None, torch.zeros(4).long()), {}, ValueError, "teacher_logits is None but kd_weight is 1.0"),
        (ONE, dict(alpha=-1), ValueError, "alpha is -1; expected .*>= 0"),
        (ONE, dict(beta="8"), TypeError, "beta is '8'; expected a"),
        (ONE, dict(alpha=0, beta=0), ValueError, "alpha and beta are"),
        (ONE, dict(kd_weight="1"), TypeError, "kd_weight is '1'"),
        (ONE, dict(kd_weight=0, ce_weight=0), ValueError, "both 0"),
        (ONE, dict(temperature=0), ValueError, "temperature is 0"),
        (ONE, dict(divergence="kl"), ValueError, "divergence is 'kl'"),
        (ONE, dict(return_terms=1), TypeError, "return_terms is 1"),
        (ONE, dict(kd_weight=0.0, return_terms=1), TypeError, "return_terms is 1"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments: tuple, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        dkd_loss(*arguments, **options)


def test_reference_gradients_are_autograds() -> None:
    for divergence, reduction in itertools.product(DIVERGENCES, REDUCTIONS):
        student, teacher, labels = make(7, 6)
        args = (2.0, 0.5, 3.0, 0.7, divergence, True, -100, 0.1, reduction, True, True)
        ours = reference.dkd_loss(student.detach(), teacher.detach(), labels, *args)
        names: dict[str, Any] = dict(temperature=2.0, alpha=0.5, beta=3.0, ce_weight=0.7, divergence=divergence)
        expected = eager.dkd_loss(student, teacher, labels, **names, label_smoothing=0.1, reduction=reduction)
        grads = torch.autograd.grad(expected.sum(), (student, teacher))
        for value, true in zip(ours, (expected, *grads), strict=True):
            assert_accurate(value, true, true)
