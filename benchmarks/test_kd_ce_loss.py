"""kd_ce_loss, forward and gradients to the logits, against what it replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DEVICE, OURS, measure, sizes
from fastdistill import kd_ce_loss

LARGE = sizes(tiny=[(8, 100)], cpu=[(1024, 30522), (512, 128256)], cuda=[(8192, 32000), (8192, 128256), (32768, 8192)])
SMALL = sizes(tiny=[(32, 2)], cpu=[(32, 2), (4096, 3)], cuda=[(32, 2), (4096, 3), (32, 1000)])
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TEMPERATURE = 2.0

Inputs = tuple[Tensor, Tensor, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def kl(student: Tensor, teacher: Tensor, reduction: str) -> Tensor:
    ours, theirs = F.log_softmax(student / TEMPERATURE, -1), F.log_softmax(teacher / TEMPERATURE, -1)
    return F.kl_div(ours, theirs, log_target=True, reduction=reduction)


def eager(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return kl(student, teacher, "batchmean") * TEMPERATURE**2 + F.cross_entropy(student, labels)


def eager_by_row(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return kl(student, teacher, "none").sum(-1) * TEMPERATURE**2 + F.cross_entropy(student, labels, reduction="none")


def ours(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return kd_ce_loss(student, teacher, labels, temperature=TEMPERATURE)


def ours_by_row(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return kd_ce_loss(student, teacher, labels, temperature=TEMPERATURE, reduction="none")


def liger(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy, liger_kl_div

    log_student, target = F.log_softmax(student / TEMPERATURE, -1), F.softmax(teacher / TEMPERATURE, -1)
    return liger_kl_div(log_student, target) * TEMPERATURE**2 + liger_cross_entropy(student, labels)


def flash_linear_attention(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    from fla.modules import FusedCrossEntropyLoss

    kd = F.kl_div(
        F.log_softmax(student / TEMPERATURE, -1),
        F.log_softmax(teacher / TEMPERATURE, -1),
        log_target=True,
        reduction="batchmean",
    )
    return kd * TEMPERATURE**2 + FusedCrossEntropyLoss()(student, labels)


def compiled(loss: Loss) -> Loss:
    torch.compiler.reset()
    return torch.compile(loss, dynamic=False)


def gradient(loss: Loss, inputs: Inputs) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(loss(*inputs), inputs[0])


def op_alone(student: Tensor, teacher: Tensor, labels: Tensor) -> Callable[[], Any]:
    """Loss and gradient from the operator itself, for who needs no autograd engine around it."""
    op, student = torch.ops.fastdistill.kd_ce_loss.default, student.detach()
    options = (TEMPERATURE, 1.0, 1.0, "forward_kl", True, -100, 0.0, "mean", True, False)
    return lambda: op(student, teacher, labels, *options)


IMPLEMENTATIONS: dict[str, Callable[[Inputs], Callable[[], Any]]] = {
    "eager": lambda inputs: gradient(eager, inputs),
    "torch.compile": lambda inputs: gradient(compiled(eager), inputs),
    "Liger-Kernel": lambda inputs: gradient(liger, inputs),
    "flash-linear-attention": lambda inputs: gradient(flash_linear_attention, inputs),
    OURS: lambda inputs: gradient(ours, inputs),
    f"{OURS} (op alone)": lambda inputs: op_alone(*inputs),
}
NEEDS = {"Liger-Kernel": "liger_kernel", "flash-linear-attention": "fla"}
MEANS: dict[str, Callable[[], Loss]] = {
    "eager": lambda: eager,
    "torch.compile": lambda: compiled(eager),
    OURS: lambda: ours,
}
BY_ROW: dict[str, Callable[[], Loss]] = {
    "eager": lambda: eager_by_row,
    "torch.compile": lambda: compiled(eager_by_row),
    OURS: lambda: ours_by_row,
}


def make(rows: int, classes: int) -> Inputs:
    torch.manual_seed(0)
    student, teacher = (torch.randn(rows, classes, device=DEVICE, dtype=DTYPE) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(classes, (rows,), device=DEVICE)


def run(benchmark: Any, function: Callable[[], Any], inputs: Inputs, op: str, implementation: str, moved: int) -> None:
    """``moved``: how many times the logits' size must be read or written."""
    measure(
        benchmark,
        function,
        op=op,
        case="×".join(map(str, inputs[0].shape)),
        implementation=implementation,
        dtype=DTYPE,
        bytes_moved=moved * inputs[0].nbytes,
    )


@pytest.mark.parametrize("rows,classes", [*SMALL, *LARGE])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_kd_ce_loss(benchmark: Any, implementation: str, rows: int, classes: int) -> None:
    if implementation in NEEDS:
        pytest.importorskip(NEEDS[implementation])
        if DEVICE == "cpu":
            pytest.skip("runs on CUDA only")
    torch.compiler.reset()
    inputs = make(rows, classes)
    run(benchmark, IMPLEMENTATIONS[implementation](inputs), inputs, "kd_ce_loss", implementation, 3)


@pytest.mark.parametrize("rows,classes", SMALL)
@pytest.mark.parametrize("implementation", MEANS)
def test_forward(benchmark: Any, implementation: str, rows: int, classes: int) -> None:
    """As in evaluation: nothing wants a gradient."""
    loss, inputs = MEANS[implementation](), make(rows, classes)
    inputs[0].requires_grad_(False)
    run(benchmark, lambda: loss(*inputs), inputs, "kd_ce_loss, no gradient", implementation, 2)


@pytest.mark.parametrize("rows,classes", LARGE)
@pytest.mark.parametrize("implementation", BY_ROW)
def test_by_row(benchmark: Any, implementation: str, rows: int, classes: int) -> None:
    loss, inputs = BY_ROW[implementation](), make(rows, classes)
    grad_output = torch.rand_like(loss(*inputs))

    def step() -> Any:
        return torch.autograd.grad(loss(*inputs), inputs[0], grad_output)

    run(benchmark, step, inputs, 'kd_ce_loss, reduction="none"', implementation, 3)


@pytest.mark.parametrize("rows,classes", LARGE)
@pytest.mark.parametrize("implementation", MEANS)
def test_both_gradients(benchmark: Any, implementation: str, rows: int, classes: int) -> None:
    """To the teacher's logits, too."""
    loss, inputs = MEANS[implementation](), make(rows, classes)
    inputs[1].requires_grad_()
    both = inputs[:2]
    run(
        benchmark,
        lambda: torch.autograd.grad(loss(*inputs), both),
        inputs,
        "kd_ce_loss, both gradients",
        implementation,
        4,
    )
