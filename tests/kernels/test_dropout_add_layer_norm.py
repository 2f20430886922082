"""The kernels of dropout_add_layer_norm against the op's definition."""

from __future__ import annotations

import pytest
import torch
from fastdistill.kernels import dropout_add_layer_norm as module
from torch import Tensor

from fastdistill.ops import reference
from tests.accuracy import assert_accurate
from tests.kernels.conftest import DEVICE
from tests.kernels.interpreter import interpreted

pytestmark = interpreted
BFLOAT16, FLOAT, DOUBLE = torch.bfloat16, torch.float32, torch.float64


def make(rows: int, size: int, x: torch.dtype, other: torch.dtype) -> list[Tensor]:
    """Upstream gradient, x, residual, weight and bias."""
    g = torch.Generator().manual_seed(rows + size)
    shapes = ((rows, size), (rows, size), (rows, size), (size,), (size,))
    given = [torch.randn(shape, generator=g, dtype=DOUBLE) for shape in shapes]
    return [t.to(DEVICE, x if place == 1 else other) for place, t in enumerate(given)]


@pytest.mark.slow
@pytest.mark.parametrize("rows, size", [(37, 24), (5, 1), (1, 130), (18, 384), (3, 2100)])
@pytest.mark.parametrize("x, other", [(FLOAT, FLOAT), (BFLOAT16, FLOAT), (BFLOAT16, BFLOAT16), (DOUBLE, DOUBLE)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_accuracy(rows: int, size: int, x: torch.dtype, other: torch.dtype, has_bias: bool) -> None:
    grad, *inputs, bias = make(rows, size, x, other)
    given = (*inputs, bias if has_bias else None, None, 0.0, 1e-5)
    exact = reference.dropout_add_layer_norm(*(t.double() if isinstance(t, Tensor) else t for t in given))
    plain, ours = reference.dropout_add_layer_norm(*given), module.dropout_add_layer_norm(*given)
    for name, *values in zip(("output", "mean", "rstd"), ours, exact, plain, strict=True):
        assert values[0].dtype == values[2].dtype
        assert_accurate(*values, what=name)
    for want_weight in (True, False):
        statistics = [t.double() for t in exact[1:]]
        expected = reference.dropout_add_layer_norm_backward(
            grad.double(), *(t.double() for t in inputs), *statistics, None, 0.0, want_weight
        )
        rest = (grad, *inputs, *plain[1:], None, 0.0, want_weight)
        found, usual = module.dropout_add_layer_norm_backward(*rest), reference.dropout_add_layer_norm_backward(*rest)
        for name, *values in zip(("x", "residual", "weight", "bias"), found, expected, usual, strict=True):
            assert values[0].shape == values[2].shape and values[0].dtype == values[2].dtype
            if name == "x" and values[0].numel():  # of float64 there is none beside that to residual
                values[1] = expected[1]
            if values[0].numel():
                assert_accurate(*values, what=name)


@pytest.mark.parametrize("rows, size", [(70, 100), (9, 2100)])
def test_dropout(rows: int, size: int) -> None:
    """Its share is left out, both ways the same, and by the seed."""
    grad, x, residual, weight, bias = make(rows, size, FLOAT, FLOAT)
    seed = torch.tensor(2**40 + 7, device=DEVICE)
    output, mean, rstd = module.dropout_add_layer_norm(x, residual, weight, bias, seed, 0.3, 1e-5)
    of_x, of_residual, _, _ = module.dropout_add_layer_norm_backward(
        grad, x, residual, weight, mean, rstd, seed, 0.3, True
    )
    kept = of_x != 0
    assert abs(float(kept.float().mean()) - 0.7) < 0.02
    assert all(0.4 < float(share) < 0.95 for share in (kept.float().mean(1).min(), kept.float().mean(1).max()))
    torch.testing.assert_close(of_x, of_residual * kept / 0.7)
    expected = reference.dropout_add_layer_norm(x * kept / 0.7, residual, weight, bias, None, 0.0, 1e-5)
    for found, one in zip((output, mean, rstd), expected, strict=True):
        torch.testing.assert_close(found, one)
    assert torch.equal(module.dropout_add_layer_norm(x, residual, weight, bias, seed, 0.3, 1e-5)[0], output)
    other = module.dropout_add_layer_norm(x, residual, weight, bias, seed + 1, 0.3, 1e-5)[0]
    assert not torch.equal(other, output)


def test_dropout_in_float64_is_in_float64() -> None:
    """By the reference: a kernel would know 1 - p in float32."""
    grad, x, residual, weight, bias = make(9, 40, DOUBLE, DOUBLE)
    given = (x, residual, weight, bias, torch.tensor(3, device=DEVICE), 0.1, 1e-5)
    found = module.dropout_add_layer_norm(*given)
    torch.testing.assert_close(found, reference.dropout_add_layer_norm(*given), rtol=1e-14, atol=1e-14)
    rest = (grad, x, residual, weight, *found[1:], *given[4:6], True)
    torch.testing.assert_close(
        module.dropout_add_layer_norm_backward(*rest),
        reference.dropout_add_layer_norm_backward(*rest),
        rtol=1e-14,
        atol=1e-14,
    )


def test_strides_and_no_rows() -> None:
    grad, x, residual, weight, bias = make(12, 40, FLOAT, FLOAT)
    first = [t.view(3, 4, 40)[:, :1] for t in (grad, x, residual)]
    given = (*first[1:], weight, bias, None, 0.0, 1e-5)
    output, mean, rstd = module.dropout_add_layer_norm(*given)
    torch.testing.assert_close((output, mean, rstd), reference.dropout_add_layer_norm(*given))
    rest = (*first, weight, mean, rstd, None, 0.0, True)
    torch.testing.assert_close(
        module.dropout_add_layer_norm_backward(*rest), reference.dropout_add_layer_norm_backward(*rest)
    )
    none = x[:0]
    assert module.dropout_add_layer_norm(none, none, weight, bias, None, 0.0, 1e-5)[0].shape == (0, 40)
    of_weight = module.dropout_add_layer_norm_backward(none, none, none, weight, mean[:0], rstd[:0], None, 0.0, True)[2]
    assert of_weight.shape == (40,) and not of_weight.any()


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_weights_of_several_models(parts: int) -> None:
    grad, x, residual, *_ = make(40, 24, FLOAT, FLOAT)
    _, weight, bias, *_ = make(parts, 24, FLOAT, FLOAT)
    given = (x, residual, weight, bias, None, 0.0, 1e-5)
    found, expected = module.dropout_add_layer_norm(*given), reference.dropout_add_layer_norm(*given)
    torch.testing.assert_close(found, expected)
    rest = (grad, x, residual, weight, *expected[1:], None, 0.0, True)
    torch.testing.assert_close(
        module.dropout_add_layer_norm_backward(*rest), reference.dropout_add_layer_norm_backward(*rest)
    )


@pytest.mark.parametrize("size, dtype", [(module.LARGEST + 1, FLOAT), (module.LARGEST // 4 + 1, DOUBLE)])
def test_longer_rows_than_a_program_has(size: int, dtype: torch.dtype) -> None:
    grad, x, residual, weight, bias = make(2, size, dtype, dtype)
    output, mean, rstd = module.dropout_add_layer_norm(x, residual, weight, bias, None, 0.0, 1e-5)
    torch.testing.assert_close(output, torch.nn.functional.layer_norm(x + residual, weight.shape, weight, bias))
    found = module.dropout_add_layer_norm_backward(grad, x, residual, weight, mean, rstd, None, 0.0, True)
    assert found[1].shape == x.shape and not found[0].numel()
