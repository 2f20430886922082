"""What ends each half of an encoder's layer, as it is trained, forward and backward: dropout, residual connection and
layer normalisation. On a GPU x has 16 bits and the residual 32, as under autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DEVICE, OURS, measure, sizes
from fastdistill import dropout_add_layer_norm

CASES = sizes(
    tiny=[(32, 16)],
    cpu=[(480, 384), (4096, 768)],
    cuda=[(480, 384), (4096, 768), (32768, 1024)],
)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, p: float) -> Tensor:
    return F.layer_norm(residual + F.dropout(x, p), weight.shape, weight, bias)


def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, p: float) -> Tensor:
    return dropout_add_layer_norm(x, residual, weight, bias, dropout_p=p)


IMPLEMENTATIONS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "eager": lambda: eager,
    "torch.compile": lambda: torch.compile(eager, dynamic=False),
    OURS: lambda: ours,
}


@pytest.mark.parametrize("rows, size", CASES)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dropout_add_layer_norm(benchmark: Any, implementation: str, rows: int, size: int, p: float) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    x, residual, upstream = (torch.randn(rows, size, device=DEVICE) for _ in range(3))
    weight, bias = (torch.randn(size, device=DEVICE) for _ in range(2))
    leaves = [t.requires_grad_() for t in (x.to(DTYPE), residual, weight, bias)]
    function = IMPLEMENTATIONS[implementation]()
    measure(
        benchmark,
        lambda: torch.autograd.grad(function(*leaves, p), leaves, upstream),
        op="dropout_add_layer_norm and gradients",
        case=f"{rows}×{size}, dropout {p:g}",
        implementation=implementation,
        dtype=DTYPE,
        bytes_moved=3 * leaves[0].nbytes + 5 * residual.nbytes,
    )
