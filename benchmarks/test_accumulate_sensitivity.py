"""accumulate_sensitivity_ over all weights of a 6-layer encoder, against what it replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import DEVICE, OURS, measure
from fastdistill import accumulate_sensitivity_

LAYERS, HIDDEN = 6, 512


def shapes() -> list[tuple[int, ...]]:
    """BERT's encoder layers: four attention matrices, two of the feed-forward block, two layer norms, all biases."""
    square, inner, outer = (HIDDEN, HIDDEN), (4 * HIDDEN, HIDDEN), (HIDDEN, 4 * HIDDEN)
    vector, inner_vector = (HIDDEN,), (4 * HIDDEN,)
    layer = [square, vector] * 4 + [inner, inner_vector, outer, vector] + [vector] * 4
    return layer * LAYERS


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
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_accumulate_sensitivity(benchmark: Any, implementation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    totals = [torch.zeros(shape, device=DEVICE) for shape in shapes()]
    grads, weights = ([torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes()] for _ in range(2))
    elements = sum(total.numel() for total in totals)
    measure(
        benchmark,
        lambda: IMPLEMENTATIONS[implementation](totals, grads, weights),
        op="accumulate_sensitivity_",
        case=f"{elements / 1e6:.0f}M weights in {len(totals)} tensors, gradients {str(dtype).removeprefix('torch.')}",
        implementation=implementation,
        dtype=dtype,
        bytes_moved=elements * (2 * 4 + 2 * dtype.itemsize) if implementation == OURS else 0,
    )
