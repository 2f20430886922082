from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from fastdistill.kernels import gated_attention as kernels
from torch import Tensor

from tests.kernels import by_triton
from tests.kernels.attention import HALF, both, check, pytestmark  # noqa: F401
from tests.kernels.conftest import DEVICE
from tests.kernels.interpreter import interpreted

INF = math.inf


def make(
    batch: int = 2,
    heads: int = 2,
    queries: int = 21,
    keys: int = 37,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Query, key, value and upstream gradient, in memory as [B, S, H, D]."""
    g = torch.Generator().manual_seed(0)
    lengths = (queries, keys, keys, queries)
    return [torch.randn(batch, n, heads, size, generator=g).to(DEVICE, dtype).transpose(1, 2) for n in lengths]


GATES = {
    "none": (None, False),
    "heads": (torch.tensor([0.0, -0.5]), False),
    "heads, with gradient": (torch.tensor([0.0, -0.5]), True),
    "examples": (torch.tensor([[2.0, 0.0], [0.0, 1.0]]), False),
    "examples, with gradient": (torch.tensor([[2.0, 0.0], [0.0, 1.0]]), True),
}


def masks() -> dict[str, Tensor | None]:
    g = torch.Generator().manual_seed(1)
    padding = torch.arange(37) < torch.tensor([30, 5])[:, None, None, None]
    bias = torch.randn(2, 21, 37, generator=g)
    bias[1, 4] = bias[:, :, 20:] = -INF
    rows = torch.rand(2, 1, 21, 37, generator=g) < 0.4
    rows[1, 0, 3] = False
    queries = torch.ones(21, 1, dtype=torch.bool)
    queries[7] = False
    return {"none": None, "padding": padding, "bias": bias, "rows": rows, "queries": queries,
            "half bias": torch.randn(37, generator=g).bfloat16()}  # fmt: skip


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_gates(name: str, dtype: torch.dtype) -> None:
    gate, gate_grad = GATES[name]
    check(make(dtype=dtype), None if gate is None else gate.to(DEVICE), masks()["padding"].to(DEVICE),
          gate_grad=gate_grad)  # fmt: skip


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("name", masks())
def test_masks(name: str) -> None:
    mask = masks()[name]
    check(make(), torch.tensor([0.5, 0.0], device=DEVICE), None if mask is None else mask.to(DEVICE))


def masks_of_rows() -> dict[str, Tensor]:
    """Of 21 queries and 64 keys: those that can be read a tile at a time as they are, and those that must be copied."""
    whole = torch.rand(2, 1, 21, 320, generator=torch.Generator().manual_seed(2)) < 0.4
    return {
        "whole": whole[..., :64],
        "not aligned": whole[..., 1:65],
        "not of single bytes": whole.float()[..., :64].log(),
        "apart": whole[..., ::5],
        "transposed": whole[:, :, 0, :].view(2, 1, 64, 5).repeat(1, 1, 1, 5)[..., :21].mT,
        "for each head": whole[:1, 0, None, :, :64].repeat(1, 2, 1, 1),
        "one column": whole[..., :1],
    }


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize(
    ("name", "keys", "dtype"),
    [
        *((name, 64, torch.float32) for name in masks_of_rows()),
        *((name, 40, HALF) for name in ("whole", "not of single bytes", "for each head", "one column")),
    ],
)  # those that are copied are then as the others, whatever reads them
def test_masks_of_rows(name: str, keys: int, dtype: torch.dtype) -> None:
    mask = masks_of_rows()[name].to(DEVICE)
    check(make(keys=keys, dtype=dtype), None, mask[..., : min(keys, mask.shape[-1])])


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_what_a_mask_hides_does_not_matter(dtype: torch.dtype) -> None:
    inputs, mask = make(dtype=dtype), torch.ones(21, 37, dtype=torch.bool, device=DEVICE)
    mask[:, 30:] = False
    expected = both(inputs, None, mask)
    inputs[1][:, :, 30:] = torch.nan
    assert torch.equal(both(inputs, None, mask)[0], expected[0])


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_of_the_least_number_is_no_mask(dtype: torch.dtype) -> None:
    """It is added: where all scores are the same the output is the values' mean, as in PyTorch."""
    inputs, least = make(), torch.finfo(dtype).min
    mask = torch.zeros(21, 37, dtype=dtype, device=DEVICE)
    mask[4] = mask[5, 3:] = mask[6, :3] = least
    mask[6, 3:], mask[7] = -INF, -1e9
    check(inputs, None, mask)
    check(inputs, None, mask[4])
    torch.testing.assert_close(both(inputs, None, mask)[0][:, :, 4], inputs[2].mean(2))


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize(("heads", "queries", "keys"), [(2, 1, 1), (1, 150, 70), (1, 64, 129), (1, 300, 20)])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(heads: int, queries: int, keys: int, causal: bool) -> None:
    check(make(1, heads, queries, keys), causal=causal)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("size", [1, 24, 35, 80, 100, 130])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_sizes_of_a_head(size: int, dtype: torch.dtype) -> None:
    check(make(1, 2, 20, 20, size, dtype), torch.ones(2, device=DEVICE), gate_grad=True)


@interpreted
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_nothing(shape: tuple[int, ...]) -> None:
    check(make(*shape), torch.ones(shape[1], device=DEVICE), gate_grad=True)


@pytest.mark.slow
@interpreted
def test_any_strides() -> None:
    """Channels apart, rows of one memory, rows that begin anywhere, a gradient expanded from a number."""
    query, key, value, _ = make()
    key, value = key.mT.contiguous().mT, torch.stack([value, value], -2).flatten(-2)[..., ::2]
    check([query, key, query.new_ones(()).expand(value.shape), query.new_ones(()).expand(query.shape)])
    check([F.pad(x, (1, 2))[..., 1:-2] for x in make()])
    check([F.pad(x, (1, 15))[..., 1:-15] for x in make()])


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("gate_grad", [False, True])
def test_any_strides_of_what_the_forward_gave(gate_grad: bool) -> None:
    *qkv, upstream = make()
    options = (torch.ones(2, device=DEVICE), None, None, 0.0, False, 0.3, gate_grad)
    output, ungated, logsumexp = by_triton.gated_attention(*qkv, *options)
    saved = ungated if gate_grad else output
    expected = by_triton.gated_attention_backward(upstream, *qkv, *options[:3], saved, logsumexp, *options[3:])
    saved, logsumexp = saved.mT.contiguous().mT, logsumexp.mT.contiguous().mT
    found = by_triton.gated_attention_backward(upstream, *qkv, *options[:3], saved, logsumexp, *options[3:])
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("gate_grad", [False, True])
def test_a_closed_head_is_not_read(gate_grad: bool) -> None:
    """Unless its gate needs a gradient; and its own gradients to query, key and value are 0 then, too."""
    inputs, gate = make(), torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=DEVICE)
    expected = both(inputs, gate, None, gate_grad=gate_grad)
    for x in inputs[:3]:
        x[gate == 0] = torch.nan
    output, _, logsumexp, *grads, grad_gate = both(inputs, gate, None, gate_grad=gate_grad)
    for x, other in zip(grads, expected[3:6], strict=True):
        assert torch.equal(x, other) and (x[gate == 0] == 0).all()
    if gate_grad:
        assert torch.equal(grad_gate.isnan(), gate == 0)
    else:
        assert torch.equal(output, expected[0]) and torch.equal(logsumexp, expected[2])


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("by_example", [False, True])
def test_gates_around_attention_by_cudnn(by_example: bool, dtype: torch.dtype) -> None:
    ungated, *_, upstream = make(queries=150, size=40, dtype=dtype)
    gate = torch.tensor([[2.0, 0.0], [0.3, 1.0]] if by_example else [0.3, 0.0], device=DEVICE).expand(2, 2)
    output, grad_ungated = (torch.full_like(ungated, math.nan) for _ in range(2))
    shares = torch.full((2, 2, 3), math.nan, device=DEVICE)

    def launch(name: str, tensors: list[Tensor], strided: int) -> None:
        strides = [3] * strided + [0] * (len(tensors) - strided) + [2, 4, 0]
        others = [gate, ungated, ungated]  # of which mask and seed are not read
        options = (40, 1, True, True, 0, False, False, False)
        kernels.launch(name, [*tensors, *others], strides, (2, 150, 150), (1.0, 0.0), options, 150, 4)

    launch("gate", [ungated, output], 2)
    launch("gate_gradient", [upstream, ungated, grad_ungated, shares], 3)
    for ours, x in ((output, ungated), (grad_ungated, upstream)):
        torch.testing.assert_close(ours, (x.float() * gate[..., None, None]).to(dtype))
    torch.testing.assert_close(shares.sum(2), (upstream.float() * ungated.float()).sum((2, 3)))


def with_dropout(inputs: list[Tensor], kept: Tensor, p: float, gate: Tensor, scale: float = 0.3) -> list[Tensor]:
    query, key, value, gate = (x.double().requires_grad_() for x in (*inputs[:3], gate))
    weights = (scale * query @ key.mT).softmax(-1) * kept / (1 - p)
    output = weights @ value * gate[:, None, None]
    return [output, *torch.autograd.grad(output, (query, key, value, gate), inputs[3].double())]


@pytest.mark.slow
@interpreted
def test_dropout_is_the_same_forward_and_backward() -> None:
    """Values of unit vectors show which weights were kept; with those the answer is plain PyTorch's."""
    p, seed = 0.3, torch.tensor(2**40 + 7, device=DEVICE)
    query, key, value, upstream = inputs = make(2, 2, 20, 32, 32)
    gate = torch.tensor([1.0, -0.5], device=DEVICE)
    unit = torch.eye(32, device=DEVICE).expand(2, 2, 32, 32)
    kept = both([query, key, unit, upstream], None, None, seed, p)[0] != 0
    assert abs(kept.float().mean() - (1 - p)) < 0.03
    assert not torch.equal(kept[0, 0], kept[0, 1]) and not torch.equal(kept[0, 0], kept[1, 0])
    ours = both(inputs, gate, None, seed, p, gate_grad=True)
    for x, exact in zip((ours[0], *ours[3:]), with_dropout(inputs, kept, p, gate), strict=True):
        torch.testing.assert_close(x.double(), exact, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours[0], both(inputs, gate, None, seed, p)[0])
    assert not torch.equal(ours[0], both(inputs, gate, None, seed + 1, p)[0])
    assert not torch.equal(ours[0], both(inputs, gate, None, seed + 2**32, p)[0])
