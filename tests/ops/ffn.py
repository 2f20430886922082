"""Feed-forward blocks to compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill import gated_ffn
from fastdistill.ops import ActiveNeurons
from tests import eager
from tests.accuracy import assert_accurate

ACTIVATIONS = tuple(eager.ACTIVATIONS)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GATES = ("none", "shared", "per example")
NAMES = ("x", "w_in", "b_in", "w_out", "b_out", "neuron_gate")


def make(
    *shape: int,
    neurons: int = 37,
    out: int = 6,
    gate: str = "shared",
    off: float = 0.4,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> list[Tensor | None]:
    """The first six arguments; all but x of a size that keeps everything about 1. ``off``: the share of gates at 0."""
    g = torch.Generator().manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=g, dtype=torch.float64) * scale).to(device, dtype)

    width = shape[-1]
    gates = draw(*(shape[:1] if gate == "per example" else ()), neurons)
    gates[..., torch.rand(neurons, generator=g).to(device) < off] = 0
    return [
        draw(*shape),
        draw(neurons, width, scale=2 * max(width, 1) ** -0.5),
        draw(neurons) if bias else None,
        draw(out, neurons, scale=max(neurons, 1) ** -0.5),
        draw(out) if bias else None,
        None if gate == "none" else gates,
    ]


def with_gradients(function: Any, inputs: list[Tensor | None], wanted: tuple[str, ...] = NAMES, **options: Any) -> dict:
    """The output and, by name, the gradients of the inputs ``wanted``."""
    leaves = [
        None if x is None else x.detach().requires_grad_(name in wanted) for name, x in zip(NAMES, inputs, strict=True)
    ]
    out = function(*leaves, **options)
    upstream = torch.linspace(0.5, 2, max(out.numel(), 1), dtype=torch.float64)[: out.numel()].view(out.shape)
    named = {name: x for name, x in zip(NAMES, leaves, strict=True) if x is not None and x.requires_grad}
    grads = torch.autograd.grad(out, list(named.values()), upstream.to(out)) if named else ()
    return {"out": out.detach(), **dict(zip(named, grads, strict=True))}


def check(
    inputs: list[Tensor | None], wanted: tuple[str, ...] = NAMES, function: Any = gated_ffn, **options: Any
) -> None:
    ours = with_gradients(function, inputs, wanted, **options)
    exact = with_gradients(eager.gated_ffn, [None if x is None else x.double() for x in inputs], wanted, **options)
    plain = with_gradients(eager.gated_ffn, inputs, wanted, **options)
    for what, answer in exact.items():
        assert ours[what].dtype == plain[what].dtype
        assert_accurate(ours[what], answer, plain[what], what)


def by_active(x: Tensor, w_in: Tensor, b_in: Any, w_out: Tensor, b_out: Any, gate: Tensor, **options: Any) -> Tensor:
    return gated_ffn(x, w_in, b_in, w_out, b_out, ActiveNeurons(gate), **options)
