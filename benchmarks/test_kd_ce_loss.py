"""kd_ce_loss, forward and gradient to the student's logits, against what it replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DEVICE, OURS, measure
from fastdistill import kd_ce_loss

SIZES = {
    "cpu": [(32, 2), (4096, 3), (1024, 30522), (512, 128256)],
    "cuda": [(32, 2), (4096, 3), (8192, 32000), (8192, 128256)],
}[DEVICE]
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TEMPERATURE = 2.0


def eager(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    kd = F.kl_div(
        F.log_softmax(student / TEMPERATURE, -1),
        F.log_softmax(teacher / TEMPERATURE, -1),
        log_target=True,
        reduction="batchmean",
    )
    return kd * TEMPERATURE**2 + F.cross_entropy(student, labels)


def ours(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return kd_ce_loss(student, teacher, labels, temperature=TEMPERATURE)


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


def through_autograd(loss: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(loss(*inputs), inputs[0])


def op_alone(student: Tensor, teacher: Tensor, labels: Tensor) -> Callable[[], Any]:
    """Loss and gradient from the operator itself, for who needs no autograd engine around it."""
    op, student = torch.ops.fastdistill.kd_ce_loss.default, student.detach()
    options = (TEMPERATURE, 1.0, 1.0, "forward_kl", True, -100, 0.0, "mean", True, False)
    return lambda: op(student, teacher, labels, *options)


IMPLEMENTATIONS: dict[str, Callable[[tuple[Tensor, ...]], Callable[[], Any]]] = {
    "eager": lambda inputs: through_autograd(eager, inputs),
    "torch.compile": lambda inputs: through_autograd(torch.compile(eager, dynamic=False), inputs),
    "Liger-Kernel": lambda inputs: through_autograd(liger, inputs),
    "flash-linear-attention": lambda inputs: through_autograd(flash_linear_attention, inputs),
    OURS: lambda inputs: through_autograd(ours, inputs),
    f"{OURS} (op alone)": lambda inputs: op_alone(*inputs),
}
NEEDS = {"Liger-Kernel": "liger_kernel", "flash-linear-attention": "fla"}


@pytest.mark.parametrize("rows,classes", SIZES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_kd_ce_loss(benchmark: Any, implementation: str, rows: int, classes: int) -> None:
    if implementation in NEEDS:
        pytest.importorskip(NEEDS[implementation])
        if DEVICE == "cpu":
            pytest.skip("runs on CUDA only")
    torch.manual_seed(0)
    torch.compiler.reset()
    student = torch.randn(rows, classes, device=DEVICE, dtype=DTYPE).requires_grad_()
    teacher = torch.randn(rows, classes, device=DEVICE, dtype=DTYPE)
    labels = torch.randint(classes, (rows,), device=DEVICE)
    measure(
        benchmark,
        IMPLEMENTATIONS[implementation]((student, teacher, labels)),
        op="kd_ce_loss",
        case=f"{rows}×{classes}",
        implementation=implementation,
        dtype=DTYPE,
        bytes_moved=3 * student.nbytes if implementation.startswith(OURS) else 0,
    )
