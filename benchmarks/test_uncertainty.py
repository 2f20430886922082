"""uncertainty and select_uncertain, against what they replace."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DEVICE, OURS, measure, sizes
from fastdistill import select_uncertain, uncertainty

LARGE = sizes(tiny=[(8, 100)], cpu=[(1024, 30522), (512, 128256)], cuda=[(65536, 1000), (65536, 32000), (8192, 128256)])
SIZES = [(32, 2), *sizes(tiny=[], cpu=[(65536, 3)], cuda=[(65536, 3)]), *LARGE]
POOLS = sizes(tiny=[(1000, 3)], cpu=[(1_000_000, 3), (4096, 30522)], cuda=[(1_000_000, 3), (4096, 30522)])
RATIOS = sizes(tiny=[0.1], cpu=[0.1, 0.5], cuda=[0.1])
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def eager(logits: Tensor) -> Tensor:
    log_p = F.log_softmax(logits, -1)
    return -(log_p.exp() * log_p).sum(-1) / math.log(logits.shape[-1])


def by_softmax(logits: Tensor) -> Tensor:
    return torch.special.entr(F.softmax(logits, -1)).sum(-1) / math.log(logits.shape[-1])


def margin(logits: Tensor) -> Tensor:
    first, second = F.softmax(logits, -1).topk(2).values.unbind(-1)
    return 1 - (first - second)


def compiled(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


SCORES: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "eager": lambda: eager,
    "eager (softmax)": lambda: by_softmax,
    "torch.compile": lambda: compiled(eager),
    OURS: lambda: uncertainty,
}
MARGINS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "eager": lambda: margin,
    "torch.compile": lambda: compiled(margin),
    OURS: lambda: lambda logits: uncertainty(logits, "margin"),
}


def make(rows: int, classes: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, classes, device=DEVICE, dtype=DTYPE)


@pytest.mark.parametrize("rows,classes", SIZES)
@pytest.mark.parametrize("implementation", SCORES)
def test_uncertainty(benchmark: Any, implementation: str, rows: int, classes: int) -> None:
    logits = make(rows, classes)
    score = SCORES[implementation]()
    measure(
        benchmark,
        lambda: score(logits),
        op="uncertainty",
        case=f"{rows}×{classes}",
        implementation=implementation,
        dtype=DTYPE,
        bytes_moved=logits.nbytes,
    )


@pytest.mark.parametrize("rows,classes", LARGE)
@pytest.mark.parametrize("implementation", SCORES)
def test_gradient(benchmark: Any, implementation: str, rows: int, classes: int) -> None:
    logits = make(rows, classes).requires_grad_()
    score = SCORES[implementation]()
    measure(
        benchmark,
        lambda: torch.autograd.grad(score(logits).mean(), logits),
        op="uncertainty and gradient",
        case=f"{rows}×{classes}",
        implementation=implementation,
        dtype=DTYPE,
        bytes_moved=3 * logits.nbytes,
    )


@pytest.mark.parametrize("rows,classes", LARGE)
@pytest.mark.parametrize("implementation", MARGINS)
def test_margin(benchmark: Any, implementation: str, rows: int, classes: int) -> None:
    logits, score = make(rows, classes), MARGINS[implementation]()
    measure(
        benchmark,
        lambda: score(logits),
        op="uncertainty, margin",
        case=f"{rows}×{classes}",
        implementation=implementation,
        dtype=DTYPE,
        bytes_moved=logits.nbytes,
    )


def top_of(score: Callable[[Tensor], Tensor]) -> Callable[[Tensor, float], Tensor]:
    return lambda logits, ratio: score(logits).topk(round(len(logits) * ratio)).indices


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("rows,classes", POOLS)
@pytest.mark.parametrize("implementation", ["eager", "torch.compile", OURS])
def test_select_uncertain(benchmark: Any, implementation: str, rows: int, classes: int, ratio: float) -> None:
    logits = make(rows, classes)
    select = select_uncertain if implementation == OURS else top_of(SCORES[implementation]())
    measure(
        benchmark,
        lambda: select(logits, ratio),
        op="select_uncertain",
        case=f"{ratio:.0%} of {rows}×{classes}",
        implementation=implementation,
        dtype=DTYPE,
        bytes_moved=logits.nbytes,
    )
