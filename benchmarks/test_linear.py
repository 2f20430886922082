"""Linear layers on a CPU by oneDNN's products, where they are taken (AMD with AVX-512), against PyTorch's own, MKL's:
forward and backward as they are trained, and without gradients, with weights that were packed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import OURS, measure, sizes
from fastdistill.ops.linear import by_onednn, linear, pack_weight

CASES = sizes(
    tiny=[(64, 16, 16)], cpu=[(n, *of) for n in (96, 480, 2048) for of in ((384, 1536), (1536, 384))], cuda=[]
)
IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"eager": F.linear, OURS: linear}


@pytest.mark.parametrize("rows, inputs, outputs", CASES)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_linear(benchmark: Any, implementation: str, rows: int, inputs: int, outputs: int, grad: bool) -> None:
    if not by_onednn():
        pytest.skip("PyTorch's products are taken here")
    torch.manual_seed(0)
    x, weight, bias, upstream = (
        torch.randn(*of) for of in ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    )
    leaves = [t.requires_grad_(grad) for t in (x, weight, bias)]
    function = IMPLEMENTATIONS[implementation]
    packed = (pack_weight(weight, rows),) if implementation == OURS and not grad else ()

    def run() -> None:
        with torch.set_grad_enabled(grad):
            y = function(*leaves, *packed)
            if grad:
                torch.autograd.grad(y, leaves, upstream)

    measure(
        benchmark, run, op="linear and gradients" if grad else "linear", case=f"{rows}×{inputs}×{outputs}",
        implementation=implementation, dtype=torch.float32, flops=(6 if grad else 2) * rows * inputs * outputs,
    )  # fmt: skip
