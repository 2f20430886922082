"""gated_ffn against linear, activation, multiplication, linear: with neurons off, and gate gradients per example.

Compacted is the same without gates and of weights that have only the neurons that are on: the least there is to do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DEVICE, OURS, measure, sizes
from fastdistill import gated_ffn
from fastdistill.ops import ActiveNeurons

# examples, tokens, width, neurons
SHAPES = sizes(
    tiny=[(2, 4, 16, 64)],
    cpu=[(32, 32, 384, 1536), (32, 128, 384, 1536)],
    cuda=[(32, 128, 768, 3072), (64, 512, 1024, 4096)],
)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
Block = Callable[..., Tensor]


def eager(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, gate: Tensor) -> Tensor:
    a = F.gelu(F.linear(x, w_in, b_in))
    return F.linear(a * (gate if gate.dim() == 1 else gate[:, None]), w_out, b_out)


def compiled() -> Block:
    torch.compiler.reset()
    return torch.compile(eager, dynamic=False)


def plain(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w_in, b_in)), w_out, b_out)


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


def run(benchmark: Any, function: Callable[[], Any], shape: tuple[int, ...], implementation: str, **what: Any) -> None:
    measure(
        benchmark,
        function,
        implementation=implementation,
        dtype=DTYPE,
        small=shape[0] * shape[1] <= 4096,
        **what,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("off", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("implementation", ["compacted", *IMPLEMENTATIONS])
def test_training(benchmark: Any, implementation: str, off: float, shape: tuple[int, ...]) -> None:
    """Forward and backward to x and all weights under a fixed mask, whose neurons ours finds once."""
    if DEVICE == "cuda" and off and implementation in ("eager", "torch.compile"):
        pytest.skip("as with none off")
    x, w_in, b_in, w_out, b_out = make(*shape)
    off_now = torch.randperm(shape[-1], device=DEVICE)[: round(off * shape[-1])]
    gate = torch.ones(shape[-1], device=DEVICE, dtype=DTYPE).index_fill_(0, off_now, 0)
    compacted = implementation == "compacted"
    if compacted:
        on = gate.nonzero().squeeze(-1)
        w_in, b_in, w_out = w_in[on], b_in[on], w_out[:, on].contiguous()
    leaves = [tensor.requires_grad_() for tensor in (x, w_in, b_in, w_out, b_out)]
    block = plain if compacted else IMPLEMENTATIONS[implementation]()
    gates: tuple[Any, ...] = () if compacted else (ActiveNeurons(gate) if implementation == OURS and off else gate,)
    grad_output = torch.randn_like(x)
    run(
        benchmark,
        lambda: torch.autograd.grad(block(*leaves, *gates), leaves, grad_output),
        shape,
        implementation,
        op="gated_ffn and gradients",
        case=f"{'×'.join(map(str, shape))}, {off:.0%} off",
        flops=12 * shape[0] * shape[1] * shape[2] * shape[3] * (1 - off),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gate_gradients(benchmark: Any, implementation: str, shape: tuple[int, ...]) -> None:
    """Of every example, and the gradient of x; the weights are frozen."""
    x, *weights = make(*shape)
    gate = torch.ones(shape[0], shape[-1], device=DEVICE, dtype=DTYPE).requires_grad_()
    block = IMPLEMENTATIONS[implementation]()
    grad_output = torch.randn_like(x.requires_grad_())
    run(
        benchmark,
        lambda: torch.autograd.grad(block(x, *weights, gate), (x, gate), grad_output),
        shape,
        implementation,
        op="gated_ffn: gate gradients per example",
        case="×".join(map(str, shape)),
    )


def glu(x: Tensor, w_in: Tensor, w_out: Tensor, w_gate: Tensor, gate: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_in) * gate, w_out)


GLU: dict[str, Callable[[], Block]] = {
    "eager": lambda: glu,
    "torch.compile": lambda: torch.compile(glu, dynamic=False),
    OURS: lambda: (
        lambda x, w_in, w_out, w_gate, gate: gated_ffn(
            x, w_in, None, w_out, None, gate, activation="silu", w_gate=w_gate
        )
    ),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("off", [0.0, 0.5])
@pytest.mark.parametrize("implementation", GLU)
def test_swiglu(benchmark: Any, implementation: str, off: float, shape: tuple[int, ...]) -> None:
    """Forward and backward to x and all weights of a block as Llama's, under a fixed mask."""
    torch.compiler.reset()
    x, w_in, _, w_out, _ = make(*shape)
    gate = torch.ones(shape[-1], device=DEVICE, dtype=DTYPE)
    gate[torch.randperm(shape[-1], device=DEVICE)[: round(off * shape[-1])]] = 0
    leaves = [tensor.requires_grad_() for tensor in (x, w_in, w_out, w_in.flip(0).clone())]
    block, grad_output = GLU[implementation](), torch.randn_like(x)
    gates: Any = ActiveNeurons(gate) if implementation == OURS and off else gate
    run(
        benchmark,
        lambda: torch.autograd.grad(block(*leaves, gates), leaves, grad_output),
        shape,
        implementation,
        op="gated_ffn: SwiGLU and gradients",
        case=f"{'×'.join(map(str, shape))}, {off:.0%} off",
        flops=18 * shape[0] * shape[1] * shape[2] * shape[3] * (1 - off),
    )
