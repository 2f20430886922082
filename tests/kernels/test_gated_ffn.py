from __future__ import annotations

import math

import pytest
import torch
from fastdistill.kernels import gated_ffn as module
from torch import Tensor

from fastdistill.ops import reference
from tests.accuracy import assert_accurate
from tests.kernels.conftest import DEVICE
from tests.kernels.interpreter import interpreted

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def make(*shape: int, per_example: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """An upstream gradient, pre-activations, bias, gate."""
    g = torch.Generator().manual_seed(0)
    sizes = (shape, shape, shape[-1:], (*shape[:1], shape[-1]) if per_example else shape[-1:])
    upstream, h, bias, gate = (torch.randn(size, generator=g).to(DEVICE, dtype) for size in sizes)
    gate[..., ::3] = 0
    return upstream, h * 2, bias, gate


def check(upstream: Tensor, h: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str = "gelu") -> None:
    """Against the reference in float64, by the rule for what the reference costs in the tensors' own dtypes."""
    wants = bias is not None, gate is not None
    exact, plain = (
        (
            reference.bias_act_gate(*args[1:], activation),
            *reference.bias_act_gate_backward(*args, activation, *wants),
        )
        for args in (
            [x if x is None else x.double() for x in (upstream, h, bias, gate)],
            (upstream, h, bias, gate),
        )
    )
    ours = (
        module.bias_act_gate(h, bias, gate, activation),
        *module.bias_act_gate_backward(upstream, h, bias, gate, activation, *wants),
    )
    for what, value, answer, ordinary in zip(("value", "h", "bias", "gate"), ours, exact, plain, strict=True):
        assert value.dtype == ordinary.dtype and value.is_contiguous()
        assert_accurate(value, answer, ordinary, what)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_dtype_and_activation(activation: str, dtype: torch.dtype) -> None:
    for per_example in (False, True):
        check(*make(3, 5, 37, per_example=per_example, dtype=dtype), activation)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize(
    "shape", [(1, 600), (5, 2, 513), (3, module.RUN, 20), (2, module.RUN + 1, 130), (150, 16), (2, 70, 2, 19)]
)
def test_every_size(shape: tuple[int, ...]) -> None:
    upstream, h, bias, gate = make(*shape)
    check(upstream, h, bias, gate)
    check(*make(*shape, per_example=True))
    check(upstream, h, None, gate)
    check(upstream, h, bias, None)
    check(upstream, h, None, None)


@interpreted
def test_any_layout_and_mixed_dtypes() -> None:
    upstream, h, bias, gate = make(4, 3, 20, per_example=True)
    check(upstream[:, :1].expand(h.shape), h.mT.contiguous().mT, bias.flip(0)[::1], gate.T.contiguous().T)
    bias, gate = bias.double(), gate.bfloat16()
    ours, expected = (
        m.bias_act_gate_backward(upstream, h, bias, gate, "silu", True, True) for m in (module, reference)
    )
    for value, answer in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, answer, rtol=2e-6, atol=1e-6)


@interpreted
@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (3, 0)])
def test_nothing_to_compute(shape: tuple[int, ...]) -> None:
    for per_example in (False, True):
        check(*make(*shape, per_example=per_example))


@interpreted
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_huge_and_not_finite_pre_activations(activation: str) -> None:
    h = torch.tensor([1e4, -1e4, math.inf, -math.inf, math.nan, 0.0, 1.0], device=DEVICE)
    ones = torch.ones_like(h)
    ours = module.bias_act_gate(h, None, None, activation)
    torch.testing.assert_close(ours, reference.bias_act_gate(h, None, None, activation), equal_nan=True)
    ours, expected = (
        m.bias_act_gate_backward(ones, h, None, None, activation, False, False)[0] for m in (module, reference)
    )
    torch.testing.assert_close(ours, expected, equal_nan=True)
