from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill import dropout_add_layer_norm
from fastdistill.ops import reference
from tests import eager
from tests.accuracy import assert_accurate

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = [(3, 24), (2, 5, 7), (4, 3), (1, 130), (300, 33), (5,)]


def make(
    *shape: int, device: str = "cpu", dtype: torch.dtype = torch.float64, residual: torch.dtype | None = None,
    weight: torch.dtype | None = None,
) -> list[Tensor]:  # fmt: skip
    """x, residual, weight and bias."""
    g = torch.Generator().manual_seed(sum(shape))
    dtypes = (dtype, residual or dtype, weight or residual or dtype)
    x, r = (torch.randn(shape, generator=g, dtype=torch.float64).to(device, to) for to in dtypes[:2])
    w, b = (torch.randn(shape[-1:], generator=g, dtype=torch.float64).to(device, dtypes[2]) for _ in range(2))
    return [x, r, w, b]


def with_gradients(function: Callable[..., Tensor], inputs: list[Any], **options: Any) -> list[Tensor]:
    leaves = [x if x is None else x.detach().requires_grad_() for x in inputs]
    output = function(*leaves, **options)
    upstream = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).view(output.shape).to(output)
    return [output.detach(), *torch.autograd.grad(output, [x for x in leaves if x is not None], upstream)]


def check(inputs: list[Any], **options: Any) -> None:
    ours = with_gradients(dropout_add_layer_norm, inputs, **options)
    exact = with_gradients(eager.add_layer_norm, [None if x is None else x.double() for x in inputs], **options)
    plain = with_gradients(eager.add_layer_norm, inputs, **options)
    assert ours[0].is_contiguous()
    for what, *values in zip(("output", "x", "residual", "weight", "bias"), ours, exact, plain, strict=False):
        assert values[0].dtype == values[2].dtype
        assert_accurate(*values, what=what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_accuracy(shape: tuple[int, ...], dtype: torch.dtype, has_bias: bool, device: str) -> None:
    inputs: list[Any] = make(*shape, device=device, dtype=dtype)
    check(inputs if has_bias else [*inputs[:3], None])


@pytest.mark.parametrize("x, residual", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_dtypes_promote(x: torch.dtype, residual: torch.dtype, device: str) -> None:
    """As under autocast: what a product gives has 16 bits, all else more."""
    inputs = make(6, 40, device=device, dtype=x, residual=residual)
    output = dropout_add_layer_norm(*inputs)
    assert output.dtype == residual
    check(inputs)


def test_autocast(device: str) -> None:
    inputs = make(6, 40, device=device, dtype=torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        assert dropout_add_layer_norm(*inputs).dtype == torch.float32
    assert dropout_add_layer_norm(*inputs).dtype == torch.bfloat16


@pytest.mark.parametrize("which", range(4))
def test_gradients_of_some(which: int, device: str) -> None:
    inputs = make(70, 9, device=device, dtype=torch.float32)
    expected = with_gradients(eager.add_layer_norm, inputs)[1 + which]
    leaves = [x.requires_grad_(place == which) for place, x in enumerate(inputs)]
    output = dropout_add_layer_norm(*leaves)
    upstream = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).view(output.shape).to(output)
    torch.testing.assert_close(torch.autograd.grad(output, leaves[which], upstream)[0], expected)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "first token"])
def test_strides(layout: str, device: str) -> None:
    x, r, w, b = make(4, 6, 20, device=device, dtype=torch.float32)
    change: dict[str, Callable[[Tensor], Tensor]] = {
        "transposed": lambda t: t.transpose(0, 1),
        "expanded": lambda t: t[:1].expand(t.shape),
        "first token": lambda t: t[:, :1],
    }
    strided = [change[layout](t) for t in (x, r)]
    for found, expected in zip(
        with_gradients(dropout_add_layer_norm, [*strided, w, b]),
        with_gradients(dropout_add_layer_norm, [*(t.contiguous() for t in strided), w, b]),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, parts", [((6, 24), 1), ((6, 24), 3), ((4, 50, 33), 2), ((9, 5, 20), 9), ((0, 7), 2)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_weights_of_several_models(
    shape: tuple[int, ...], parts: int, dtype: torch.dtype, has_bias: bool, device: str
) -> None:
    """As of each with its part of the rows, in whatever order they are in memory."""
    x, r, _, _ = make(*shape, device=device, dtype=dtype)
    w, b, _, _ = make(parts, shape[-1], device=device, dtype=dtype)
    inputs: list[Any] = [x, r, w, b if has_bias else None]

    def one_by_one(x: Tensor, r: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        own = zip(x.chunk(parts), r.chunk(parts), w, [None] * parts if b is None else b, strict=True)
        return torch.cat([dropout_add_layer_norm(*each) for each in own])

    found, expected = (with_gradients(function, inputs) for function in (dropout_add_layer_norm, one_by_one))
    torch.testing.assert_close(found, expected)
    views: list[Any] = [t.T.contiguous().T if t.dim() == 2 else t.mT.contiguous().mT for t in (x, r, w)]
    views.append(b[:1].expand_as(b) if has_bias else None)
    found, expected = (
        with_gradients(dropout_add_layer_norm, [v if v is None else change(v) for v in views])
        for change in (torch.Tensor.detach, lambda v: v.contiguous())
    )
    torch.testing.assert_close(found, expected)
    if len(x):
        torch.manual_seed(1)
        of_all = dropout_add_layer_norm(x, r, torch.ones_like(w), dropout_p=0.4)
        torch.manual_seed(1)
        torch.testing.assert_close(of_all, dropout_add_layer_norm(x, r, torch.ones_like(w[0]), dropout_p=0.4))


def test_gradcheck(device: str) -> None:
    inputs = [x.requires_grad_() for x in make(3, 7, device=device)]

    def dropped(*given: Tensor) -> Tensor:
        torch.manual_seed(3)
        return dropout_add_layer_norm(*given, dropout_p=0.4)

    assert torch.autograd.gradcheck(dropout_add_layer_norm, inputs)
    assert torch.autograd.gradcheck(dropped, inputs)


# Dropout --------------------------------------------------------------------------------------------------------------


def dropped(rows: int, size: int, p: float, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """What x was multiplied by. The gradient to x is that to the residual times it."""
    x, r, w, b = make(rows, size, device=device, dtype=dtype)
    leaves = [x.requires_grad_(), r.requires_grad_()]
    of_x, of_residual = torch.autograd.grad(dropout_add_layer_norm(*leaves, w, b, dropout_p=p).square().sum(), leaves)
    return of_x / of_residual


def test_dropout_leaves_out_its_share(device: str) -> None:
    factors = dropped(200, 300, 0.3, device)
    kept = factors.abs() > 0.5
    assert abs(kept.float().mean() - 0.7) < 0.01
    torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1 / 0.7), rtol=1e-3, atol=0)
    assert not factors[~kept].any()
    for axis in (0, 1):  # in every row and column about as many
        assert (kept.float().mean(axis) - 0.7).abs().max() < 6 * math.sqrt(0.21 / kept.shape[axis])
    together = (kept[1:] == kept[:-1]).float().mean(), (kept[:, 1:] == kept[:, :-1]).float().mean()
    assert all(abs(share - 0.58) < 0.015 for share in together)  # neighbours know nothing of each other


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_dropped_is_what_gets_no_gradient(dtype: torch.dtype, device: str) -> None:
    """The output is that of x times the factors that the gradient has."""
    x, r, w, b = make(40, 50, device=device, dtype=dtype)
    torch.manual_seed(7)
    output = dropout_add_layer_norm(x, r, w, b, dropout_p=0.25)
    torch.manual_seed(7)
    leaves = [x.requires_grad_(), r.requires_grad_()]
    found = dropout_add_layer_norm(*leaves, w, b, dropout_p=0.25)
    assert torch.equal(found, output)
    of_x, of_residual = torch.autograd.grad(found.float().square().sum(), leaves)
    factors = (of_x != 0).double() / 0.75
    exact = eager.add_layer_norm(x.double() * factors, r.double(), w.double(), b.double())
    plain = eager.add_layer_norm((x.double() * factors).to(dtype), r, w, b)
    assert_accurate(output, exact, plain)
    torch.testing.assert_close(of_x.double(), of_residual.double() * factors, rtol=0.02, atol=1e-5)


def test_dropout_is_by_seed(device: str) -> None:
    inputs = make(30, 20, device=device, dtype=torch.float32)
    torch.manual_seed(5)
    first, second = (dropout_add_layer_norm(*inputs, dropout_p=0.2) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(dropout_add_layer_norm(*inputs, dropout_p=0.2), first)
    assert not torch.equal(first, second)


# What else may be given -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_no_rows(shape: tuple[int, ...], device: str) -> None:
    x, r, w, b = make(*shape, device=device, dtype=torch.float32)
    for p in (0.0, 0.5):
        leaves = [t.requires_grad_() for t in (x, r, w, b)]
        output = dropout_add_layer_norm(*leaves, dropout_p=p)
        assert output.shape == shape
        of_x, of_residual, of_weight, of_bias = torch.autograd.grad(output.sum(), leaves)
        assert of_x.shape == of_residual.shape == shape and not of_weight.any() and not of_bias.any()


def test_rows_of_one(device: str) -> None:
    x, r, w, b = (t.requires_grad_() for t in make(4, 1, device=device, dtype=torch.float32))
    output = dropout_add_layer_norm(x, r, w, b)
    torch.testing.assert_close(output, b.expand(4, 1))
    assert not any(grad.any() for grad in torch.autograd.grad(output.sum(), (x, r, w)))


def test_numbers_of_every_kind(device: str) -> None:
    """NaN and infinities stay in their row; a row of equal numbers is its bias; large numbers are as in PyTorch."""
    x, r, w, b = make(6, 33, device=device, dtype=torch.float32)
    x[0, 3], r[1, 2] = math.nan, math.inf
    x[2], r[2] = 2, 3
    x[3] *= 1e4
    expected = F.layer_norm(x + r, (33,), w, b)
    output = dropout_add_layer_norm(x, r, w, b)
    assert output[:2].isnan().all()
    torch.testing.assert_close(output[2], b)
    torch.testing.assert_close(output, expected, equal_nan=True)


def test_the_reference_agrees() -> None:
    """Where kernels serve the op, with what serves it elsewhere, but for dropout's numbers."""
    x, r, w, b = make(70, 20, dtype=torch.float32)
    ours, theirs = (
        function(x, r, w, b, None, 0.0, 1e-5)
        for function in (torch.ops.fastdistill.dropout_add_layer_norm, reference.dropout_add_layer_norm)
    )
    torch.testing.assert_close(ours, theirs)
    upstream = torch.linspace(-1, 1, x.numel()).view_as(x)
    for seed in (None, torch.tensor(3)):
        own, other = (
            function(upstream, x, r, w, *ours[1:], seed, 0.0, True)
            for function in (
                torch.ops.fastdistill.dropout_add_layer_norm_backward,
                reference.dropout_add_layer_norm_backward,
            )
        )
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize(
    "change, error, said",
    [
        ({"x": torch.zeros(())}, ValueError, r"x has shape \(\); expected \[..., D\]"),
        ({"x": torch.zeros(3, 0)}, ValueError, "x has shape .*D of at least 1"),
        ({"residual": torch.zeros(3, 5)}, ValueError, r"residual has shape \(3, 5\); expected \(3, 4\), that of x"),
        (
            {"weight": torch.zeros(5)},
            ValueError,
            r"weight has shape \(5,\); expected \(4,\), or \(N, 4\) with N that divides 3",
        ),
        ({"weight": torch.zeros(2, 4)}, ValueError, r"weight has shape \(2, 4\); .*N that divides 3 rows"),
        ({"weight": torch.zeros(0, 4)}, ValueError, r"weight has shape \(0, 4\); expected"),
        ({"weight": torch.zeros(3, 4)}, ValueError, r"bias has shape \(4,\); expected \(3, 4\), that of weight"),
        ({"bias": torch.zeros(1, 4)}, ValueError, r"bias has shape \(1, 4\); expected \(4,\)"),
        ({"bias": torch.zeros(4).double()}, TypeError, "bias has dtype torch.float64, weight torch.float32"),
        ({"weight": None}, TypeError, "weight is a NoneType"),
        ({"x": torch.zeros(3, 4).long()}, TypeError, "x has dtype torch.int64"),
        ({"residual": torch.zeros(3, 4, device="meta")}, ValueError, "residual is on meta but x is on cpu"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1"),
        ({"dropout_p": "0.1"}, TypeError, "dropout_p is '0.1'"),
        ({"eps": 0.0}, ValueError, "eps is 0.0"),
        ({"eps": math.nan}, ValueError, "eps is nan"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], said: str) -> None:
    given = {"x": torch.zeros(3, 4), "residual": torch.zeros(3, 4), "weight": torch.zeros(4), "bias": torch.zeros(4)}
    with pytest.raises(error, match=said):
        dropout_add_layer_norm(**(given | change))


def test_twice_is_refused(device: str) -> None:
    leaves = [x.requires_grad_() for x in make(3, 4, device=device)]
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(dropout_add_layer_norm(*leaves).sum(), leaves, create_graph=True)
