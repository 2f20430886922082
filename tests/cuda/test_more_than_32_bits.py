"""More elements than 32 bits count: the last row or head, far beyond 2**31, is what it is by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdistill import gated_attention, kd_ce_loss

pytestmark = pytest.mark.gpu


def needs(gigabytes: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"{free:.0f} GiB of device memory are free; {gigabytes:.0f} are needed")


def by_row(student: Tensor, teacher: Tensor, labels: Tensor) -> list[Tensor]:
    loss = kd_ce_loss(student, teacher, labels, temperature=2.0, reduction="none")
    return [loss.detach(), *torch.autograd.grad(loss, (student, teacher), torch.ones_like(loss))]


@pytest.mark.parametrize("rows,classes", [(17_000, 128_256), (270_000, 8192), (2**31 // 3 + 7, 3)], ids=str)
def test_kd_ce_loss_past_32_bits(rows: int, classes: int) -> None:
    needs(36)
    assert rows * classes > 2**31
    student, teacher = (torch.empty(rows, classes, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(2))
    labels = torch.randint(classes, (rows,), device="cuda")
    whole = by_row(student.requires_grad_(), teacher.requires_grad_(), labels)
    last = slice(rows - 40, None)
    alone = by_row(*(x[last].detach().clone().requires_grad_() for x in (student, teacher)), labels[last])
    for value, expected in zip(whole, alone, strict=True):
        torch.testing.assert_close(value[last], expected)
    assert whole[1].isfinite().all(-1).all()


@pytest.mark.parametrize("gate_grad", [False, True])
def test_gated_attention_past_32_bits(gate_grad: bool) -> None:
    needs(48)
    batch, heads, tokens, size = 1100, 8, 4096, 64  # 2.3e9 elements
    make = [torch.empty(batch, tokens, heads, size, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(3)]
    inputs = [x.transpose(1, 2).requires_grad_() for x in make]
    gate = torch.rand(heads, device="cuda")

    def everything(tensors: list[Tensor], gate: Tensor) -> list[Tensor]:
        gate = gate.clone().requires_grad_(gate_grad)
        output = gated_attention(*tensors, gate, is_causal=True)
        wanted = [*tensors, gate] if gate_grad else tensors
        return [output.detach(), *torch.autograd.grad(output, wanted, output.detach())]

    whole = everything(inputs, gate)
    with sdpa_kernel(SDPBackend.MATH):  # of so many elements no product is cuDNN's; nor may it be of few
        alone = everything([x[-1:, -1:].detach().clone().requires_grad_() for x in inputs], gate[-1:])
    for value, expected in zip(whole[:4], alone[:4], strict=True):
        torch.testing.assert_close(value[-1:, -1:], expected)
