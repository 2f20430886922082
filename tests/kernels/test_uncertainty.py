from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch
import triton
from fastdistill.kernels import uncertainty as module
from torch import Tensor

from fastdistill.ops import reference
from tests.kernels.conftest import DEVICE

interpreted = pytest.mark.skipif(
    DEVICE == "cpu" and triton.__version__ < "3.7" and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0",
    reason="the interpreter of this Triton does not run with this NumPy",
)

KINDS = ("entropy", "least_confidence", "margin")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WIDE = module.MAX_COLUMNS + 200  # more classes than are taken at a time
INF = math.inf


def make(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(DEVICE, dtype)


def check(logits: Tensor) -> None:
    """Against the reference in float64: the error is no more than twice what the reference's is in the dtype computed
    in, plus two ulp of what is returned; NaN where that has NaN."""
    computed_in = reference.accumulation_dtype(logits)
    upstream = torch.linspace(0.5, 2, max(logits[..., 0].numel(), 1), dtype=computed_in, device=DEVICE)
    upstream = upstream[: logits[..., 0].numel()].view(logits.shape[:-1])
    for kind in KINDS:
        for normalize in (True, False):
            ours = (
                module.uncertainty(logits, kind, normalize),
                module.uncertainty_backward(upstream, logits, kind, normalize),
            )
            exact, plain = (
                (
                    reference.uncertainty(x, kind, normalize),
                    reference.uncertainty_backward(upstream.to(x), x, kind, normalize),
                )
                for x in (logits.double(), logits)
            )
            assert ours[0].dtype == computed_in and ours[1].dtype == logits.dtype
            for value, answer, ordinary in zip(ours, exact, plain, strict=True):
                assert value.shape == answer.shape
                known = ~answer.isnan()
                assert torch.equal(value.isnan(), ~known), kind
                errors = (torch.linalg.vector_norm((x.double() - answer)[known]) for x in (value, ordinary))
                error, allowed = errors
                limit = 2 * allowed + 2 * torch.finfo(value.dtype).eps * torch.linalg.vector_norm(answer[known])
                assert error <= limit, f"{kind}: error {error:.3g} > {limit:.3g} (plain PyTorch: {allowed:.3g})"


@interpreted
@pytest.mark.parametrize("classes", [2, 130, WIDE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(classes: int, dtype: torch.dtype) -> None:
    check(make(5, classes, dtype=dtype))


@interpreted
@pytest.mark.parametrize("classes", [3, 7, 128, 129, 1024, 1025, 4096, 4097, 8192, 8193])
def test_every_width(classes: int) -> None:
    check(make(3, classes))


@interpreted
@pytest.mark.parametrize("rows", [1, 511, 512, 513])
def test_every_number_of_rows(rows: int) -> None:
    check(make(rows, 2))


@interpreted
@pytest.mark.parametrize("classes", [6, WIDE])
def test_any_strides(classes: int) -> None:
    logits = make(4, 3, classes + 5)
    check(logits.transpose(0, 1))
    check(logits.mT.contiguous().mT)
    check(logits[:, :2, 5:])
    check(logits[:, 1, :classes])
    check(logits[:1].expand(4, 3, -1))
    check(logits[0, 0])


@interpreted
@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    check(make(*shape))


@interpreted
@pytest.mark.parametrize("classes", [6, 130, WIDE])
@pytest.mark.parametrize(
    ("logit", "index"),
    [
        (-INF, 3),
        (-INF, slice(0, -2)),  # all of the first columns
        (-INF, slice(2, None)),
        (-INF, slice(None)),
        (INF, 0),
        (INF, -1),
        (math.nan, 0),
        (math.nan, -1),
        (math.nan, slice(None)),
        (200.0, -1),  # far above, and far below, what the row begins with
        (1e30, -1),
        (-1e30, slice(0, -2)),
        (9.0, slice(1, 4)),  # equals
        (9.0, slice(None)),
    ],
)
def test_unusual_logits(classes: int, logit: float, index: Any) -> None:
    logits = make(3, classes)
    logits[1, index] = logit
    check(logits)


@interpreted
@pytest.mark.parametrize("classes", [6, WIDE])
@pytest.mark.parametrize(
    ("dtype", "logit"),
    [
        (torch.float32, torch.finfo(torch.float32).min),
        (torch.float32, -3.1e38),
        (torch.bfloat16, torch.finfo(torch.bfloat16).min),
        (torch.float16, torch.finfo(torch.float16).min),
        (torch.float64, -1e300),
        (torch.float64, torch.finfo(torch.float64).min),
    ],
)
def test_rows_of_the_least_numbers(classes: int, dtype: torch.dtype, logit: float) -> None:
    """They are as uncertain as any row of equals, beside -inf too and wherever in the row they are."""
    logits = torch.full((4, classes), logit, dtype=dtype, device=DEVICE)
    logits[1, :-2] = logits[2, 2:] = -INF
    logits[3, -1] = 0
    check(logits)


@interpreted
@pytest.mark.parametrize("classes", [6, WIDE])
@pytest.mark.parametrize("height", [5.0, 20.0, 60.0])
def test_close_to_certainty(classes: int, height: float) -> None:
    """With nothing lost beside 1, wherever the largest is, relative to each value."""
    for place in (0, classes // 2, -1):
        logits = torch.full((1, classes), -INF, device=DEVICE)
        logits[0, 1], logits[0, place] = 0, height
        for kind in KINDS:
            value = module.uncertainty(logits, kind, False)
            exact = reference.uncertainty(logits.double(), kind, False)
            torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=0)
