"""The forward pass of a 6-layer teacher with 25, 50 and 75 % of its heads and neurons masked by gates, uneven by layer:
as `fastdistill.gate` computes it, with multiplications in front of the output projections, and pruned; and a step
through gates of single examples, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastdistill
from benchmarks.encoders import batch, encoder, multiplications
from benchmarks.harness import OURS, measure, sizes
from fastdistill.models.scores import random_scores

TOKENS = sizes(tiny=[8], cpu=[16, 32, 64, 128], cuda=[128])
LIKE = sizes(tiny="MiniLM", cpu="MiniLM", cuda="BERT-base")


def mask(gates: Any, percent: int) -> None:
    kept = random_scores(encoder(like=LIKE), torch.Generator().manual_seed(0)).kept(percent / 100, 1)
    for group, own in zip((gates.heads, gates.neurons), kept, strict=True):
        group[:] = [
            torch.zeros_like(gate, requires_grad=False).index_fill_(0, units.to(gate.device), 1)
            for gate, units in zip(group, own, strict=True)
        ]


@pytest.mark.parametrize("implementation", ["pruned", "multiplications", OURS])
@pytest.mark.parametrize("percent", [25, 50, 75])
@pytest.mark.parametrize("tokens", TOKENS)
def test_masked_forward(benchmark: Any, implementation: str, tokens: int, percent: int) -> None:
    features = {name: value for name, value in batch(32, tokens).items() if name != "labels"}
    model = encoder(like=LIKE)

    @torch.inference_mode()
    def forward(model: Any) -> None:
        model(**features)

    case = {"op": "masked forward", "case": f"32x{tokens}, {percent} % masked", "implementation": implementation}
    if implementation == "pruned":
        scores = random_scores(model, torch.Generator().manual_seed(0))
        smaller = fastdistill.prune(model, scores, percent / 100).eval()
        return measure(benchmark, lambda: forward(smaller), **case)
    with fastdistill.gate(model) as gates:
        mask(gates, percent)
        if implementation == OURS:
            return measure(benchmark, lambda: forward(model), **case)
        with multiplications():
            return measure(benchmark, lambda: forward(model), **case)


@pytest.mark.parametrize("implementation", ["multiplications", OURS])
@pytest.mark.parametrize("tokens", TOKENS)
def test_gates_by_example(benchmark: Any, implementation: str, tokens: int) -> None:
    model, data = encoder(like=LIKE), batch(32, tokens)

    def step() -> None:
        gates.per_example(32)
        torch.autograd.grad(model(**data).loss, gates.tensors)

    case = {"op": "gates by example", "case": f"32x{tokens}", "implementation": implementation}
    with fastdistill.gate(model) as gates:
        if implementation == OURS:
            return measure(benchmark, step, **case)
        with multiplications():
            return measure(benchmark, step, **case)
