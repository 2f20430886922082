from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import gated_attention
from fastdistill.ops import reference
from tests import eager
from tests.accuracy import assert_accurate
from tests.ops.attention import DTYPES, check, with_gradients

INF = math.inf
ZERO = torch.tensor([1.0, 0.0, -0.5])
GATES = {
    "none": None,
    "heads": ZERO,
    "ones": torch.ones(3),
    "examples": torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]]),
    "zeros": torch.zeros(2, 3),
}


def make(
    batch: int = 2, heads: int = 3, queries: int = 5, keys: int = 7, size: int = 8, device: str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:  # fmt: skip
    """Query, key and value as a model has them: [B, S, H, D] transposed."""
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, n, heads, size, generator=g, dtype=torch.float64).to(device, dtype).transpose(1, 2)
        for n in (queries, keys, keys)
    ]


def masks() -> dict[str, Tensor | None]:
    g = torch.Generator().manual_seed(1)
    padding = torch.arange(7) < torch.tensor([6, 2])[:, None, None, None]
    bias = torch.randn(3, 5, 7, generator=g)
    bias[1, 4] = bias[:, :, 3] = -INF  # a query with nothing to attend to
    rows = torch.rand(2, 1, 5, 7, generator=g) < 0.5
    rows[0, 0, 2] = False
    heads = torch.randn(2, 3, 5, 7, generator=g)
    return {"none": None, "padding": padding, "bias": bias, "rows": rows, "heads": heads, "keys": heads[0, 0, 0]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("gate", GATES)
def test_every_dtype_mask_and_gate(device: str, dtype: torch.dtype, mask: str, gate: str, nan_filled: None) -> None:
    for gate_grad in (False, True) if GATES[gate] is not None else (False,):
        check(make(device=device, dtype=dtype), GATES[gate], gate_grad, masks()[mask], scale=0.4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("queries", "keys", "size"), [(2, 40, 24), (33, 33, 1), (130, 70, 64), (20, 20, 144), (40, 300, 16)]
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_every_length_and_size(
    device: str, dtype: torch.dtype, queries: int, keys: int, size: int, is_causal: bool, nan_filled: None
) -> None:
    check(make(2, 3, queries, keys, size, device, dtype), ZERO, True, is_causal=is_causal)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 40), (40, 1)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_one_query_or_key(device: str, queries: int, keys: int, is_causal: bool, nan_filled: None) -> None:
    """Gradients to query and key are 0 where there is one key."""
    args = (make(2, 3, queries, keys, device=device), ZERO.to(device), True)
    expected = with_gradients(eager.gated_attention, *args, is_causal=is_causal)
    for x, y in zip(with_gradients(gated_attention, *args, is_causal=is_causal), expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
@pytest.mark.parametrize("gate_grad", [False, True])
def test_nothing_to_attend_or_to_attend_to(device: str, shape: tuple[int, ...], gate_grad: bool) -> None:
    inputs = make(*shape, device=device)
    output, *grads, last = with_gradients(gated_attention, inputs, torch.ones(shape[1], device=device), gate_grad)
    assert output.shape == inputs[0].shape and output.count_nonzero() == 0
    for grad, x in zip(grads, inputs, strict=False):
        assert grad.shape == x.shape and grad.count_nonzero() == 0
    assert last.count_nonzero() == 0


def test_any_strides(device: str) -> None:
    query, key, value = make(device=device)
    strange = [query.contiguous(), key.mT.contiguous().mT, value[:1, :, :, :1].expand(value.shape)]
    for gate in (ZERO.double(), GATES["examples"].double()):
        for gate_grad in (False, True):
            ours = with_gradients(gated_attention, strange, gate.to(device), gate_grad)
            expected = with_gradients(eager.gated_attention, strange, gate.to(device), gate_grad)
            for x, y in zip(ours, expected, strict=True):
                torch.testing.assert_close(x, y)
    query.requires_grad_()
    grad = torch.autograd.grad(gated_attention(query, key, value).sum(), query)[0]  # expanded from a number
    torch.testing.assert_close(grad, torch.autograd.grad(eager.gated_attention(query, key, value).sum(), query)[0])


@pytest.mark.parametrize("gate", ["heads", "examples"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(gate: str, dropout_p: float) -> None:
    inputs = [x.requires_grad_() for x in make(2, 3, 3, 4, 2)]
    gates = GATES[gate].double().requires_grad_()
    mask = torch.arange(4) < torch.tensor([4, 2])[:, None, None, None]

    def attend(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return gated_attention(*tensors, mask, dropout_p)

    assert torch.autograd.gradcheck(attend, (*inputs, gates))
    assert torch.autograd.gradcheck(lambda *qkv: attend(*qkv, gates.detach()), inputs)


def test_of_a_closed_gate_the_gradient_is_the_slope(device: str) -> None:
    inputs, gate = make(device=device), torch.zeros(3, dtype=torch.float64, device=device)
    grad = with_gradients(gated_attention, inputs, gate, True)[-1]
    step = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64, device=device)
    output = gated_attention(*inputs, step)
    upstream = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).view(output.shape).to(output)
    torch.testing.assert_close((output * upstream).sum(), grad[1])


@pytest.mark.parametrize("gate", ["heads", "examples", "zeros"])
def test_a_closed_head_is_not_read(device: str, gate: str, nan_filled: None) -> None:
    """Unless its gate needs a gradient; its gradients to query, key and value are 0 then, too."""
    for gate_grad in (False, True):
        inputs, gates = make(device=device), GATES[gate].double().to(device)
        closed = (gates == 0).expand(2, 3)
        expected = with_gradients(gated_attention, inputs, gates, gate_grad)
        for x in inputs:
            x[closed] = torch.nan
        ours = with_gradients(gated_attention, inputs, gates, gate_grad)
        for x, y in zip(ours[1:4], expected[1:4], strict=True):
            torch.testing.assert_close(x, y)
            assert (x[closed] == 0).all()
        if gate_grad:
            assert ours[0][closed].isnan().all() and torch.equal(ours[4].isnan(), gates == 0)
            torch.testing.assert_close(ours[0][~closed], expected[0][~closed])
        else:
            torch.testing.assert_close(ours[0], expected[0])


@pytest.mark.parametrize("keys", [4, 40])
@pytest.mark.parametrize(
    ("which", "spoilt"), [(0, (0, 0, 2)), (1, (0, 0)), (2, (0, 0, slice(None), 1))], ids=["query", "key", "value"]
)
def test_nan_spoils_what_it_reaches(device: str, which: int, spoilt: tuple[Any, ...], keys: int) -> None:
    inputs = make(keys=keys, device=device)
    inputs[which][0, 0, 2, 1] = torch.nan
    expected = torch.zeros_like(inputs[0], dtype=torch.bool)
    expected[spoilt] = True
    assert torch.equal(gated_attention(*inputs, ZERO.double().to(device)).isnan(), expected)


def test_large_scores(device: str) -> None:
    """One key has all of the probability: gradients of scores are differences of equal numbers, rounded."""
    inputs = [x * 100 for x in make(device=device, dtype=torch.float32)]
    wide = [x.double() for x in inputs]
    ours = with_gradients(gated_attention, inputs, ZERO.to(device), True)
    plain = with_gradients(eager.gated_attention, inputs, ZERO.to(device), True)
    exact = with_gradients(eager.gated_attention, wide, ZERO.to(device), True)
    for what, *values in zip(("output", "query", "key", "value", "gate"), ours, exact, plain, strict=True):
        if what not in ("query", "key"):
            assert_accurate(*values, what=what)
            continue
        query, key, value = (float(x.abs().max()) for x in inputs)
        largest = 2 * 8 * value * max(query, key) * 8**-0.5  # of what is subtracted: upstream, channels, scale
        assert float((values[0] - values[1]).abs().max()) < 2 * torch.finfo(torch.float32).eps * largest, what


# Dropout --------------------------------------------------------------------------------------------------------------


def test_dropout_is_by_seed(device: str) -> None:
    inputs = make(2, 3, 40, 50, 8, device, torch.float32)
    torch.manual_seed(5)
    first = gated_attention(*inputs, dropout_p=0.2)
    second = gated_attention(*inputs, dropout_p=0.2)
    torch.manual_seed(5)
    assert torch.equal(gated_attention(*inputs, dropout_p=0.2), first)
    assert not torch.equal(first, second)


def test_dropout_leaves_out_its_share(device: str) -> None:
    """Values of unit vectors show the weights: 0, or those of no dropout divided by what share is kept."""
    query, key, _ = make(4, 3, 64, 64, 64, device, torch.float32)
    value = torch.eye(64, device=device).expand(4, 3, 64, 64)
    weights, dropped = gated_attention(query, key, value), gated_attention(query, key, value, dropout_p=0.3)
    kept = dropped != 0
    assert abs(kept.float().mean() - 0.7) < 0.01
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.7)


@pytest.mark.parametrize("gate", ["heads", "examples"])
@pytest.mark.parametrize("gate_grad", [False, True])
def test_dropout_goes_backward_as_forward(gate: str, gate_grad: bool, nan_filled: None) -> None:
    inputs, gates = make(), GATES[gate].double()

    def explicit(query: Tensor, key: Tensor, value: Tensor, head_gate: Tensor, mask: None) -> Tensor:
        weights = (query @ key.mT / math.sqrt(8)).softmax(-1)
        seed = torch.randint(2**63 - 1, ())
        return weights * reference.dropout_factors(seed, weights, 0.3) @ value * head_gate[..., None, None]

    torch.manual_seed(2)
    ours = with_gradients(gated_attention, inputs, gates, gate_grad, dropout_p=0.3)
    torch.manual_seed(2)
    for x, y in zip(ours, with_gradients(explicit, inputs, gates, gate_grad), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keys", [1, 6, 37, 300])
def test_dropout_without_gates(keys: int, dtype: torch.dtype, nan_filled: None) -> None:
    """Unit vectors as values show which weights are kept, of queries that are more than a kernel has at once."""
    query, key, _ = make(2, 4, 41, keys, keys, dtype=dtype)
    _, _, value = make(2, 4, 41, keys, keys, dtype=dtype)
    key, value = key[:, :2], value[:, :2]  # each for two heads of the query
    padding = torch.arange(keys) < torch.tensor([keys, max(1, keys - 2)])[:, None, None, None]
    unit = torch.eye(keys, dtype=dtype).expand(2, 2, keys, keys)
    torch.manual_seed(4)
    kept = gated_attention(query, key, unit, attn_mask=padding, dropout_p=0.3) != 0
    assert keys < 9 or abs(kept.double().mean() - 0.7 * padding.double().mean()) < 0.02

    def explicit(query: Tensor, key: Tensor, value: Tensor, gate: None, mask: Tensor) -> Tensor:
        key, value = (x.repeat_interleave(2, 1) for x in (key, value))
        scores = (query @ key.mT / math.sqrt(keys)).masked_fill(~mask, -INF)
        return scores.softmax(-1) * kept / 0.7 @ value

    torch.manual_seed(4)
    ours = with_gradients(gated_attention, [query, key, value], None, False, padding, dropout_p=0.3)
    for x, y in zip(ours, with_gradients(explicit, [query, key, value], None, False, padding), strict=True):
        torch.testing.assert_close(x, y)


# With the rest of PyTorch ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gate", "gate_grad"), [("none", False), ("heads", False), ("heads", True), ("examples", True)]
)
def test_opcheck(device: str, gate: str, gate_grad: bool) -> None:
    inputs = [x.to(device).requires_grad_() for x in make(dtype=torch.float32)]
    gates = None if gate == "none" else GATES[gate].clone().to(device)
    mask = masks()["padding"].to(device)
    for seed, p in ((None, 0.0), (torch.tensor(1, device=device), 0.2)):
        options = (mask, seed, p, False, 0.3, gate_grad)
        wanted = gates.clone().requires_grad_() if gate_grad else gates
        torch.library.opcheck(torch.ops.fastdistill.gated_attention.default, (*inputs, wanted, *options))
        qkv = [x.detach() for x in inputs]
        output, ungated, logsumexp = torch.ops.fastdistill.gated_attention(*qkv, gates, *options)
        saved = (ungated if gate_grad else output, logsumexp)
        args = (torch.ones_like(output), *qkv, gates, *options[:2], *saved, *options[2:])
        torch.library.opcheck(torch.ops.fastdistill.gated_attention_backward.default, args)


@pytest.mark.slow
def test_compiles_whole(device: str) -> None:
    torch.compiler.reset()

    def block(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, mask: Tensor) -> Tensor:
        return gated_attention(query * 2, key, value, gate, mask).transpose(1, 2).flatten(2) * 3

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for batch in (2, 4):
        args = (make(batch, device=device, dtype=torch.float32), ZERO.to(device), True, masks()["bias"].to(device))
        for x, y in zip(with_gradients(compiled, *args), with_gradients(block, *args), strict=True):
            torch.testing.assert_close(x, y)


def test_compiles_with_dropout(device: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda *args: gated_attention(*args, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    inputs = make(2, 3, 32, 32, 8, device, torch.float32)
    outputs = [with_gradients(compiled, inputs, ZERO.to(device), True)[0] for _ in range(2)]
    assert not torch.equal(*outputs)


def test_autocast_casts_as_for_plain_attention(device: str) -> None:
    inputs = make(device=device, dtype=torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        ours = with_gradients(gated_attention, inputs, ZERO.to(device), True)
        plain = with_gradients(eager.gated_attention, inputs, ZERO.to(device), True)
    exact = with_gradients(eager.gated_attention, [x.double() for x in inputs], ZERO.double().to(device), True)
    assert ours[0].dtype == torch.bfloat16 and ours[1].dtype == torch.float32
    for x, *others in zip(ours, exact, plain, strict=True):
        error, allowed = (torch.linalg.vector_norm(y.double() - others[0]) for y in (x, others[1]))
        assert error <= 2 * allowed + 2 * torch.finfo(torch.bfloat16).eps * torch.linalg.vector_norm(others[0])


def test_gradients_accumulate_and_reach_only_who_asks(device: str) -> None:
    query, key, value = make(device=device)
    gate = ZERO.to(device, torch.float64).requires_grad_()
    for _ in range(2):
        gated_attention(query, key, value, gate).sum().backward()
    expected = torch.autograd.grad(eager.gated_attention(query, key, value, gate).sum(), gate)[0]
    torch.testing.assert_close(gate.grad, 2 * expected)
    assert query.grad is None
    with torch.no_grad():
        assert not gated_attention(query, key, value, gate).requires_grad
    output = gated_attention(query.requires_grad_(), key, value, gate)
    output.sum().backward(retain_graph=True)
    first = query.grad.clone()
    output.sum().backward()
    torch.testing.assert_close(query.grad, 2 * first)


def test_the_output_may_be_changed_in_place(device: str) -> None:
    inputs, gate = make(device=device), torch.ones(3, dtype=torch.float64, device=device, requires_grad=True)
    output = gated_attention(*inputs, gate)
    kept = output.detach().clone()
    output.mul_(2)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), gate)[0], 2 * kept.sum((0, 2, 3)))


def test_second_derivative_is_an_error() -> None:
    query, key, value = make()
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(gated_attention(query.requires_grad_(), key, value).sum(), query, create_graph=True)


def test_reference_gradients_are_autograds() -> None:
    for gate in (None, ZERO.double(), GATES["examples"].double()):
        inputs = make()
        exact = with_gradients(eager.gated_attention, inputs, gate, gate is not None, masks()["bias"].double())
        upstream = torch.linspace(-1, 2, exact[0].numel(), dtype=torch.float64).view(exact[0].shape)
        options = (0.0, False, 1 / math.sqrt(8), gate is not None)
        output, ungated, logsumexp = reference.gated_attention(*inputs, gate, masks()["bias"], None, *options)
        saved = output if gate is None else ungated
        args = (upstream, *inputs, gate, masks()["bias"], None, saved, logsumexp, *options)
        for x, y in zip(reference.gated_attention_backward(*args), exact[1:], strict=False):
            torch.testing.assert_close(x, y)


# Errors ---------------------------------------------------------------------------------------------------------------

Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 7, 8)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (([[0.0]], K, K), {}, TypeError, "query is a list"),
        ((Q.long(), K, K), {}, TypeError, "query has dtype torch.int64"),
        ((Q, K.double(), K), {}, TypeError, "key has dtype torch.float64, query torch.float32"),
        ((Q[0], K, K), {}, ValueError, r"query has shape \(4, 5, 8\); expected 4 dimensions"),
        ((Q, K[:, :3], K[:, :3]), {}, ValueError, "key has 3 heads, query 4; expected 4, or .* its divisor"),
        ((Q, K[:, :0], K[:, :0]), {}, ValueError, "key has 0 heads, query 4"),
        ((Q, K[:, :2], K), {}, ValueError, r"value has shape \(2, 4, 7, 8\).*expected \(2, 2, 7, 8\)"),
        ((Q, K[0, 0], K[0, 0]), {}, ValueError, r"key has shape \(7, 8\); expected 4 dimensions"),
        ((Q, K, K[:, :, :6]), {}, ValueError, r"value has shape \(2, 4, 6, 8\).*expected \(2, 4, 7, 8\)"),
        ((Q, K, K[..., :4]), {}, ValueError, "value has shape"),
        ((Q, K[:1], K), {}, ValueError, "key has shape"),
        ((Q[..., :0], K[..., :0], K[..., :0]), {}, ValueError, "at least 1 channel"),
        ((Q, K.to("meta"), K), {}, ValueError, "key is on meta but query is on cpu"),
        ((Q, K, K, torch.ones(3)), {}, ValueError, r"head_gate has shape \(3,\); expected \(4,\).*or \(2, 4\)"),
        ((Q, K, K, torch.ones(1, 4, 1)), {}, ValueError, "head_gate has shape"),
        ((Q, K, K, torch.ones(4).long()), {}, TypeError, "head_gate has dtype torch.int64"),
        ((Q, K, K, 1.0), {}, TypeError, "head_gate is a float"),
        ((Q, K, K, torch.ones(4, device="meta")), {}, ValueError, "head_gate is on meta"),
        ((Q, K, K, None, torch.ones(5, 6)), {}, ValueError, r"attn_mask has shape \(5, 6\).*\(2, 4, 5, 7\)"),
        ((Q, K, K, None, torch.ones(1, 2, 4, 5, 7)), {}, ValueError, "attn_mask has shape"),
        ((Q, K, K, None, torch.ones(5, 7).long()), {}, TypeError, "attn_mask has dtype torch.int64"),
        ((Q, K, K, None, torch.ones(5, 7, device="meta")), {}, ValueError, "attn_mask is on meta"),
        ((Q, K, K, None, torch.ones(5, 7, requires_grad=True)), {}, ValueError, "attn_mask requires a gradient"),
        ((Q, K, K, None, torch.ones(5, 7)), {"is_causal": True}, ValueError, "is_causal is True and attn_mask is"),
        ((Q, K, K), {"is_causal": 1}, TypeError, "is_causal is 1; expected a bool"),
        ((Q, K, K), {"dropout_p": 1.0}, ValueError, "dropout_p is 1.0; expected a finite number >= 0 and < 1"),
        ((Q, K, K), {"dropout_p": -0.1}, ValueError, "dropout_p is -0.1"),
        ((Q, K, K), {"dropout_p": None}, TypeError, "dropout_p is None"),
        ((Q, K, K), {"scale": math.nan}, ValueError, "scale is nan"),
        ((Q, K, K), {"scale": "auto"}, TypeError, "scale is 'auto'"),
    ],
)
def test_bad_arguments(args: tuple, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        gated_attention(*args, **options)
