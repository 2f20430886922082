from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from fastdistill.kernels import kd_ce_loss as module
from fastdistill.kernels.scale_rows import scale_rows_
from torch import Tensor

from tests.kernels import oracle
from tests.kernels.conftest import DEVICE
from tests.kernels.interpreter import OLD_INTERPRETER, interpreted

pytestmark = interpreted

DIVERGENCES = ("forward_kl", "soft_ce", "reverse_kl")
REDUCTIONS = ("mean", "sum", "none")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TILED, SWEPT = 130, 4100  # numbers of classes that take one kernel and the other


def make(*shape: int, dtypes: Any = torch.float32, scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, teacher logits, and labels of which about a tenth is ignored, but not the first."""
    g = torch.Generator().manual_seed(seed)
    pair = dtypes if isinstance(dtypes, tuple) else (dtypes, dtypes)
    student, teacher = ((torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(DEVICE, d) for d in pair)
    labels = torch.randint(shape[-1], shape[:-1], generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.1] = -100
    labels.view(-1)[:1] = shape[-1] // 2
    return student, teacher, labels.to(DEVICE)


def options(temperature: float = 2.0, kd_weight: float = 0.7, ce_weight: float = 0.3, divergence: str = "forward_kl",
            scale_by_temperature: bool = True, ignore_index: int = -100, label_smoothing: float = 0.0,
            reduction: str = "mean") -> tuple:  # fmt: skip
    """Every option of the op, in its order."""
    return (
        temperature, kd_weight, ce_weight, divergence, scale_by_temperature, ignore_index, label_smoothing, reduction
    )  # fmt: skip


def ordinary_errors(student: Tensor, teacher: Tensor, labels: Tensor | None, exact: tuple, *chosen: Any) -> list[float]:
    """The largest errors, in loss and gradients, of plain PyTorch in the logits' own dtypes. A loss that is one number
    may be near the answer by luck: the classes are taken in several orders, which the answer does not depend on."""
    errors, classes = [0.0, 0.0, 0.0], student.shape[-1]
    *before, ignore_index, smoothing, reduction = chosen
    after = (smoothing, reduction)
    for seed in range(8):
        order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        position, moved = order.argsort(), None
        if labels is not None:
            is_class = (labels >= 0) & (labels < classes)
            moved = torch.where(is_class, position[torch.where(is_class, labels, 0).long()], -1)
            moved[labels == ignore_index] = -100
        loss, *grads = oracle.with_gradients(student[..., order], teacher[..., order], moved, *before, -100, *after)
        for i, (value, answer) in enumerate(zip((loss, *(g[..., position] for g in grads)), exact, strict=True)):
            difference = (value.double() - answer).abs()
            errors[i] = max(errors[i], *difference[difference.isfinite()].tolist(), 0.0)
    return errors


def check(student: Tensor, teacher: Tensor, labels: Tensor | None, rounding: float = 0.0, **changes: Any) -> None:
    """The error is no more than twice what plain PyTorch's is, plus two ulp and what is said; where the answer is not
    finite, ours is the same."""
    chosen = options(**changes)
    ours = module.kd_ce_loss(student, teacher, labels, *chosen, True, True)
    exact = oracle.with_gradients(student.double(), teacher.double(), labels, *chosen)
    ordinary = ordinary_errors(student, teacher, labels, exact, *chosen)
    wide = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    ulps = 32 if wide == torch.float64 else 2  # in float64 the answer itself is no better
    dtypes = {"loss": wide, "student gradient": student.dtype, "teacher gradient": teacher.dtype}
    for i, (what, dtype) in enumerate(dtypes.items()):
        value, answer = ours[i], exact[i]
        assert value.dtype == dtype and value.shape == answer.shape, what
        finite = answer.isfinite()
        assert torch.equal(value[~finite].double().nan_to_num(7.0), answer[~finite].nan_to_num(7.0)), what
        if finite.any():
            value, answer = value[finite].double(), answer[finite]
            error = (value - answer).abs().max().item()
            limit = 2 * ordinary[i] + ulps * torch.finfo(dtype).eps * answer.abs().max().item() + rounding
            assert error <= limit, f"{what}: error {error:.3g} > {limit:.3g} (plain PyTorch: {ordinary[i]:.3g})"


@pytest.mark.slow
@pytest.mark.parametrize("classes", [3, SWEPT])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_option(classes: int, reduction: str, divergence: str) -> None:
    student, teacher, labels = make(2, 1, classes)
    common = {"reduction": reduction, "divergence": divergence}
    check(student, teacher, None, **common, scale_by_temperature=False)
    check(student, teacher, labels, **common, label_smoothing=0.1, temperature=3.7)
    check(student, teacher, labels, **common, ce_weight=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)))
def test_every_dtype(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(*make(4, TILED, dtypes=dtypes), label_smoothing=0.1)
    check(*make(2, SWEPT, dtypes=dtypes), divergence="reverse_kl", temperature=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 2, 3, 7, 127, 128, 129, 1000, 1024, 1025, 4096, 4097, 8192, 8193, 12289])
def test_every_width(classes: int, dtype: torch.dtype) -> None:
    check(*make(2, classes, dtypes=dtype))


def test_long_rows() -> None:
    check(*make(2, module.LONG_ROW + 8, dtypes=torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 511, 512, 513, 5000])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_number_of_rows(rows: int, reduction: str) -> None:
    check(*make(rows, 2), reduction=reduction)


@pytest.mark.slow
@pytest.mark.parametrize("rows, classes", [(64, TILED), (6, SWEPT)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.7, 20.0])
def test_every_temperature(rows: int, classes: int, dtype: torch.dtype, temperature: float) -> None:
    check(*make(rows, classes, dtypes=dtype), temperature=temperature, reduction="none")


@pytest.mark.parametrize("classes", [TILED, SWEPT])
def test_a_term_without_weight_is_not_computed(classes: int) -> None:
    student, teacher, labels = make(5, classes)
    unread = torch.full_like(teacher, torch.nan)
    chosen = options(temperature=3.7, kd_weight=0.0, divergence="reverse_kl", label_smoothing=0.1)
    ours = module.kd_ce_loss(student, unread, labels, *chosen, True, True)
    exact = oracle.with_gradients(student.double(), teacher.double(), labels, *chosen)
    for value, answer in zip(ours, exact, strict=True):
        torch.testing.assert_close(value, answer.float(), rtol=1e-5, atol=1e-7)
    assert ours[2].count_nonzero() == 0


@pytest.mark.slow
@pytest.mark.parametrize("classes", [TILED, SWEPT])
def test_gradients_only_where_asked_for(classes: int) -> None:
    student, teacher, labels = make(3, classes)
    call = (student, teacher, labels, *options(reduction="sum"))
    both = module.kd_ce_loss(*call, True, True)
    for wanted in itertools.product((False, True), repeat=2):
        loss, *grads = module.kd_ce_loss(*call, *wanted)
        torch.testing.assert_close(loss, both[0])
        for want, grad, expected in zip(wanted, grads, both[1:], strict=True):
            torch.testing.assert_close(grad, expected if want else expected.new_empty(0))


@pytest.mark.slow
@pytest.mark.parametrize("classes", [6, SWEPT])
def test_any_strides(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, labels = make(2, 3, classes + 5)
    labels = labels % classes
    check(student.transpose(0, 1), teacher.transpose(0, 1), labels.T)
    check(student.mT.contiguous().mT, teacher, labels)
    check(student[:, :2, :classes], teacher[:, 1:, 5:], labels[:, ::2])
    check(student[:1, :1].expand(2, 2, -1), teacher[0, 0].expand(2, 2, -1), labels[:, 1:])
    check(student[0, 0], teacher[0, 0], labels[0, 0])

    def copy(*_: Any) -> None:
        raise AssertionError("copied")

    monkeypatch.setattr(torch.Tensor, "contiguous", copy)
    views = student[..., :classes], student[..., 5:], student[:, 1], student[0, ::2], student[0, :1].expand(2, 3, -1)
    for even in views:
        rows, stride = module._rows(even)
        assert rows.data_ptr() == even.data_ptr() and rows.stride()[-2:] == (stride, 1)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [TILED, SWEPT])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_ignored_rows(classes: int, reduction: str, ce_weight: float) -> None:
    student, teacher, labels = make(5, classes)
    labels[:] = torch.tensor([1, -7, 0, -7, -7])
    student[1], teacher[3], teacher[4, 0] = torch.nan, torch.nan, torch.inf
    check(student, teacher, labels, ignore_index=-7, reduction=reduction, ce_weight=ce_weight)
    check(student, teacher, labels.clamp_min(0), ignore_index=0, reduction="none", ce_weight=ce_weight)


@pytest.mark.parametrize("rows, classes", [(3, 2), (600, 2), (3, SWEPT)])
def test_no_row_counts(rows: int, classes: int) -> None:
    student, teacher, labels = make(rows, classes)
    loss, *grads = module.kd_ce_loss(student, teacher, labels.fill_(-100), *options(), True, True)
    assert loss.isnan() and all(grad.count_nonzero() == 0 for grad in grads)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [TILED, SWEPT])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_labels_that_are_no_class(classes: int, ce_weight: float) -> None:
    student, teacher, labels = make(6, classes)
    labels[:] = torch.tensor([0, -1, classes, classes - 1, 2**40, -(2**40)])
    check(student, teacher, labels, reduction="none", ce_weight=ce_weight)
    no_teacher = options(kd_weight=0.0, ce_weight=1.0)
    grad = module.kd_ce_loss(student, teacher, labels, *no_teacher, False, True)[2]
    no_class = (labels < 0) | (labels >= classes)
    assert grad[no_class].isnan().all() and grad[~no_class].count_nonzero() == 0


def test_labels_that_are_no_class_count_in_the_mean() -> None:
    student, teacher, labels = make(6, TILED)
    labels[:] = torch.tensor([0, 1, 2, 3, -100, TILED])
    _, of_mean, _ = module.kd_ce_loss(student, teacher, labels, *options(), True, False)
    _, of_sum, _ = module.kd_ce_loss(student, teacher, labels, *options(reduction="sum"), True, False)
    torch.testing.assert_close(of_mean[:5] * 5, of_sum[:5])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_any_integer_labels(dtype: torch.dtype) -> None:
    student, teacher, labels = make(9, 100)
    for ignore_index in (-100, 5, 2**33):
        labels = labels.clamp_min(0)
        labels[::4] = 5
        check(student, teacher, labels.to(dtype), ignore_index=ignore_index)


@pytest.mark.parametrize("reduction, expected", [("mean", math.nan), ("sum", 0.0), ("none", None)])
def test_no_rows(reduction: str, expected: float | None) -> None:
    student, teacher, labels = make(2, 0, 5, dtypes=(torch.bfloat16, torch.float64))
    loss, *grads = module.kd_ce_loss(student, teacher, labels, *options(reduction=reduction), True, True)
    assert loss.dtype == torch.float64 and all(g.shape == student.shape for g in grads)
    if expected is None:
        assert loss.shape == (2, 0)
    else:
        torch.testing.assert_close(loss.item(), expected, equal_nan=True)


INF = torch.inf


@pytest.mark.slow
@pytest.mark.parametrize("classes", [TILED, SWEPT])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    "student_logit, teacher_logit, index",
    [
        (-INF, -INF, 3),  # probability 0 on both sides
        (-INF, 0.0, 3),
        (0.0, -INF, 3),
        (INF, 0.0, 3),
        (0.0, INF, 3),
        (torch.nan, 0.0, 3),
        (0.0, torch.nan, 3),
        (-INF, 0.0, slice(None)),
        (0.0, -INF, slice(None)),
        (-INF, -INF, slice(0, -1)),  # all but the last class
        (-INF, -5.0, slice(0, 2)),
        (200.0, -300.0, -1),  # far above, and far below, what the row begins with
        (-1e4, 1e4, -2),
    ],
)
def test_unusual_logits(classes: int, divergence: str, student_logit: float, teacher_logit: float, index: Any) -> None:
    student, teacher, labels = make(3 if classes == TILED else 1, classes, dtypes=torch.float64)
    labels[:] = 1
    student[0, index], teacher[0, index] = student_logit, teacher_logit
    chosen = options(divergence=divergence, reduction="none")
    ours = module.kd_ce_loss(student, teacher, labels, *chosen, True, True)
    exact = oracle.with_gradients(student, teacher, labels, *chosen)
    torch.testing.assert_close(ours[0], exact[0], equal_nan=True)
    for value, answer in zip(ours[1:], exact[1:], strict=True):
        torch.testing.assert_close(value[1:], answer[1:])
        known = answer[0].isfinite() if exact[0][0].isinf() else slice(None)  # an infinite loss has no gradient
        torch.testing.assert_close(value[0, known], answer[0, known], equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [TILED, SWEPT])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("size", [1e4, 1e8, 1e30])
def test_huge_logits(classes: int, divergence: str, size: float) -> None:
    """Huge, or ordinary but for a huge common offset; the loss may be huge too, but not overflow."""
    if OLD_INTERPRETER and classes == SWEPT and size == 1e4:
        pytest.skip("the interpreter of this Triton rounds twice in a fused multiply-add")
    student, teacher, labels = make(1, classes)
    check(student + size, teacher - size, labels, divergence=divergence, temperature=1.0)
    check(student * size, teacher * -size, labels, divergence=divergence)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [TILED, SWEPT])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_the_least_numbers(classes: int, divergence: str, dtype: torch.dtype) -> None:
    """They are rows of equals like any other."""
    student, teacher, labels = make(3, classes, dtypes=dtype)
    student[0] = student[1] = teacher[1] = teacher[2] = torch.finfo(dtype).min
    for temperature in (1.0, 2.0):
        check(student, teacher, labels, divergence=divergence, temperature=temperature)


@pytest.mark.parametrize("classes", [TILED, SWEPT])
def test_huge_logits_that_round_either_way(classes: int) -> None:
    student, teacher, labels = make(1, classes)
    student[0, 0] = 15
    for size in (1.3e30, 1.8e30):  # the maximum times log2(e) rounds down, and up
        check(student * size, teacher, labels, kd_weight=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("height", [20.0, 60.0, 85.0, 120.0])
def test_a_maximum_beyond_the_first_block(height: float, dtype: torch.dtype) -> None:
    student, teacher, labels = make(2, 9000, dtypes=dtype)
    student[0, -1], teacher[1, -2] = height, height
    # The teacher's gradient is a difference of gaps as large as that; the interpreter's exponential of 0 is exactly 1.
    rounding = torch.finfo(torch.float32).eps * height if DEVICE == "cuda" else 0.0
    check(student, teacher, labels, rounding=rounding, reduction="none")


@pytest.mark.skipif(DEVICE == "cuda", reason="looks into the interpreter")
def test_ordinary_rows_are_swept_twice_and_unusual_rows_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the plain sweeps multiply and add in one instruction: twice a block, and at the label."""
    from triton.runtime.interpreter import InterpreterBuilder

    calls = []
    create_fma = InterpreterBuilder.create_fma
    monkeypatch.setattr(InterpreterBuilder, "create_fma", lambda *args: calls.append(1) or create_fma(*args))
    student, teacher, labels = make(1, SWEPT)
    labels[:], blocks = 1, 3
    check(student * 10, teacher * 10, labels)
    assert len(calls) == 1 + 2 * blocks + 2 * blocks + 2
    calls.clear()
    teacher[0, 7] = -INF
    check(student, teacher, labels, divergence="soft_ce", ce_weight=0.0)
    assert len(calls) == 1 + 2 * blocks + 2 * blocks  # no gap is infinite
    calls.clear()
    check(student, teacher, labels)
    assert len(calls) == 1 + 2 * blocks


def test_float16_logits_at_a_high_temperature() -> None:
    """What pads the end of a row to a block must not count, however little a difference of logits matters."""
    check(*make(2, SWEPT + 1, dtypes=torch.float16), temperature=5e4, divergence="soft_ce", scale_by_temperature=False)


def test_label_smoothing_with_a_logit_of_minus_infinity() -> None:
    for classes in (TILED, SWEPT):
        student, teacher, labels = make(2, classes)
        student[0, 5] = -INF
        labels[:] = torch.tensor([5, 1])
        chosen = options(kd_weight=0.0, label_smoothing=0.1, reduction="none")
        loss = module.kd_ce_loss(student, teacher, labels, *chosen, False, False)[0]
        assert loss[0] == INF and loss[1].isfinite()


def test_many_losses_and_many_counts_add_up() -> None:
    """More of both than are taken at a time, which would take a batch too large for the interpreter."""
    losses = torch.arange(10000, dtype=torch.float64, device=DEVICE)
    counts = torch.arange(300, dtype=torch.int32, device=DEVICE)
    for mean, expected in ((False, losses.sum()), (True, losses.sum() / counts.sum())):
        loss = losses.new_empty(())
        module._reduce_kernel[(1,)](losses, counts, loss, len(losses), 0, len(counts), True, mean, module.REDUCE_BLOCK)
        torch.testing.assert_close(loss, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [2, SWEPT])
def test_no_synchronisation_and_the_same_bits_again(classes: int) -> None:
    inputs = make(700, classes)
    chosen = (*options(label_smoothing=0.1), True, True)
    first = module.kd_ce_loss(*inputs, *chosen)
    upstream = torch.tensor(2.0, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = module.kd_ce_loss(*inputs, *chosen)
        scale_rows_(again[1].clone(), upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
