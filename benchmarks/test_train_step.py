"""A training step of an encoder by attn_implementation: what a model gains or loses whose attention is ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.encoders import batch, encoder
from benchmarks.harness import DEVICE, OURS, measure, sizes

# like, layers, tokens
CASES = sizes(tiny=[("MiniLM", 1, 8)], cpu=[("MiniLM", 6, 128)], cuda=[("BERT-base", 12, 128)])
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


@pytest.mark.parametrize("implementation", ["sdpa", "eager", OURS])
@pytest.mark.parametrize("like,layers,tokens", CASES)
def test_train_step(benchmark: Any, implementation: str, like: str, layers: int, tokens: int) -> None:
    model = encoder(layers, like=like, dtype=DTYPE, attention=implementation).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-5, fused=True)
    features = batch(32, tokens)

    def step() -> None:
        optimizer.zero_grad()
        model(**features).loss.backward()
        optimizer.step()

    case = f"{like} 32x{tokens}"
    measure(benchmark, step, op="train step", case=case, implementation=implementation, dtype=DTYPE)
