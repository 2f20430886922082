"""dkd_loss, forward and gradient to the student's logits, against what it replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DEVICE, OURS, measure, sizes
from fastdistill import dkd_loss

CASES = sizes(
    tiny=[(32, 2)],
    cpu=[(64, 100), (1024, 1000), (1024, 30522)],
    cuda=[(64, 100), (4096, 1000), (8192, 32000)],
)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TEMPERATURE, ALPHA, BETA = 4.0, 1.0, 8.0


def eager(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """As the authors have it: the target is kept out by subtracting 1000, and its share is a probability."""
    target = F.one_hot(labels, student.shape[-1]).to(student.dtype)

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        p = (F.softmax(logits / TEMPERATURE, -1) * target).sum(-1)
        return torch.stack([p, 1 - p], -1), logits / TEMPERATURE - 1000 * target

    (own, others), (own_teacher, others_teacher) = parts(student), parts(teacher)
    tckd = F.kl_div(own.log(), own_teacher, reduction="batchmean")
    nckd = F.kl_div(F.log_softmax(others, -1), F.softmax(others_teacher, -1), reduction="batchmean")
    return (ALPHA * tckd + BETA * nckd) * TEMPERATURE**2 + F.cross_entropy(student, labels)


def ours(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return dkd_loss(student, teacher, labels, alpha=ALPHA, beta=BETA, temperature=TEMPERATURE)


IMPLEMENTATIONS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "eager": lambda: eager,
    "torch.compile": lambda: torch.compile(eager, dynamic=False),
    OURS: lambda: ours,
}


@pytest.mark.parametrize("rows,classes", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dkd_loss(benchmark: Any, implementation: str, rows: int, classes: int) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    student, teacher = (torch.randn(rows, classes, device=DEVICE, dtype=DTYPE) for _ in range(2))
    student.requires_grad_()
    labels, loss = torch.randint(classes, (rows,), device=DEVICE), IMPLEMENTATIONS[implementation]()
    measure(
        benchmark,
        lambda: torch.autograd.grad(loss(student, teacher, labels), student),
        op="dkd_loss",
        case=f"{rows}×{classes}",
        implementation=implementation,
        dtype=DTYPE,
        bytes_moved=3 * student.nbytes,
    )
