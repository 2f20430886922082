"""What only a GPU shows; the answers themselves are checked in tests/ops on every device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastdistill import gated_ffn, reference
from fastdistill.ops import ActiveNeurons
from tests import eager
from tests.accuracy import assert_accurate

pytestmark = pytest.mark.gpu


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
    backward = torch.ops.fastdistill.bias_act_gate_backward
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
