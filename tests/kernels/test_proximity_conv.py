from __future__ import annotations

import math

import pytest
import torch
from fastdistill.kernels import proximity_conv as module
from torch import Tensor

from fastdistill.ops import reference
from tests.accuracy import assert_accurate
from tests.kernels.conftest import DEVICE
from tests.kernels.interpreter import interpreted

pytestmark = interpreted
DTYPES = (torch.float32, torch.float16, torch.float64)  # the interpreter has no products in bfloat16
WHAT = ("output", "states", "proximity", "weight", "bias")


def make(
    batch: int, length: int, width: int, channels: int, taps: int = 3, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """States, proximity, weight, bias."""
    g = torch.Generator().manual_seed(0)
    shapes = (batch, length, width), (batch, length), (channels, width, taps), (channels,)
    tensors = [torch.randn(shape, generator=g).to(DEVICE) for shape in shapes]
    tensors[2] /= math.sqrt(width * taps)
    return [x.to(dtype) for x in tensors]


def padding(batch: int, length: int) -> Tensor:
    lengths = length - torch.arange(batch) * 3 % length
    return (torch.arange(length) < lengths[:, None]).to(DEVICE)


def run(by: object, inputs: list[Tensor | None], mask: Tensor | None, positions: Tensor | None = None) -> list[Tensor]:
    """Everything that the two ops return; the gradients at the given positions, or its own."""
    states, proximity, weight, bias = inputs
    output, found = by.proximity_conv(*inputs, mask)
    upstream = torch.linspace(-1, 2, max(output.numel(), 1), device=DEVICE)[: output.numel()].view(output.shape)
    args = (upstream.to(output.dtype), states, proximity, weight, mask, found if positions is None else positions)
    return [output, *by.proximity_conv_backward(*args, True, True, True, bias is not None), found]


def check(inputs: list[Tensor | None], mask: Tensor | None = None) -> None:
    """Against the reference in float64, by the rule for what the reference costs in the tensors' own dtype."""
    ours = run(module, inputs, mask)
    exact = run(reference, [None if x is None else x.double() for x in inputs], mask)
    plain = run(reference, inputs, mask, exact[-1])
    assert torch.equal(ours[-1], exact[-1])
    for what, value, answer, ordinary in zip(WHAT, ours, exact, plain, strict=False):
        assert value.dtype == ordinary.dtype and value.is_contiguous()
        assert_accurate(value, answer, ordinary, what)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taps", [1, 3, 5])
def test_every_dtype(taps: int, dtype: torch.dtype) -> None:
    inputs = make(3, 9, 20, 18, taps, dtype)
    check(inputs)
    check([*inputs[:3], None], padding(3, 9))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "length", "width", "channels"),
    [(1, 1, 1, 1), (2, 70, 16, 5), (17, 5, 40, 3), (2, 33, 130, 4), (1, 66, 264, 3), (1, 3, 8, 70), (35, 2, 8, 2)],
)
def test_every_size(batch: int, length: int, width: int, channels: int) -> None:
    """One tile and several of tokens, of channels, of the width and of sentences; aligned and not."""
    mask = padding(batch, length)
    check(make(batch, length, width, channels))
    check(make(batch, length, width, channels, dtype=torch.float16), mask.flip(1))


def test_any_layout_and_another_dtype_of_proximity() -> None:
    states, proximity, weight, bias = make(4, 6, 24, 9)
    mask = padding(4, 6)
    check(
        [states.transpose(0, 1).contiguous().transpose(0, 1), proximity.T.contiguous().T, weight, bias],
        mask.T.contiguous().T,
    )
    check([states.mT.contiguous().mT, proximity[:1].expand(4, 6), weight.mT.contiguous().mT, bias.flip(0)])
    states = states.half().repeat(1, 1, 2)[..., :23]
    ours, expected = (
        run(m, [states, proximity, weight[:, :23].half(), bias.half()], mask) for m in (module, reference)
    )
    for value, answer in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, answer, rtol=2e-3, atol=1e-3)


def test_only_what_is_wanted_is_computed() -> None:
    inputs = make(3, 7, 20, 5)
    output, positions = module.proximity_conv(*inputs, None)
    every = module.proximity_conv_backward(output, *inputs[:3], None, positions, True, True, True, True)
    for which in range(4):
        wanted = [i == which for i in range(4)]
        grads = module.proximity_conv_backward(output, *inputs[:3], None, positions, *wanted)
        assert [x.numel() > 0 for x in grads] == wanted
        torch.testing.assert_close(grads[which], every[which])


def test_ties_padding_and_nothing_real() -> None:
    """Small integers; the first of equals; NaN in the padding is not read."""
    states, proximity, bias = torch.ones(3, 40, 16), torch.ones(3, 40), torch.zeros(3)
    weight = torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1).expand(3, 16, 3).contiguous()
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[1, :34], mask[2] = False, False
    states[~mask], proximity[~mask] = torch.nan, torch.nan
    inputs, mask = [x.to(DEVICE) for x in (states, proximity, weight, bias)], mask.to(DEVICE)
    ours, expected = (run(m, inputs, mask) for m in (module, reference))
    assert ours[-1].tolist() == [[1, 0, 0], [35, 34, 34], [-1, -1, -1]]
    for value, answer in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, answer)
    assert (ours[0][2] == -math.inf).all()


@pytest.mark.parametrize("place", [0, 10, 39])
def test_nan_and_infinities_spoil_what_they_reach(place: int) -> None:
    for value in (math.nan, math.inf, -math.inf):
        states, *rest = make(3, 40, 20, 7)
        states[1, place, 3] = value
        (output, positions), (expected, at) = (m.proximity_conv(states, *rest, None) for m in (module, reference))
        torch.testing.assert_close(output, expected, equal_nan=True)
        assert torch.equal(positions, at)


@pytest.mark.parametrize(("batch", "channels"), [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_compute(batch: int, channels: int) -> None:
    inputs = make(batch, 4, 6, channels)
    for value, answer in zip(run(module, inputs, None), run(reference, inputs, None), strict=True):
        torch.testing.assert_close(value, answer)
