from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdistill import kd_ce_loss
from fastdistill.ops import reference
from tests import eager
from tests.ops.losses import DIVERGENCES, DTYPES, REDUCTIONS, check_against_eager, make, with_gradients


@pytest.mark.parametrize("classes", [2, 3, 7, 16, 17, 32, 33, 100, 129, 2049])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_dtype_and_width(
    device: str, classes: int, dtype: torch.dtype, divergence: str, nan_filled: None
) -> None:
    for temperature, smoothing in ((1.0, 0.0), (2.0, 0.1), (3.7, 0.0)):
        inputs = make(37, classes, device=device, dtypes=(dtype, dtype))
        check_against_eager(*inputs, temperature=temperature, divergence=divergence, label_smoothing=smoothing)


@pytest.mark.parametrize("classes", [3, 70])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.0), (0.0, 0.3)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_option(
    device: str, classes: int, reduction: str, weights: tuple, divergence: str, nan_filled: None
) -> None:
    for temperature, scaled, labelled in itertools.product((0.5, 1.0, 2.0), (True, False), (True, False)):
        student, teacher, labels = make(4, 5, classes, device=device, dtypes=(torch.float32, torch.float32))
        if not labelled and weights[0] == 0:
            continue
        check_against_eager(
            student, teacher, labels if labelled else None, temperature=temperature, scale_by_temperature=scaled,
            kd_weight=weights[0], ce_weight=weights[1] if labelled else 0.0, divergence=divergence, reduction=reduction,
        )  # fmt: skip


@pytest.mark.parametrize("classes", [2, 10, 100, 5000])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1e-4, 0.03, 8.0, 30.0, 100.0])
def test_every_temperature_is_as_good_as_eager(device: str, classes: int, divergence: str, temperature: float) -> None:
    """Of many rows: where the temperature is low a few have all of a gradient, and their last digits are luck."""
    rows, scale = 2000 if classes <= 100 else 64, min(3.0, 300 * temperature)
    inputs = make(rows, classes, device=device, dtypes=(torch.float32, torch.float32), scale=scale)
    check_against_eager(*inputs, temperature=temperature, divergence=divergence, reduction="none")


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_distributions_of_one_class_are_right(device: str, divergence: str) -> None:
    """What a low temperature makes of ordinary logits: exponents of thousands, probabilities of 1 and 0."""
    student, teacher, labels = make(500, 10, device=device, dtypes=(torch.float32, torch.float32))
    options = dict(temperature=1e-4, divergence=divergence, reduction="sum")
    ours = with_gradients(kd_ce_loss, student, teacher, labels, **options)
    exact_inputs = [x.detach().double().requires_grad_() for x in (student, teacher)]
    exact = with_gradients(eager.kd_ce_loss, *exact_inputs, labels, **options)
    for value, answer in zip(ours, exact, strict=True):
        torch.testing.assert_close(value.double(), answer, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("classes", [2, 10, 100, 5000])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [101.0, 1000.0, 10000.0])
def test_high_temperatures_are_right(device: str, classes: int, divergence: str, temperature: float) -> None:
    """To the last digits of float32, where plain PyTorch in float32 has none that are right."""
    student, teacher, labels = make(16, classes, device=device, dtypes=(torch.float32, torch.float32))
    options = dict(temperature=temperature, divergence=divergence)
    ours = with_gradients(kd_ce_loss, student, teacher, labels, **options)
    exact = with_gradients(
        eager.kd_ce_loss, student.detach().double().requires_grad_(), teacher.detach().double().requires_grad_(),
        labels, **options,
    )  # fmt: skip
    assert ours[0].dtype == ours[1].dtype == ours[2].dtype == torch.float32 and ours[0] > 0
    for value, answer in zip(ours, exact, strict=True):
        torch.testing.assert_close(value.double(), answer, rtol=2e-6, atol=1e-12)


def test_cross_entropy_alone_needs_no_teacher(device: str) -> None:
    student, teacher, labels = make(9, 40, device=device)
    options: dict[str, Any] = dict(kd_weight=0.0, ce_weight=0.7, label_smoothing=0.1)
    loss = kd_ce_loss(student, None, labels, **options)
    torch.testing.assert_close(loss, kd_ce_loss(student, teacher, labels, **options))
    expected = torch.nn.functional.cross_entropy(student, labels, label_smoothing=0.1) * 0.7
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(expected, student))


@pytest.mark.parametrize("classes", [4, 40])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_terms_are_each_loss_alone(device: str, classes: int, reduction: str, nan_filled: None) -> None:
    student, teacher, labels = make(9, classes, device=device, dtypes=(torch.float32, torch.float32))
    options: dict[str, Any] = dict(temperature=2.0, label_smoothing=0.1, reduction=reduction)
    loss, kd, ce = kd_ce_loss(student, teacher, labels, kd_weight=0.7, ce_weight=0.3, return_terms=True, **options)
    plain = kd_ce_loss(student, teacher, labels, kd_weight=0.7, ce_weight=0.3, **options)
    assert torch.equal(loss, plain) and not kd.requires_grad and not ce.requires_grad
    torch.testing.assert_close(kd, kd_ce_loss(student, teacher, labels, ce_weight=0.0, **options))
    torch.testing.assert_close(ce, kd_ce_loss(student, None, labels, kd_weight=0.0, **options))
    upstream = torch.rand_like(loss)
    grads = (torch.autograd.grad(x, (student, teacher), upstream) for x in (loss, plain))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_term_that_is_not_computed_is_0(device: str) -> None:
    student, teacher, labels = make(9, 40, device=device)
    assert kd_ce_loss(student, None, labels, kd_weight=0.0, return_terms=True)[1] == 0
    assert kd_ce_loss(student, teacher, labels, ce_weight=0.0, return_terms=True)[2] == 0
    loss, kd, ce = kd_ce_loss(student, teacher, temperature=200.0, kd_weight=0.5, return_terms=True)
    assert ce == 0 and kd > 0 and torch.allclose(loss, 0.5 * kd)


@pytest.mark.parametrize("dtypes", [d for d in itertools.product(DTYPES, DTYPES) if d[0] != d[1]])
def test_mixed_dtypes(device: str, dtypes: tuple, nan_filled: None) -> None:
    student, teacher, labels = make(9, 40, device=device, dtypes=dtypes)
    ours = with_gradients(kd_ce_loss, student, teacher, labels, temperature=2.0)
    wide = [x.detach().double().requires_grad_() for x in (student, teacher)]
    exact = with_gradients(kd_ce_loss, *wide, labels, temperature=2.0)
    assert ours[0].dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    for value, true, dtype in zip(ours, exact, (torch.float32, *dtypes), strict=True):
        torch.testing.assert_close(value.double(), true, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
        assert value is ours[0] or value.dtype == dtype


@settings(deadline=None, max_examples=60)
@given(
    leading=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    classes=st.integers(2, 80),
    divergence=st.sampled_from(DIVERGENCES),
    reduction=st.sampled_from(REDUCTIONS),
    temperature=st.floats(0.25, 8),
    layout=st.sampled_from(["contiguous", "sliced", "transposed", "expanded"]),
    label_dtype=st.sampled_from([torch.int64, torch.int32, torch.int16]),
)
def test_any_shape_and_layout(
    leading: list[int],
    classes: int,
    divergence: str,
    reduction: str,
    temperature: float,
    layout: str,
    label_dtype: torch.dtype,
) -> None:
    student, teacher, labels = make(*leading, classes)
    if layout == "sliced":
        teacher = torch.cat([teacher, teacher], -1)[..., :classes].detach().requires_grad_()
    elif layout == "transposed":
        teacher = teacher.detach().movedim(-1, 0).contiguous().movedim(0, -1).requires_grad_()
    elif layout == "expanded":
        teacher = teacher.detach().reshape(-1, classes)[:1].sum(0).expand(student.shape).requires_grad_()
    options = dict(divergence=divergence, reduction=reduction, temperature=temperature)
    ours = with_gradients(kd_ce_loss, student, teacher, labels.to(label_dtype), **options)
    plain = with_gradients(eager.kd_ce_loss, student, teacher, labels, **options) if leading else None
    if plain is None:  # F.cross_entropy wants a batch dimension
        plain = with_gradients(
            eager.kd_ce_loss,
            *(x.detach()[None].requires_grad_() for x in (student, teacher)), labels[None], **options,
        )  # fmt: skip
        plain = tuple(p if reduction != "none" and i == 0 else p[0] for i, p in enumerate(plain))
    for value, expected in zip(ours, plain, strict=True):
        if reduction == "mean" and not (labels != -100).any():
            assert ours[0].isnan()
            break
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("classes", [4, 40])
def test_gradcheck(divergence: str, reduction: str, classes: int) -> None:
    student, teacher, labels = make(3, classes, scale=1.0)
    options = dict(temperature=1.7, divergence=divergence, reduction=reduction, label_smoothing=0.1, ce_weight=0.5)
    assert torch.autograd.gradcheck(lambda s, t: kd_ce_loss(s, t, labels, **options), (student, teacher))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reduction", "wanted"),
    [("mean", (True, True)), ("sum", (True, False)), ("none", (False, False)), ("none", (True, True))],
)
def test_opcheck(device: str, reduction: str, wanted: tuple[bool, bool]) -> None:
    student, teacher, labels = make(5, 7, device=device)
    student.requires_grad_(wanted[0]), teacher.requires_grad_(wanted[1])
    args = (2.0, 1.0, 0.5, "forward_kl", True, -100, 0.1, reduction, *wanted)
    torch.library.opcheck(torch.ops.fastdistill.kd_ce_loss.default, (student, teacher, labels, *args))


@pytest.mark.parametrize("op", ["scale_rows", "scale_rows_"])
@pytest.mark.parametrize("upstream", [torch.tensor(2.0), torch.tensor(1.0), torch.linspace(0, 1, 5)])
def test_opcheck_scale_rows(device: str, op: str, upstream: Tensor) -> None:
    args = (torch.randn(5, 7, device=device), upstream.to(device))
    torch.library.opcheck(getattr(torch.ops.fastdistill, op).default, args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [3, 2049])
def test_scale_rows(device: str, dtype: torch.dtype, classes: int, nan_filled: None) -> None:
    grad = torch.randn(6, classes, device=device).to(dtype)
    for upstream in (torch.tensor(1.0), torch.tensor(2.5), torch.tensor([1.0, 0.0, 1.0, -2.0, 0.5, 3.0])):
        expected = reference.scale_rows(grad, upstream.to(device))
        for laid_out in (grad, grad.T.contiguous().T, torch.cat([grad, grad], -1)[:, :classes]):
            in_place = laid_out.clone(memory_format=torch.preserve_format)
            torch.ops.fastdistill.scale_rows_(in_place, upstream.to(device))
            assert torch.equal(torch.ops.fastdistill.scale_rows(laid_out, upstream.to(device)), expected)
            assert torch.equal(in_place, expected)


def test_compiles_whole(device: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda *a: kd_ce_loss(*a, temperature=2.0) * 3, fullgraph=True, dynamic=True)
    for rows in (4, 6):
        inputs = make(rows, 9, device=device, dtypes=(torch.float32, torch.float32))
        plain = with_gradients(lambda *a: kd_ce_loss(*a, temperature=2.0) * 3, *inputs)
        for value, expected in zip(with_gradients(compiled, *inputs), plain, strict=True):
            torch.testing.assert_close(value, expected)


def test_autocast_computes_in_float32(device: str) -> None:
    student, teacher, labels = make(8, 33, device=device, dtypes=(torch.bfloat16, torch.bfloat16))
    plain = with_gradients(kd_ce_loss, student, teacher, labels)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = kd_ce_loss(student, teacher, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, plain[0])


def test_backward_twice_over_a_retained_graph(device: str) -> None:
    student, teacher, labels = make(6, 50, device=device)
    loss = kd_ce_loss(student, teacher, labels, temperature=2.0)
    first = torch.autograd.grad(loss * 3, student, retain_graph=True)[0]
    kept = first.clone()
    second = torch.autograd.grad(loss, student)[0]
    assert torch.equal(first, kept)
    torch.testing.assert_close(first, 3 * second)


def test_gradients_accumulate_and_reach_only_who_asks(device: str) -> None:
    student, teacher, labels = make(6, 50, device=device)
    frozen = teacher.detach()
    for _ in range(2):
        kd_ce_loss(student, frozen, labels).backward()
    expected = torch.autograd.grad(eager.kd_ce_loss(student, frozen, labels), student)[0]
    torch.testing.assert_close(student.grad, 2 * expected)
    assert frozen.grad is None
    with torch.no_grad():
        assert not kd_ce_loss(student, teacher, labels).requires_grad


def test_second_derivative_is_an_error() -> None:
    student, teacher, labels = make(6, 5)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(kd_ce_loss(student, teacher, labels) ** 2, student, create_graph=True)


def logits(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((logits(4, 3), logits(5, 3)), {}, ValueError, "teacher_logits has shape (5, 3).*leading shape"),
        ((logits(4, 3), logits(4, 2)), {}, ValueError, "teacher_logits has shape (4, 2).*number of classes"),
        ((logits(4, 1), logits(4, 1)), {}, ValueError, "student_logits.*regression.*mse_loss"),
        ((logits(()), logits(())), {}, ValueError, "student_logits has shape ()"),
        (([[0.0, 1.0]], logits(1, 2)), {}, TypeError, "student_logits is a list"),
        ((logits(1, 2), logits(1, 2, dtype=torch.int64)), {}, TypeError, "teacher_logits has dtype torch.int64"),
        ((logits(1, 2), logits(1, 2, device="meta")), {}, ValueError, "teacher_logits is on meta"),
        ((logits(4, 3), logits(4, 3), logits(4)), {}, TypeError, "labels has dtype torch.float32"),
        ((logits(4, 3), logits(4, 3), logits(4, dtype=torch.bool)), {}, TypeError, "labels has dtype torch.bool"),
        ((logits(4, 3), logits(4, 3), logits(3, dtype=torch.int64)), {}, ValueError, r"labels has shape (3,)"),
        ((logits(4, 3), logits(4, 3), [0, 1, 2, 0]), {}, TypeError, "labels is a list"),
        ((logits(4, 3), logits(4, 3)), dict(temperature=0), ValueError, "temperature is 0; expected .*>= 0.0001"),
        ((logits(4, 3), logits(4, 3)), dict(temperature=-1.0), ValueError, "temperature is -1.0"),
        ((logits(4, 3), logits(4, 3)), dict(temperature=math.inf), ValueError, "temperature is inf"),
        ((logits(4, 3), logits(4, 3)), dict(temperature=math.nan), ValueError, "temperature is nan"),
        ((logits(4, 3), logits(4, 3)), dict(temperature="2"), TypeError, "temperature is '2'"),
        ((logits(4, 3), logits(4, 3)), dict(temperature=True), TypeError, "temperature is True"),
        ((logits(4, 3), logits(4, 3)), dict(temperature=9e-5), ValueError, "temperature is 9e-05; .*>= 0.0001"),
        ((logits(4, 3), logits(4, 3)), dict(temperature=1e5), ValueError, "temperature is 100000.0; .*<= 10000.0"),
        ((logits(4, 3), logits(4, 3)), dict(temperature=10**400), ValueError, "temperature is an int of 1329 bits"),
        ((logits(4, 3), logits(4, 3)), dict(kd_weight=10**400), ValueError, "kd_weight is an int of 1329 bits"),
        ((logits(4, 3), logits(4, 3)), dict(scale_by_temperature="no"), TypeError, "scale_by_temperature is 'no'"),
        ((logits(4, 3), logits(4, 3)), dict(scale_by_temperature=1), TypeError, "scale_by_temperature is 1; exp"),
        ((logits(4, 3), logits(4, 3)), dict(return_terms=1), TypeError, "return_terms is 1; expected a bool"),
        ((logits(4, 3), logits(4, 3)), dict(ignore_index=10**30), ValueError, "ignore_index is 1000.*int of 64 bits"),
        ((logits(4, 3), logits(4, 3)), dict(ignore_index=True), TypeError, "ignore_index is True; expected an int"),
        ((logits(4, 3), [[1.0, 2.0], [1.0]]), {}, TypeError, "teacher_logits is a list; expected a torch.Tensor"),
        ((logits(4, 3), "text"), {}, TypeError, "teacher_logits is a str; expected a torch.Tensor"),
        ((logits(4, 3), logits(4, 3)), dict(kd_weight=-0.1), ValueError, "kd_weight is -0.1; expected.*>= 0"),
        ((logits(4, 3), logits(4, 3)), dict(ce_weight=-1), ValueError, "ce_weight is -1"),
        ((logits(4, 3), logits(4, 3)), dict(ce_weight=2.0), ValueError, "ce_weight is 2.0 but labels is None"),
        ((logits(4, 3), logits(4, 3)), dict(kd_weight=0), ValueError, "kd_weight and ce_weight are both 0"),
        ((logits(4, 3), None, torch.zeros(4).long()), {}, ValueError, "teacher_logits is None but kd_weight is 1.0"),
        ((None, None), dict(kd_weight=0), TypeError, "student_logits is a NoneType"),
        ((logits(4, 3), logits(4, 3)), dict(ignore_index=0), ValueError, "ignore_index is 0 but labels is None"),
        ((logits(4, 3), logits(4, 3)), dict(label_smoothing=0.1), ValueError, "label_smoothing is 0.1 but labels"),
        ((logits(4, 3), logits(4, 3)), dict(label_smoothing=1.0), ValueError, "label_smoothing is 1.0.*< 1"),
        ((logits(4, 3), logits(4, 3)), dict(divergence="kl"), ValueError, "divergence is 'kl'; expected one of 'forw"),
        ((logits(4, 3), logits(4, 3)), dict(reduction="avg"), ValueError, "reduction is 'avg'; expected one of 'mean'"),
        ((logits(4, 3), logits(4, 3)), dict(ignore_index=1.5), TypeError, "ignore_index is 1.5; expected an int"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments: tuple, options: dict, error: type, message: str) -> None:
    pattern = message.replace("(", r"\(").replace(")", r"\)") if r"\(" not in message else message
    with pytest.raises(error, match=pattern):
        kd_ce_loss(*arguments, **options)


def test_reference_gradients_are_autograds() -> None:
    for divergence, reduction in itertools.product(DIVERGENCES, REDUCTIONS):
        student, teacher, labels = make(7, 6)
        args = (2.0, 0.5, 0.7, divergence, True, -100, 0.1, reduction, True, True)
        loss, *grads = reference.kd_ce_loss(student.detach(), teacher.detach(), labels, *args)
        names = dict(temperature=2.0, kd_weight=0.5, ce_weight=0.7, divergence=divergence, label_smoothing=0.1)
        expected = eager.kd_ce_loss(student, teacher, labels, **names, reduction=reduction)
        torch.testing.assert_close(loss, expected)
        for grad, true in zip(grads, torch.autograd.grad(expected.sum(), (student, teacher)), strict=True):
            torch.testing.assert_close(grad, true)
