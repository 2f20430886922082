"""Logits of a teacher or student for many sentences, without gradients: the model's own forward pass on batches in
any order and on batches of similar length, the same compiled, and ours (the last layer for the first token alone, and
no padding where there is much) on both. Models of MiniLM's width with 1, 2 and 6 layers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from benchmarks.encoders import encoder, ragged
from benchmarks.harness import OURS, TINY, measure
from fastdistill.models.first_token import first_token_only
from fastdistill.models.packed import packed_forward

SIZE, NUMBER, TOKENS = (4, 2, 16) if TINY else (32, 4, 64)


def own(model: Any) -> Callable[..., Any]:
    return lambda batch, mask: model(**batch)


def compiled(model: Any) -> Callable[..., Any]:
    torch.compiler.reset()
    fast = torch.compile(model, dynamic=True)
    return lambda batch, mask: fast(**batch)


def ours(model: Any) -> Callable[..., Any]:
    return lambda batch, mask: packed_forward(model, batch, mask)


IMPLEMENTATIONS = {"own forward": own, "own forward, compiled": compiled, OURS: ours}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("order", ["any order", "grouped by length"])
@pytest.mark.parametrize("layers", [1, 2, 6])
@torch.inference_mode()
def test_inference(benchmark: Any, layers: int, order: str, implementation: str) -> None:
    model = encoder(layers)
    forward = IMPLEMENTATIONS[implementation](model)

    def run() -> None:
        for batch, mask in ragged(SIZE, NUMBER, TOKENS, order == "grouped by length"):
            forward(batch, mask)

    case = f"{layers} layers, {NUMBER} batches of {SIZE}, {order}"
    with first_token_only(model) if implementation == OURS else nullcontext():
        measure(benchmark, run, op="inference", case=case, implementation=implementation)
