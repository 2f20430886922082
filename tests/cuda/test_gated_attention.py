"""What only a GPU shows; the answers themselves are checked in tests/ops on every device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdistill import gated_attention
from tests import eager
from tests.accuracy import assert_accurate, relative_error

pytestmark = pytest.mark.gpu


def without_cudnn() -> bool:
    """Whether PyTorch's own attention is another."""
    if not torch.cuda.is_available():
        return True
    query = torch.empty(1, 1, 512, 64, device="cuda", dtype=torch.bfloat16)
    return torch._fused_sdp_choice(query, query, query) != SDPBackend.CUDNN_ATTENTION.value


WITH_CUDNN = pytest.mark.skipif(without_cudnn(), reason="PyTorch does not take cuDNN's attention here")


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def make(batch: int, heads: int, length: int, size: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [
        torch.randn(batch, length, heads, size, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_()
        for _ in range(3)
    ]


def everything(inputs: list[Tensor], gate: Tensor, **options: object) -> list[Tensor]:
    output = gated_attention(*inputs, gate, **options)  # type: ignore[arg-type]
    wanted = [*inputs, gate] if gate.requires_grad else inputs
    return [output, *torch.autograd.grad(output, wanted, torch.ones_like(output) / 8)]


@pytest.mark.parametrize("gate_grad", [False, True])
@pytest.mark.parametrize("dropout_p, length", [(0.0, 100), (0.1, 100), (0.0, 600)])
def test_never_waits_for_the_device(
    gate_grad: bool, dropout_p: float, length: int, request: pytest.FixtureRequest
) -> None:
    inputs, gate = make(4, 6, length, 32), torch.zeros(6, device="cuda", requires_grad=gate_grad)
    everything(inputs, gate, dropout_p=dropout_p)  # compiles the kernels, allocates
    request.getfixturevalue("no_synchronisation")
    for _ in range(3):
        everything(inputs, gate, dropout_p=dropout_p)


def test_first_call_of_a_thread() -> None:
    """A thread that has not called CUDA's runtime has no context, and finds the memory and the kernel ready."""
    inputs, gate = make(2, 3, 40, 32), torch.ones(3, device="cuda", requires_grad=True)
    expected = everything(inputs, gate)
    with ThreadPoolExecutor(1) as pool:
        for ours, answer in zip(pool.submit(everything, inputs, gate).result(), expected, strict=True):
            torch.testing.assert_close(ours, answer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [16, 32, 64, 96, 128])
@pytest.mark.parametrize("mask", ["none", "padding", "rows", "bias", "causal"])
def test_long_sequences(dtype: torch.dtype, size: int, mask: str) -> None:
    inputs = make(2, 3, 1000, size, dtype)
    gate = torch.tensor([1.0, 0.0, 0.5], device="cuda", requires_grad=True)
    padding = torch.arange(1000, device="cuda") < torch.tensor([900, 130], device="cuda")[:, None, None, None]
    bias = torch.randn(1, 3, 1000, 1000, device="cuda", dtype=dtype)
    rows = padding & padding.mT
    options = {"attn_mask": {"padding": padding, "rows": rows, "bias": bias}.get(mask), "is_causal": mask == "causal"}
    ours = everything(inputs, gate, **options)
    upstream = torch.ones_like(ours[0]) / 8

    def by_eager(tensors: list[Tensor]) -> list[Tensor]:
        tensors = [x.detach().requires_grad_() for x in tensors]
        with sdpa_kernel(SDPBackend.MATH):
            output = eager.gated_attention(*tensors, **options)
            return [output, *torch.autograd.grad(output, tensors, upstream.to(output))]

    exact, plain = by_eager([x.double() for x in (*inputs, gate)]), by_eager([*inputs, gate])
    for what, *values in zip(("output", "query", "key", "value", "gate"), ours, exact, plain, strict=True):
        values[0] = values[0].to(dtype)
        assert_accurate(*values, what=what)


def names_of_kernels(function: Callable[[], object]) -> str:
    with torch.profiler.profile() as profile:
        function()
        torch.cuda.synchronize()
    return " ".join(event.key for event in profile.key_averages())


@WITH_CUDNN
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("by_example", [False, True])
@pytest.mark.parametrize("size", [64, 100, 128])
def test_by_cudnn(size: int, by_example: bool, is_causal: bool) -> None:
    """Long sequences, in any layout, whose heads are all computed, are cuDNN's; with the answers of ours."""
    inputs = [make(2, 3, 700, size)[0], make(2, 3, 700, size)[0].contiguous(), make(2, 3, 700, 2 * size)[0][..., ::2]]
    inputs = [x.detach().requires_grad_() for x in inputs]
    gate = torch.tensor([[1.0, 0.0, 0.5], [0.0, 2.0, 1.0]] if by_example else [1.0, 0.0, 0.5], device="cuda")
    gate.requires_grad_()

    def run(gate: Tensor | None) -> list[Tensor]:
        output = gated_attention(*inputs, gate, is_causal=is_causal)
        assert output.transpose(1, 2).is_contiguous()
        wanted = inputs if gate is None else [*inputs, gate]
        return [output, *torch.autograd.grad(output, wanted, output.new_ones(()).expand_as(output))]

    for given in (gate, None):
        assert "_query_kernel" not in names_of_kernels(lambda given=given: run(given))
        by_cudnn = run(given)
        with deterministic_algorithms():
            assert "_query_kernel" in names_of_kernels(lambda given=given: run(given))
            ours = run(given)
        for x, y in zip(by_cudnn, ours, strict=True):
            assert relative_error(x, y.double()) < 0.01
    fixed = gated_attention(*inputs, gate.detach(), is_causal=is_causal)
    assert "_query_kernel" in names_of_kernels(lambda: torch.autograd.grad(fixed, inputs, torch.ones_like(fixed)))


@WITH_CUDNN
def test_by_cudnn_in_a_cuda_graph() -> None:
    inputs, gate = make(2, 3, 600, 64), torch.ones(3, device="cuda", requires_grad=True)
    everything(inputs, gate)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(inputs, gate)
    with torch.no_grad():
        gate[:2] = 0.5
        inputs[0].copy_(torch.randn_like(inputs[0]))
    graph.replay()
    for x, y in zip(captured, everything(inputs, gate), strict=True):
        assert relative_error(x, y.double()) < 0.01


def test_the_same_again() -> None:
    inputs, gate = make(8, 12, 500, 64), torch.rand(12, device="cuda").requires_grad_()
    first = everything(inputs, gate)
    for _ in range(5):
        assert all(torch.equal(x, y) for x, y in zip(everything(inputs, gate), first, strict=True))


def test_more_elements_than_32_bits_count() -> None:
    """The last head of the last example, computed alone, is what it is among all."""
    inputs = [x.detach() for x in make(1100, 8, 4096, 64)]  # 2.3e9 elements
    output = gated_attention(*inputs, is_causal=True)
    with sdpa_kernel(SDPBackend.MATH):  # of few elements cuDNN would be taken
        alone = gated_attention(*(x[-1:, -1:] for x in inputs), is_causal=True)
    assert torch.equal(output[-1:, -1:], alone)


def test_replays_in_a_cuda_graph() -> None:
    inputs, gate = make(4, 6, 100, 32), torch.ones(6, device="cuda", requires_grad=True)
    everything(inputs, gate)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(inputs, gate)
        dropped = gated_attention(*inputs, dropout_p=0.5).detach()
    with torch.no_grad():
        gate[:3] = 0
        inputs[0].copy_(torch.randn_like(inputs[0]))
    graph.replay()
    for x, y in zip(captured, everything(inputs, gate), strict=True):
        assert torch.equal(x, y)
    first = dropped.clone()
    graph.replay()
    assert not torch.equal(first, dropped)
