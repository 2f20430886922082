"""Heads of the query that share those of key and value; every dtype, mask and size is in test_gated_attention.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.attention import HALF, both, check, pytestmark  # noqa: F401
from tests.kernels.conftest import DEVICE
from tests.kernels.interpreter import interpreted

GATE = torch.tensor([1.0, 0.0, -0.5, 2.0], device=DEVICE)
PADDING = (torch.arange(20) < torch.tensor([18, 2])[:, None, None, None]).to(DEVICE)
CLOSED = torch.tensor([[0.0, 0.0, 1.0, 0.5], [1.0, 1.0, 0.0, 0.0]], device=DEVICE)


def make(
    heads: int = 4, groups: int = 2, queries: int = 9, keys: int = 20, size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:  # fmt: skip
    """Query, key, value and upstream gradient, in memory as [B, S, H, D]."""
    g = torch.Generator().manual_seed(0)
    sizes = ((queries, heads), (keys, groups), (keys, groups), (queries, heads))
    return [torch.randn(2, n, h, size, generator=g).to(DEVICE, dtype).transpose(1, 2) for n, h in sizes]


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize(
    ("gate", "gate_grad"), [(None, False), (GATE, False), (GATE, True), (CLOSED, False), (CLOSED, True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_gates(gate: Tensor | None, gate_grad: bool, dtype: torch.dtype) -> None:
    """In half precision one program has the whole backward of a head."""
    check(make(dtype=dtype), gate, PADDING, gate_grad=gate_grad)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("shape", [(6, 1, 1, 40), (6, 3, 20, 36), (2, 1, 70, 20)])
@pytest.mark.parametrize(("dtype", "causal"), [(torch.float32, True), (HALF, False)])
def test_groups_and_lengths(shape: tuple[int, ...], dtype: torch.dtype, causal: bool) -> None:
    check(make(*shape, dtype=dtype), causal=causal)


@interpreted
def test_a_size_that_is_padded() -> None:
    check(make(size=35), GATE, gate_grad=True)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_a_group_of_closed_heads_is_not_read(dtype: torch.dtype) -> None:
    inputs, shut = make(dtype=dtype), (CLOSED == 0).unflatten(1, (2, 2)).all(-1)
    assert shut.any()
    expected = both(inputs, CLOSED, None)
    inputs[0][CLOSED == 0] = inputs[1][shut] = inputs[2][shut] = torch.nan
    for x, other in zip(both(inputs, CLOSED, None), expected, strict=True):
        assert torch.equal(x, other)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_dropout_is_that_of_repeated_heads(dtype: torch.dtype) -> None:
    query, key, value, upstream = inputs = make(dtype=dtype)
    seed = torch.tensor(7, device=DEVICE)
    repeated = [query, *(x.repeat_interleave(2, 1) for x in (key, value)), upstream]
    ours, other = (both(some, GATE, None, seed, 0.3, gate_grad=True) for some in (inputs, repeated))
    for x, y in zip(ours[:4], other[:4], strict=True):
        assert torch.equal(x, y)
    assert torch.equal(ours[6], other[6])
    for x, y in zip(ours[4:6], other[4:6], strict=True):
        added = y.float().unflatten(1, (2, 2)).sum(2)
        torch.testing.assert_close(x.float(), added, rtol=1e-2 if dtype == HALF else 1e-6, atol=2e-3)
