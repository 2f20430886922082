"""Attention with a share of its heads closed, against what users write: attention times gates. Forward alone, and
forward and backward with a gradient to the gates (heads are scored) and without (heads are masked). And without gates,
with padding and dropout, as encoders are trained.
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

from benchmarks.harness import DEVICE, OURS, measure, sizes
from fastdistill import gated_attention

Size = tuple[int, int, int, int]  # batch, heads, tokens, channels of a head
SIZES = sizes(
    tiny=[(1, 4, 8, 16)],
    cpu=[(32, 12, 32, 32), (32, 12, 128, 32)],
    cuda=[(32, 12, 128, 64), (64, 12, 512, 64), (16, 16, 2048, 64), (16, 16, 1024, 128), (8, 32, 4096, 128)],
)
TRAINED = sizes(tiny=SIZES[:1], cpu=[(32, 12, n, 32) for n in (12, 25, 64, 128)], cuda=[(32, 12, 128, 64)])
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
Attention = Callable[..., Tensor]


def eager(query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, attn_mask: Tensor | None = None) -> Tensor:
    grouped = key.shape[1] != query.shape[1]
    output = F.scaled_dot_product_attention(query, key, value, attn_mask, enable_gqa=grouped)
    return output if gate is None else output * gate[..., None, None].to(query.dtype)


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
PLAIN: dict[str, Callable[[], Attention]] = {
    "eager": lambda: eager,
    "torch.compile": lambda: torch.compile(eager, dynamic=False),
    OURS: lambda: gated_attention,
}
IMPLEMENTATIONS: dict[str, Callable[[Tensor, int], Attention]] = {
    "eager": lambda gate, tokens: eager,
    "torch.compile": lambda gate, tokens: PLAIN["torch.compile"](),
    "FlexAttention": flex,
    **{name: lambda gate, tokens, backend=backend: by(backend) for name, backend in CUDA_ONLY.items()},
    OURS: lambda gate, tokens: gated_attention,
}
AT_CLOSED = {"FlexAttention": (0.0, 0.5), **dict.fromkeys(("eager", "torch.compile", *CUDA_ONLY), (0.0,))}
"""On a GPU: all but FlexAttention compute closed heads, too, so that their time is that of open ones."""


def skip(implementation: str, closed: float, gate_grad: bool) -> None:
    if DEVICE == "cpu" and implementation in ("FlexAttention", *CUDA_ONLY):
        pytest.skip("no backward on CPU" if implementation == "FlexAttention" else "of CUDA alone")
    if gate_grad and implementation == "FlexAttention":
        pytest.skip("no gradient to gates")
    if DEVICE == "cuda" and closed not in AT_CLOSED.get(implementation, (closed,)):
        pytest.skip("as with none closed")


def make(size: Size, dtype: torch.dtype = DTYPE) -> list[Tensor]:
    torch.manual_seed(0)
    torch.compiler.reset()
    batch, heads, tokens, channels = size
    return [torch.randn(batch, tokens, heads, channels, device=DEVICE, dtype=dtype).transpose(1, 2) for _ in range(3)]


def with_closed(heads: int, closed: float) -> Tensor:
    gate = torch.ones(heads, device=DEVICE)
    gate[torch.randperm(heads)[: round(closed * heads)]] = 0
    return gate


def run(
    benchmark: Any,
    function: Callable[[], Any],
    size: Size,
    what: str,
    about: str,
    implementation: str,
    work: float,
    dtype: torch.dtype = DTYPE,
) -> None:
    """``work``: how many times the two products of the forward pass must be done."""
    batch, heads, tokens, channels = size
    measure(
        benchmark,
        function,
        op=f"gated_attention{what}",
        case="×".join(map(str, size)) + about,
        implementation=implementation,
        dtype=dtype,
        flops=4 * batch * heads * tokens**2 * channels * work,
        small=tokens <= 128,
    )


@pytest.mark.parametrize("closed", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("gate_grad", [False, True], ids=["masked", "scored"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gated_attention(benchmark: Any, implementation: str, size: Size, gate_grad: bool, closed: float) -> None:
    skip(implementation, closed, gate_grad)
    inputs = [x.requires_grad_() for x in make(size)]
    gate = with_closed(size[1], closed).requires_grad_(gate_grad)
    attend = IMPLEMENTATIONS[implementation](gate, size[2])
    grad_output = torch.randn_like(inputs[0])
    wanted = [*inputs, gate] if gate_grad else inputs
    run(
        benchmark,
        lambda: torch.autograd.grad(attend(*inputs, gate), wanted, grad_output),
        size,
        ", gradient to gates" if gate_grad else "",
        f", {closed:.0%} closed",
        implementation,
        work=3.5 * (1 if gate_grad else 1 - closed),
    )


@pytest.mark.parametrize("closed", [0.0, 0.5])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "FlexAttention"])
def test_forward(benchmark: Any, implementation: str, size: Size, closed: float) -> None:
    skip(implementation, closed, False)
    inputs, gate = make(size), with_closed(size[1], closed)
    attend = IMPLEMENTATIONS[implementation](gate, size[2])
    about = f", {closed:.0%} closed"
    run(benchmark, lambda: attend(*inputs, gate), size, " forward", about, implementation, work=1 - closed)


@pytest.mark.parametrize("size", SIZES[:2], ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("implementation", PLAIN)
def test_no_gate(benchmark: Any, implementation: str, size: Size) -> None:
    inputs, attend = [x.requires_grad_() for x in make(size)], PLAIN[implementation]()
    grad_output = torch.randn_like(inputs[0])

    def step() -> Any:
        return torch.autograd.grad(attend(*inputs, None), inputs, grad_output)

    run(benchmark, step, size, ", no gate", "", implementation, work=3.5)


@pytest.mark.parametrize("size", SIZES[:2], ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("implementation", PLAIN)
def test_gates_by_example_and_padding(benchmark: Any, implementation: str, size: Size) -> None:
    """As a teacher's heads are scored: each example has gates, whose gradient is wanted, and padding."""
    inputs, attend = [x.requires_grad_() for x in make(size)], PLAIN[implementation]()
    batch, heads, tokens, _ = size
    gate = torch.ones(batch, heads, device=DEVICE).requires_grad_()
    lengths = torch.randint(tokens // 2, tokens + 1, (batch, 1), device=DEVICE)
    mask = (torch.arange(tokens, device=DEVICE) < lengths)[:, None, None]
    grad_output = torch.randn_like(inputs[0])

    def step() -> Any:
        return torch.autograd.grad(attend(*inputs, gate, attn_mask=mask), [*inputs, gate], grad_output)

    run(benchmark, step, size, ", gates by example, padding", "", implementation, work=3.5)


@pytest.mark.parametrize("closed", [0.0, 0.5])
@pytest.mark.parametrize("size", SIZES[:2], ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("implementation", PLAIN)
def test_grouped_heads(benchmark: Any, implementation: str, size: Size, closed: float) -> None:
    """Four heads of the query to one of key and value; heads are closed in whole groups."""
    query, key, value = make(size)
    inputs = [x.detach().requires_grad_() for x in (query, key[:, ::4], value[:, ::4])]
    gate = with_closed(size[1] // 4, closed).repeat_interleave(4)
    attend, grad_output = PLAIN[implementation](), torch.randn_like(query)

    def step() -> Any:
        return torch.autograd.grad(attend(*inputs, gate), inputs, grad_output)

    run(benchmark, step, size, ", grouped heads", f", {closed:.0%} closed", implementation, work=3.5 * (1 - closed))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, *([torch.float32] if DEVICE == "cpu" else [])], ids=str)
@pytest.mark.parametrize("size", TRAINED, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("implementation", ["sdpa", OURS])
def test_training(benchmark: Any, implementation: str, size: Size, dtype: torch.dtype, dropout: float) -> None:
    """An eighth of the examples has an eighth of padding."""
    inputs = [x.requires_grad_() for x in make(size, dtype)]
    batch, _, tokens, _ = size
    mask = torch.ones(batch, 1, 1, tokens, device=DEVICE, dtype=torch.bool)
    mask[: batch // 8, ..., tokens - tokens // 8 :] = False
    grad_output = torch.randn_like(inputs[0])

    def attend() -> Tensor:
        if implementation == OURS:
            return gated_attention(*inputs, attn_mask=mask, dropout_p=dropout)
        return F.scaled_dot_product_attention(*inputs, mask, dropout)

    what = " without gates"
    about = f", padding{', dropout' if dropout else ''}{'' if dtype == DTYPE else f', {dtype}'.replace('torch.', '')}"
    step = lambda: torch.autograd.grad(attend(), inputs, grad_output)  # noqa: E731
    run(benchmark, step, size, what, about, implementation, work=3.5, dtype=dtype)
