"""gated_ffn against linear, activation, multiplication, linear: with neurons off, and gate gradients per example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DEVICE, OURS, measure
from fastdistill import gated_ffn
from fastdistill.ops import ActiveNeurons

SHAPES = {
    "cpu": [(32, 32, 384, 1536), (32, 128, 384, 1536)],
    "cuda": [(32, 128, 768, 3072), (64, 512, 1024, 4096)],
}[DEVICE]  # examples, tokens, width, neurons
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
Block = Callable[..., Tensor]


def eager(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, gate: Tensor) -> Tensor:
    a = F.gelu(F.linear(x, w_in, b_in))
    return F.linear(a * (gate if gate.dim() == 1 else gate[:, None]), w_out, b_out)


def compiled() -> Block:
    torch.compiler.reset()
    return torch.compile(eager, dynamic=False)


IMPLEMENTATIONS: dict[str, Callable[[], Block]] = {
    "eager": lambda: eager,
    "torch.compile": compiled,
    OURS: lambda: gated_ffn,
}


def make(examples: int, tokens: int, width: int, neurons: int) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = (examples, tokens, width), (neurons, width), (neurons,), (width, neurons), (width,)
    x, w_in, b_in, w_out, b_out = (torch.randn(size, device=DEVICE) for size in sizes)
    return [tensor.to(DTYPE) for tensor in (x, w_in / width**0.5, b_in, w_out / neurons**0.5, b_out)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("off", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_training(benchmark: Any, implementation: str, off: float, shape: tuple[int, ...]) -> None:
    """Forward and backward to x and all weights under a fixed mask, whose neurons ours finds once."""
    leaves = [tensor.requires_grad_() for tensor in make(*shape)]
    gate: Any = (torch.rand(shape[-1], device=DEVICE) >= off).to(DTYPE)
    if implementation == OURS and off > 0:
        gate = ActiveNeurons(gate)
    block = IMPLEMENTATIONS[implementation]()
    upstream = torch.randn_like(leaves[0])
    measure(
        benchmark,
        lambda: torch.autograd.grad(block(*leaves, gate), leaves, upstream),
        op="gated_ffn and gradients",
        case=f"{'×'.join(map(str, shape))}, {off:.0%} off",
        implementation=implementation,
        dtype=DTYPE,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gate_gradients(benchmark: Any, implementation: str, shape: tuple[int, ...]) -> None:
    """Of every example, and the gradient of x; the weights are frozen."""
    x, *weights = make(*shape)
    gate = torch.ones(shape[0], shape[-1], device=DEVICE, dtype=DTYPE).requires_grad_()
    block = IMPLEMENTATIONS[implementation]()
    upstream = torch.randn_like(x.requires_grad_())
    measure(
        benchmark,
        lambda: torch.autograd.grad(block(x, *weights, gate), (x, gate), upstream),
        op="gated_ffn: gate gradients per example",
        case="×".join(map(str, shape)),
        implementation=implementation,
        dtype=DTYPE,
    )
