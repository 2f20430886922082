"""What only a GPU shows; the answers themselves are checked in tests/ops on every device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastdistill import kd_ce_loss
from tests import eager
from tests.accuracy import assert_accurate

pytestmark = pytest.mark.gpu


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
