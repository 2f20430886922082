"""accumulate_sensitivity_ over all weights of an encoder, against what it replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import DEVICE, OURS, measure, sizes
from fastdistill import accumulate_sensitivity_

# layers, hidden size; the second is BERT-base
SIZES = sizes(tiny=[(2, 16)], cpu=[(6, 512)], cuda=[(6, 512), (12, 768)])


def shapes(layers: int, hidden: int) -> list[tuple[int, ...]]:
    """BERT's encoder layers: four attention matrices, two of the feed-forward block, two layer norms, all biases."""
    square, inner, outer = (hidden, hidden), (4 * hidden, hidden), (hidden, 4 * hidden)
    vector, inner_vector = (hidden,), (4 * hidden,)
    layer = [square, vector] * 4 + [inner, inner_vector, outer, vector] + [vector] * 4
    return layer * layers


def loop(totals: list[Tensor], grads: list[Tensor], weights: list[Tensor]) -> None:
    for total, grad, weight in zip(totals, grads, weights, strict=True):
        total += (grad * weight).abs()


def foreach(totals: list[Tensor], grads: list[Tensor], weights: list[Tensor]) -> None:
    products = torch._foreach_mul(grads, weights)
    torch._foreach_abs_(products)
    torch._foreach_add_(totals, products)


IMPLEMENTATIONS: dict[str, Callable[[list[Tensor], list[Tensor], list[Tensor]], None]] = {
    "loop": loop,
    "torch._foreach": foreach,
    OURS: accumulate_sensitivity_,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_accumulate_sensitivity(benchmark: Any, implementation: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    every = shapes(*size)
    totals = [torch.zeros(shape, device=DEVICE) for shape in every]
    grads, weights = ([torch.randn(shape, device=DEVICE).to(dtype) for shape in every] for _ in range(2))
    elements = sum(total.numel() for total in totals)
    measure(
        benchmark,
        lambda: IMPLEMENTATIONS[implementation](totals, grads, weights),
        op="accumulate_sensitivity_",
        case=f"{elements / 1e6:.0f}M weights in {len(totals)} tensors, gradients {str(dtype).removeprefix('torch.')}",
        implementation=implementation,
        dtype=dtype,
        bytes_moved=elements * (2 * 4 + 2 * dtype.itemsize),
    )
