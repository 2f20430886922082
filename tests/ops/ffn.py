"""Feed-forward blocks to compute."""

from __future__ import annotations

import torch
from torch import Tensor

from tests import eager

ACTIVATIONS = tuple(eager.ACTIVATIONS)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GATES = ("none", "shared", "per example")


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
