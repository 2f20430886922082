"""What only a GPU shows; the answers themselves are checked in tests/ops on every device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastdistill import gated_ffn
from fastdistill.ops import ActiveNeurons, reference
from fastdistill.ops.native import NATIVE
from tests import eager
from tests.accuracy import assert_accurate

pytestmark = pytest.mark.gpu
forward, backward = torch.ops.fastdistill.bias_act_gate.default, torch.ops.fastdistill.bias_act_gate_backward.default


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def make(*shape: int, per_example: bool = False, off: float = 0.5, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    width, neurons = shape[-1], 4 * shape[-1]
    torch.manual_seed(0)
    sizes = shape, (neurons, width), (neurons,), (width, neurons), (width,)
    x, w_in, b_in, w_out, b_out = (torch.randn(size, device="cuda") for size in sizes)
    gate = torch.randn(*(shape[:1] if per_example else ()), neurons, device="cuda")
    gate[..., torch.rand(neurons, device="cuda") < off] = 0
    tensors = x, w_in / width**0.5, b_in, w_out / neurons**0.5, b_out, gate
    return [tensor.to(dtype) for tensor in tensors]


def step(inputs: list[Tensor], *wanted: int) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() if i in wanted else x for i, x in enumerate(inputs)]
    return list(torch.autograd.grad(gated_ffn(*leaves).sum(), [leaves[i] for i in wanted]))


@pytest.mark.parametrize("per_example", [False, True])
def test_never_waits_for_the_device(per_example: bool, request: pytest.FixtureRequest) -> None:
    """With a fixed mask, also in training; and with a gate that wants its gradient, whatever it is."""
    inputs = make(8, 16, 64, per_example=per_example)
    active = [*inputs[:5], ActiveNeurons(inputs[5])]

    def everything() -> None:
        for mask in (inputs, active):
            step(mask, 0)
            step(mask, 0, 1, 2, 3, 4)
        step(inputs, 0, 5)

    everything()  # compiles the kernels, allocates
    request.getfixturevalue("no_synchronisation")
    for _ in range(3):
        for weight in inputs[1:5]:
            weight.mul_(0.99)
        everything()


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("activation", eager.ACTIVATIONS)
def test_large_problems_in_bfloat16(activation: str, per_example: bool) -> None:
    inputs = make(64, 128, 768, per_example=per_example)
    h = torch.randn(64, 128, 3072, device="cuda", dtype=torch.bfloat16)
    upstream = torch.randn_like(h)
    ours = backward(upstream, h, inputs[2], inputs[5], activation, True, True)
    wide = [x.double() for x in (upstream, h, inputs[2], inputs[5])]
    exact = reference.bias_act_gate_backward(*wide, activation, True, True)
    plain = reference.bias_act_gate_backward(upstream, h, inputs[2], inputs[5], activation, True, True)
    for value, answer, ordinary in zip(ours, exact, plain, strict=True):
        assert_accurate(value, answer, ordinary)
    value = gated_ffn(*inputs, activation=activation)
    answer = eager.gated_ffn(*(x.double() for x in inputs), activation=activation)
    assert_accurate(value, answer, eager.gated_ffn(*inputs, activation=activation))


def test_is_the_same_again() -> None:
    inputs = make(32, 128, 256, per_example=True)
    first = step(inputs, 0, 2, 5)
    for _ in range(5):
        for grad, before in zip(step(inputs, 0, 2, 5), first, strict=True):
            assert torch.equal(grad, before)


@pytest.mark.parametrize("active", [False, True])
def test_replays_in_a_cuda_graph(active: bool) -> None:
    inputs = make(8, 16, 64)
    if active:
        inputs[5] = ActiveNeurons(inputs[5])
    gated_ffn(*inputs)  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gated_ffn(*inputs)
    inputs[0].copy_(make(8, 16, 64)[0].flip(0))
    graph.replay()
    torch.testing.assert_close(captured, gated_ffn(*inputs))


def between(inputs: list[Tensor], h: Tensor) -> list[Tensor]:
    """What lies between the products, and its gradients."""
    return [forward(h, inputs[2], inputs[5], "gelu"), *backward(h, h, inputs[2], inputs[5], "gelu", True, True)]


@pytest.mark.parametrize("per_example", [False, True])
def test_gradients_replay_in_a_cuda_graph(per_example: bool) -> None:
    inputs = make(8, 300, 16, per_example=per_example)
    h = torch.randn(8, 300, 64, device="cuda", dtype=torch.bfloat16)
    between(inputs, h)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = between(inputs, h)
    for _ in range(2):
        h.copy_(torch.randn_like(h))
        inputs[5].neg_()
        graph.replay()
        for value, answer in zip(captured, between(inputs, h), strict=True):
            assert torch.equal(value, answer)


@pytest.mark.skipif(not NATIVE.cuda, reason=f"no CUDA C++ kernels: {NATIVE.why_no_cuda}")
@pytest.mark.parametrize("wants, per_example, kernels", [
    ((False, False), False, 1), ((True, True), False, 2), ((True, True), True, 2), ((False, True), True, 1)
])  # fmt: skip
def test_few_launches(wants: tuple[bool, bool], per_example: bool, kernels: int) -> None:
    """One forward; one backward, and one more to add up sums, which a gate's over an example's few rows need not."""
    inputs = make(8, 128, 64, per_example=per_example)
    h = torch.randn(8, 128, 256, device="cuda", dtype=torch.bfloat16)
    for call, expected in (
        (lambda: forward(h, inputs[2], inputs[5], "gelu"), 1),
        (lambda: backward(h, h, inputs[2], inputs[5], "gelu", *wants), kernels),
    ):
        call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        assert len(names) == expected and all("sweep" in name or "add_runs" in name for name in names), names


@pytest.mark.parametrize("width", [4096, 4099])
def test_more_elements_than_32_bits_count(width: int) -> None:
    rows = 2**31 // width + 200
    if torch.cuda.mem_get_info()[0] < 5 * rows * width * 2:
        pytest.skip("too little memory")
    h = torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)
    h[-1] = torch.linspace(-3, 3, width)
    gate = torch.full((width,), 2.0, device="cuda")
    value, _, grads, gates = forward(h, None, gate, "relu"), *backward(h, h, gate, gate, "relu", True, True)
    torch.testing.assert_close(value[-1], 2 * h[-1].relu())
    assert not value[:-1].any()
    torch.testing.assert_close(grads, torch.where(h[-1] + gate > 0, 2 * h[-1].float(), 0))
    torch.testing.assert_close(gates, h[-1].float() * (h[-1].float() + gate).relu())
