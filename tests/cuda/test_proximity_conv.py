"""What only a GPU shows; the answers themselves are checked in tests/ops on every device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdistill import proximity_conv
from tests import eager
from tests.accuracy import assert_accurate

pytestmark = pytest.mark.gpu


def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """States, proximity, weight, bias, mask, for (sentences, tokens, width, channels, taps)."""
    sentences, tokens, width, channels, taps = shape
    torch.manual_seed(0)
    sizes = (sentences, tokens, width), (sentences, tokens), (channels, width, taps), (channels,)
    states, proximity, weight, bias = (torch.randn(size, device="cuda") for size in sizes)
    lengths = torch.randint(1, tokens + 1, (sentences, 1), device="cuda")
    tensors = states, proximity.sigmoid(), weight / (width * taps) ** 0.5, bias
    return [*(x.to(dtype) for x in tensors), torch.arange(tokens, device="cuda") < lengths]


def with_gradients(function: object, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs[:4]]
    output = function(*leaves, inputs[4])
    upstream = torch.linspace(-1, 2, output.numel(), device="cuda", dtype=torch.float64).view(output.shape)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output))]


def test_never_waits_for_the_device() -> None:
    inputs = make(8, 20, 64, 32, 3)
    with_gradients(proximity_conv, inputs)  # compiles the kernels, allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            with_gradients(proximity_conv, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 80, 600, 600, 3), (16, 300, 768, 256, 5), (33, 50, 301, 99, 1)])
def test_large_problems(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = make(*shape, dtype=dtype)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    for what, value, answer, ordinary in zip(
        ("output", "states", "proximity", "weight", "bias"),
        with_gradients(proximity_conv, inputs),
        with_gradients(eager.proximity_conv, wide),
        with_gradients(eager.proximity_conv, inputs),
        strict=True,
    ):
        assert_accurate(value, answer, ordinary, what)


def test_the_same_each_time() -> None:
    """Sums are in a fixed order: nothing is added atomically."""
    inputs = make(200, 60, 256, 512, 3, dtype=torch.float32)
    first = with_gradients(proximity_conv, inputs)
    for value, again in zip(first, with_gradients(proximity_conv, inputs), strict=True):
        assert torch.equal(value, again)
