"""proximity_conv against weighting, conv1d and max, on sentences with a mask and without.

"eager (product)" is the same by one product of matrices, of the n-grams' states side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DEVICE, OURS, measure, sizes
from fastdistill import proximity_conv

# sentences, tokens, width, channels: PWCN's are 600 wide, twice an LSTM's 300
SHAPES = sizes(
    tiny=[(2, 6, 16, 24)],
    cpu=[(64, 40, 600, 600), (64, 80, 600, 600)],
    cuda=[(64, 80, 600, 600), (256, 80, 600, 600), (64, 512, 768, 768)],
)
TAPS = 3
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
Network = Callable[..., Tensor]


def weigh(states: Tensor, proximity: Tensor, mask: Tensor | None) -> Tensor:
    return states * (proximity if mask is None else proximity * mask).unsqueeze(-1)


def eager(states: Tensor, proximity: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
    values = F.conv1d(weigh(states, proximity, mask).mT, weight, bias, padding=weight.shape[-1] // 2)
    if mask is not None:
        values = values.masked_fill(~mask.unsqueeze(1), -torch.inf)
    return values.max(-1).values


def by_product(states: Tensor, proximity: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
    taps = weight.shape[-1]
    padded = F.pad(weigh(states, proximity, mask), (0, 0, taps // 2, taps // 2))
    around = torch.cat([padded[:, k : k + states.shape[1]] for k in range(taps)], -1)
    values = F.linear(around, weight.permute(0, 2, 1).flatten(1), bias)
    if mask is not None:
        values = values.masked_fill(~mask.unsqueeze(-1), -torch.inf)
    return values.max(1).values


def compiled() -> Network:
    torch.compiler.reset()
    return torch.compile(eager, dynamic=False)


IMPLEMENTATIONS: dict[str, Callable[[], Network]] = {
    "eager": lambda: eager,
    "eager (product)": lambda: by_product,
    "torch.compile": compiled,
    OURS: lambda: proximity_conv,
}


def make(sentences: int, tokens: int, width: int, channels: int) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (sentences, tokens, width), (sentences, tokens), (channels, width, TAPS), (channels,)
    states, proximity, weight, bias = (torch.randn(shape, device=DEVICE) for shape in shapes)
    tensors = states, proximity.sigmoid(), weight / (width * TAPS) ** 0.5, bias
    return [tensor.to(DTYPE) for tensor in tensors]


def padding(sentences: int, tokens: int) -> Tensor:
    """The longest sentence has all tokens, the others from a quarter of them."""
    lengths = torch.randint(tokens // 4, tokens + 1, (sentences, 1), generator=torch.Generator().manual_seed(0))
    lengths[0] = tokens
    return (torch.arange(tokens) < lengths).to(DEVICE)


def run(benchmark: Any, function: Callable[[], Any], shape: tuple[int, ...], implementation: str, **what: Any) -> None:
    measure(benchmark, function, implementation=implementation, dtype=DTYPE, small=shape[0] * shape[1] <= 8192, **what)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_forward(benchmark: Any, implementation: str, padded: bool, shape: tuple[int, ...]) -> None:
    inputs, mask = make(*shape), padding(*shape[:2]) if padded else None
    network = IMPLEMENTATIONS[implementation]()
    run(
        benchmark,
        lambda: network(*inputs, mask),
        shape,
        implementation,
        op="proximity_conv",
        case=f"{'×'.join(map(str, shape))}{', padded' * padded}",
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_training(benchmark: Any, implementation: str, padded: bool, shape: tuple[int, ...]) -> None:
    """Forward and backward to states, weight and bias: proximity by position needs no gradient."""
    states, proximity, weight, bias = make(*shape)
    mask = padding(*shape[:2]) if padded else None
    leaves = [x.requires_grad_() for x in (states, weight, bias)]
    network = IMPLEMENTATIONS[implementation]()
    grad_output = torch.randn(shape[0], shape[3], device=DEVICE, dtype=DTYPE)
    run(
        benchmark,
        lambda: torch.autograd.grad(network(states, proximity, weight, bias, mask), leaves, grad_output),
        shape,
        implementation,
        op="proximity_conv and gradients",
        case=f"{'×'.join(map(str, shape))}{', padded' * padded}",
    )
