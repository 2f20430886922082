"""Attention with a share of its heads closed, forward and backward, against what users write: attention times gates.

With a gradient to the gates (heads are scored) and without (heads are masked).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.harness import DEVICE, OURS, measure
from fastdistill import gated_attention

# batch, heads, tokens, channels of a head
SIZES = {
    "cpu": [(32, 12, 32, 32), (32, 12, 128, 32)],
    "cuda": [(32, 12, 128, 32), (64, 12, 512, 64), (8, 32, 4096, 128)],
}[DEVICE]
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def eager(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value) * gate[:, None, None].to(query.dtype)


def flex(gate: Tensor, tokens: int) -> Attention:
    """Closed heads as blocks that are all masked: not computed either, but no gradient to the gates."""
    closed = gate.detach() == 0
    blocks = create_block_mask(lambda b, h, q, k: ~closed[h], None, len(gate), tokens, tokens, device=DEVICE)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda query, key, value, gate: compiled(query, key, value, block_mask=blocks)


def by(backend: SDPBackend) -> Attention:
    def attend(*inputs: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return eager(*inputs)

    return attend


CUDA_ONLY = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
IMPLEMENTATIONS: dict[str, Callable[[Tensor, int], Attention]] = {
    "eager": lambda gate, tokens: eager,
    "torch.compile": lambda gate, tokens: torch.compile(eager, dynamic=False),
    "FlexAttention": flex,
    **{name: lambda gate, tokens, backend=backend: by(backend) for name, backend in CUDA_ONLY.items()},
    OURS: lambda gate, tokens: gated_attention,
}


@pytest.mark.parametrize("closed", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("gate_grad", [False, True], ids=["masked", "scored"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gated_attention(
    benchmark: Any, implementation: str, size: tuple[int, int, int, int], gate_grad: bool, closed: float
) -> None:
    if DEVICE == "cpu" and implementation in ("FlexAttention", *CUDA_ONLY):
        pytest.skip("no backward on CPU" if implementation == "FlexAttention" else "of CUDA alone")
    if gate_grad and implementation == "FlexAttention":
        pytest.skip("no gradient to gates")
    torch.manual_seed(0)
    torch.compiler.reset()
    batch, heads, tokens, channels = size
    inputs = [
        torch.randn(batch, tokens, heads, channels, device=DEVICE, dtype=DTYPE).transpose(1, 2).requires_grad_()
        for _ in range(3)
    ]
    gate = torch.ones(heads, device=DEVICE)
    gate[torch.randperm(heads)[: round(closed * heads)]] = 0
    gate.requires_grad_(gate_grad)
    attend = IMPLEMENTATIONS[implementation](gate, tokens)
    upstream = torch.randn_like(inputs[0])
    wanted = [*inputs, gate] if gate_grad else inputs
    measure(
        benchmark,
        lambda: torch.autograd.grad(attend(*inputs, gate), wanted, upstream),
        op=f"gated_attention{', gradient to gates' if gate_grad else ''}",
        case=f"{'×'.join(map(str, size))}, {closed:.0%} closed",
        implementation=implementation,
        dtype=DTYPE,
    )
