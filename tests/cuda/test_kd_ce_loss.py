"""What only a GPU shows, and every way through the CUDA kernels; tests/ops checks the answers on every device.

Up to 1024 classes a thread, some lanes or a warp have a row. On sm_90 longer rows that begin aligned alike are streamed
by clusters of 1, 2, 4 or 8 blocks, and copied twice where these do not hold them; any other row is one block's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import kd_ce_loss
from tests import eager
from tests.accuracy import assert_accurate
from tests.kernels import oracle

pytestmark = pytest.mark.gpu

INF = torch.inf
DIVERGENCES = ("forward_kl", "soft_ce", "reverse_kl")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FEW = [2, 3, 5, 32, 33, 256, 257, 1000, 1024]
STREAMED = [1032, 8192, 32000, 50264, 128256, 300000, 700000]  # clusters of 1 to 8, the last copied twice in bfloat16
UNALIGNED = [1025, 8191, 50257, 128255]


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def step(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(kd_ce_loss(student, teacher, labels, temperature=2.0), student)[0]


def make(rows: int, classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student, teacher = (torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(classes, (rows,), device="cuda")


@pytest.mark.parametrize("classes", [2, 100, 32000])
def test_never_waits_for_the_device(classes: int, request: pytest.FixtureRequest) -> None:
    inputs = make(64, classes)
    step(*inputs)  # compiles the kernels
    request.getfixturevalue("no_synchronisation")
    step(*inputs)


@pytest.mark.parametrize("classes", [5, 5000])
@pytest.mark.parametrize("bad", [-1, 5000, 10**12])
def test_label_outside_spoils_only_its_row(classes: int, bad: int) -> None:
    student, teacher, labels = make(6, classes)
    labels[2] = bad
    loss = kd_ce_loss(student, teacher, labels, reduction="none")
    grad = torch.autograd.grad(loss.sum(), student)[0]
    spoilt = [False, False, True, False, False, False]
    assert loss.isnan().tolist() == spoilt and grad.isnan().all(-1).tolist() == spoilt


@pytest.mark.parametrize("rows,classes", [(64, 128256), (4096, 3)])
def test_large_problems_in_bfloat16(rows: int, classes: int) -> None:
    student, teacher, labels = make(rows, classes)
    exact, plain = (
        torch.autograd.grad(eager.kd_ce_loss(leaf, teacher.to(leaf.dtype), labels, temperature=2.0), leaf)[0]
        for leaf in (x.requires_grad_() for x in (student.detach().double(), student.detach().clone()))
    )
    assert_accurate(step(student, teacher, labels), exact, plain)


def test_replays_in_a_cuda_graph() -> None:
    student, teacher, labels = make(32, 2)
    step(student, teacher, labels)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(student, teacher, labels)
    with torch.no_grad():
        student.copy_(torch.randn_like(student))
    graph.replay()
    torch.testing.assert_close(captured, step(student, teacher, labels))


def options(temperature: float = 2.0, kd_weight: float = 0.7, ce_weight: float = 0.3, divergence: str = "forward_kl",
            scale_by_temperature: bool = True, ignore_index: int = -100, label_smoothing: float = 0.0,
            reduction: str = "mean") -> tuple:  # fmt: skip
    """Every option of the op, in its order."""
    return (
        temperature, kd_weight, ce_weight, divergence, scale_by_temperature, ignore_index, label_smoothing, reduction
    )  # fmt: skip


def draw(rows: int, classes: int, dtypes: Any = torch.bfloat16, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, teacher logits, and labels of which about a tenth is ignored, but not the first."""
    g = torch.Generator("cuda").manual_seed(0)
    pair = dtypes if isinstance(dtypes, tuple) else (dtypes, dtypes)
    student, teacher = ((torch.randn(rows, classes, generator=g, device="cuda") * scale).to(dtype) for dtype in pair)
    labels = torch.randint(classes, (rows,), generator=g, device="cuda")
    labels[torch.rand(rows, generator=g, device="cuda") < 0.1] = -100
    labels[0] = classes - 1
    return student, teacher, labels


def op(student: Tensor, teacher: Tensor, labels: Tensor | None, *chosen: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.fastdistill.kd_ce_loss.default(student, teacher, labels, *chosen)


def check(student: Tensor, teacher: Tensor, labels: Tensor | None, **changes: Any) -> None:
    """Loss and both gradients against float64; where the answer is not finite, ours is the same. All in fresh memory
    that holds NaN."""
    chosen = options(**changes)
    exact = oracle.with_gradients(student.double(), teacher.double(), labels, *chosen)
    plain = oracle.with_gradients(student, teacher, labels, *chosen)
    with torch.no_grad():
        ours = op(student, teacher, labels, *chosen, True, True)
    for what, value, answer, ordinary in zip(("loss", "student", "teacher"), ours, exact, plain, strict=True):
        finite = answer.isfinite()
        same = value.double().nan_to_num(7.0)[~finite] == answer.nan_to_num(7.0)[~finite]
        assert same.all() and value.shape == answer.shape, what
        if finite.any():
            ordinary = torch.where(ordinary.isfinite(), ordinary, 0)  # half precision may overflow where ours does not
            assert_accurate(value[finite], answer[finite], ordinary[finite], what)


@pytest.mark.parametrize("classes", FEW + STREAMED + UNALIGNED)
def test_every_width(classes: int, nan_filled: None) -> None:
    check(*draw(5, classes))


@pytest.mark.parametrize("classes", [3, 100, 1000, 1033, 8192, 40000])
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)))
def test_every_dtype(classes: int, dtypes: tuple[torch.dtype, torch.dtype], nan_filled: None) -> None:
    check(*draw(5, classes, dtypes), label_smoothing=0.1)
    check(*draw(5, classes, dtypes), temperature=3.7, divergence="reverse_kl")


@pytest.mark.parametrize("classes", [7, 300, 9000, 50257])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_option(classes: int, reduction: str, divergence: str, nan_filled: None) -> None:
    inputs = draw(6, classes)
    common = {"reduction": reduction, "divergence": divergence}
    for temperature in (0.5, 1.0, 2.0, 3.0, 3.7, 16.0):
        check(*inputs, **common, temperature=temperature)
    check(*inputs, **common, label_smoothing=0.1)
    check(*inputs, **common, ce_weight=0.0, scale_by_temperature=False)
    check(*inputs[:2], None, **common)
    check(*inputs, **common, kd_weight=0.0, label_smoothing=0.2)


@pytest.mark.parametrize("rows", [1, 2, 131, 133, 1000, 5000])
@pytest.mark.parametrize("classes", [2, 3, 40, 1000, 2048, 8192])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_number_of_rows(rows: int, classes: int, reduction: str, nan_filled: None) -> None:
    check(*draw(rows, classes), reduction=reduction)


@pytest.mark.parametrize("classes", [100, 8192, 50257])
@pytest.mark.parametrize("rows", [3, 700, 9000])
def test_ignored_rows_and_labels_that_are_no_class(classes: int, rows: int, nan_filled: None) -> None:
    student, teacher, labels = draw(rows, classes)
    labels[1::2] = -100
    student[1], teacher[1, 0] = torch.nan, INF
    check(student, teacher, labels)
    check(student, teacher, labels.fill_(-100), reduction="sum")
    student, teacher, labels = draw(6, classes)
    labels[:] = torch.tensor([0, -1, classes, classes - 1, 2**40, -(2**40)])
    check(student, teacher, labels, reduction="none")
    check(student, teacher, labels, reduction="none", ce_weight=0.0)
    assert op(student, teacher, labels.fill_(-100), *options(), True, False)[0].isnan()


@pytest.mark.parametrize("classes", [100, 8192, 8191, 128256, 700000])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    "student_logit, teacher_logit, index",
    [
        (-INF, -INF, 3),
        (-INF, -INF, slice(0, 90)),
        (-INF, 0.0, 3),
        (0.0, -INF, 3),
        (INF, 0.0, 3),
        (0.0, INF, 3),
        (torch.nan, 0.0, 3),
        (0.0, torch.nan, -1),
        (-INF, 0.0, slice(None)),
        (0.0, -INF, slice(None)),
        (-INF, -INF, slice(0, -1)),
        (200.0, -300.0, -1),  # far above, and far below, what the row begins with
        (-1e4, 1e4, -2),
        (1e30, 1e30, 5),
    ],
)
def test_unusual_logits(classes: int, divergence: str, student_logit: float, teacher_logit: float, index: Any) -> None:
    student, teacher, labels = draw(3, classes, torch.float32)
    labels[:] = 1
    student[1, index], teacher[1, index] = student_logit, teacher_logit
    for dtype in (torch.float32, torch.bfloat16):
        chosen = options(divergence=divergence, reduction="none")
        inputs = student.to(dtype), teacher.to(dtype), labels
        ours = op(*inputs, *chosen, True, True)
        exact = oracle.with_gradients(*(x.double() for x in inputs[:2]), labels, *chosen)
        gap = max((abs(x) for x in (student_logit, teacher_logit) if 10 < abs(x) <= 1e4), default=10)
        torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=1e-6 * gap, equal_nan=True)
        for value, answer in zip(ours[1:], exact[1:], strict=True):
            for row in range(3):
                known = answer[row].isfinite() if exact[0][row].isinf() else slice(None)  # no gradient of infinity
                torch.testing.assert_close(
                    value[row, known].double(), answer[row, known], rtol=4 * torch.finfo(dtype).eps,
                    atol=1e-6 * gap, equal_nan=True,
                )  # fmt: skip


@pytest.mark.parametrize("classes", [100, 9000, 9001])
@pytest.mark.parametrize("size", [1e4, 1e8, 1e30])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_huge_logits(classes: int, size: float, divergence: str) -> None:
    """Huge, or ordinary but for a huge common offset. The side that weighs has a gradient of differences of logits."""
    student, teacher, labels = draw(4, classes, torch.float32)
    chosen = options(divergence=divergence, temperature=1.0)
    for inputs, gap in (((student + size, teacher - size), 100.0), ((student * size, teacher * -size), 30 * size)):
        ours = op(*inputs, labels, *chosen, True, True)
        exact = oracle.with_gradients(*(x.double() for x in inputs), labels, *chosen)
        torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=1e-5)
        rounding = 1e-6, torch.finfo(torch.float32).eps * gap
        tolerances = sorted(rounding, reverse=divergence == "reverse_kl")
        for value, answer, atol in zip(ours[1:], exact[1:], tolerances, strict=True):
            torch.testing.assert_close(value.double(), answer, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("classes", [6, 1030, 9000])
def test_any_strides(classes: int, nan_filled: None) -> None:
    student, teacher, labels = draw(6, classes + 8)
    labels %= classes
    check(student[:, :classes], teacher[:, 8:], labels)
    check(student[:, 3 : classes + 3], teacher[:, :classes], labels)
    check(student[::2, :classes], teacher[:1, :classes].expand(3, -1), labels[::2])
    check(student.T.contiguous().T, teacher, labels)
    check(student.view(2, 3, -1).transpose(0, 1), teacher.view(3, 2, -1), labels.view(2, 3).T)


@pytest.mark.parametrize("classes", [40, 2048, 50257])
def test_gradients_only_where_asked_for_and_the_same_bits_again(classes: int) -> None:
    inputs, chosen = draw(300, classes), options(label_smoothing=0.1)
    both = op(*inputs, *chosen, True, True)
    for wanted in itertools.product((False, True), repeat=2):
        loss, *grads = op(*inputs, *chosen, *wanted)
        assert torch.equal(loss, both[0])
        for want, grad, expected in zip(wanted, grads, both[1:], strict=True):
            assert torch.equal(grad, expected if want else expected.new_empty(0))


@pytest.mark.parametrize("rows, classes", [(4096, 3), (64, 8192), (16, 128256)])
def test_large_rows_replay_in_a_cuda_graph(rows: int, classes: int) -> None:
    student, teacher, labels = make(rows, classes)
    step(student, teacher, labels)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(student, teacher, labels)
    for _ in range(3):
        with torch.no_grad():
            student.copy_(torch.randn_like(student))
        graph.replay()
        assert torch.equal(captured, step(student, teacher, labels))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(700, 3), (2, 3, 1500), (5, 1), (4,), (0, 3), (3, 40001)])
def test_scale_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    grad = torch.randn(shape, device="cuda").to(dtype)
    lead = shape[:-1]
    upstreams = [
        torch.tensor(0.3, device="cuda", dtype=torch.float64),
        torch.tensor(1.0, device="cuda"),
        torch.tensor(-2.0, device="cuda").expand(lead),
        torch.randn(lead, device="cuda"),
        torch.randn(*lead, 2, device="cuda")[..., 0],
    ]
    for upstream in upstreams:
        expected = (grad.double() * upstream.double().unsqueeze(-1)).to(dtype)
        scaled = torch.ops.fastdistill.scale_rows(grad, upstream)
        torch.testing.assert_close(scaled, expected)
        for in_place in (grad.clone(), torch.stack([grad, grad], -1)[..., 0]):
            torch.ops.fastdistill.scale_rows_(in_place, upstream)
            assert torch.equal(in_place, scaled)
