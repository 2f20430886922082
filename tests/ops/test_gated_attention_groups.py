"""gated_attention where the query's heads share heads of key and value."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill import gated_attention
from fastdistill.ops import reference
from tests.ops.attention import DTYPES, check, with_gradients

FOUR = torch.tensor([1.0, 0.0, -0.5, 2.0])
GATES = {
    "none": None,
    "ones": torch.ones(4),
    "heads": FOUR,
    "one group closed": torch.tensor([0.0, 0.0, 1.0, 0.5]),
    "examples": torch.stack([FOUR, FOUR.flip(0) * torch.tensor([1.0, 1.0, 1.0, 0.0])]),
    "zeros": torch.zeros(4),
}


def make(
    heads: int = 4, groups: int = 2, queries: int = 5, keys: int = 20, size: int = 8, device: str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:  # fmt: skip
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, n, h, size, generator=g, dtype=torch.float64).to(device, dtype).transpose(1, 2)
        for n, h in ((queries, heads), (keys, groups), (keys, groups))
    ]


def masks() -> dict[str, Tensor | None]:
    g = torch.Generator().manual_seed(1)
    return {
        "none": None,
        "padding": torch.arange(20) < torch.tensor([18, 2])[:, None, None, None],
        "heads": torch.randn(2, 4, 5, 20, generator=g),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("gate", GATES)
def test_every_dtype_mask_and_gate(device: str, dtype: torch.dtype, mask: str, gate: str, nan_filled: None) -> None:
    for gate_grad in (False, True) if GATES[gate] is not None else (False,):
        check(make(device=device, dtype=dtype), GATES[gate], gate_grad, masks()[mask], scale=0.4)


@pytest.mark.parametrize(("heads", "groups"), [(6, 1), (6, 2), (6, 3), (8, 1)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_every_grouping(device: str, heads: int, groups: int, is_causal: bool, nan_filled: None) -> None:
    inputs = make(heads, groups, 33, 40, 16, device, torch.float32)
    for gate in (None, torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0])[:heads]):
        check(inputs, gate, gate is not None, is_causal=is_causal)
        check(inputs, gate, False, is_causal=is_causal)


def test_groups_are_pytorchs(device: str) -> None:
    inputs = make(device=device)
    exact = F.scaled_dot_product_attention(*inputs, enable_gqa=True)
    torch.testing.assert_close(gated_attention(*inputs), exact)


@pytest.mark.parametrize("gate", ["one group closed", "examples"])
def test_a_group_of_closed_heads_is_not_read(device: str, gate: str, nan_filled: None) -> None:
    """Nor does an open head's group lose anything by a closed one in it."""
    gates = GATES[gate].double().to(device)
    closed = (gates == 0).expand(2, 4)
    shut = closed.unflatten(1, (2, 2)).all(-1)
    assert shut.any()
    expected = with_gradients(gated_attention, make(device=device), gates, False)
    inputs = make(device=device)
    inputs[0][closed] = inputs[1][shut] = inputs[2][shut] = torch.nan
    for x, y, where in zip(
        with_gradients(gated_attention, inputs, gates, False), expected, (closed, closed, shut, shut), strict=True
    ):
        torch.testing.assert_close(x, y)
        assert (x[where] == 0).all()


def test_one_query(device: str, nan_filled: None) -> None:
    """As with a cache of keys."""
    check(make(8, 2, 1, 40, 16, device, torch.float32), None, False)


@pytest.mark.parametrize("gate", ["heads", "examples"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(gate: str, dropout_p: float) -> None:
    inputs = [x.requires_grad_() for x in make(4, 2, 3, 17, 2)]
    gates = GATES[gate].double().requires_grad_()

    def attend(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return gated_attention(*tensors, None, dropout_p)

    assert torch.autograd.gradcheck(attend, (*inputs, gates), fast_mode=True)
    assert torch.autograd.gradcheck(lambda *qkv: attend(*qkv, gates.detach()), inputs, fast_mode=True)


def test_dropout_goes_backward_as_forward(nan_filled: None) -> None:
    inputs = make()

    def explicit(query: Tensor, key: Tensor, value: Tensor, head_gate: Tensor, mask: None) -> Tensor:
        key, value = (x.repeat_interleave(2, 1) for x in (key, value))
        weights = (query @ key.mT / math.sqrt(8)).softmax(-1)
        seed = torch.randint(2**63 - 1, ())
        return weights * reference.dropout_factors(seed, weights, 0.3) @ value * head_gate[..., None, None]

    torch.manual_seed(2)
    ours = with_gradients(gated_attention, inputs, FOUR.double(), True, dropout_p=0.3)
    torch.manual_seed(2)
    for x, y in zip(ours, with_gradients(explicit, inputs, FOUR.double(), True), strict=True):
        torch.testing.assert_close(x, y)


def test_nothing(device: str) -> None:
    for shape in ((4, 2, 0, 5), (4, 2, 4, 0), (0, 0, 4, 5)):
        inputs = make(*shape, device=device)
        for x, like in zip(with_gradients(gated_attention, inputs, None, False), (inputs[0], *inputs), strict=True):
            assert x.shape == like.shape and x.count_nonzero() == 0


def test_any_strides(device: str) -> None:
    query, key, value = make(device=device)
    strange: list[Any] = [query.contiguous(), key.mT.contiguous().mT, value[:1, :, :, :1].expand(value.shape)]
    for gate in GATES.values():
        check(strange, gate, False)


def test_autocast(device: str) -> None:
    inputs = make(device=device, dtype=torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        ours = with_gradients(gated_attention, inputs, FOUR.to(device), True)
    exact = with_gradients(gated_attention, [x.bfloat16() for x in inputs], FOUR.to(device), True)
    assert [x.dtype for x in ours] == [torch.bfloat16, *[torch.float32] * 4]
    for x, y in zip(ours, exact, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), rtol=0.05, atol=0.05)
