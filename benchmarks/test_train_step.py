"""A training step of an encoder by attn_implementation: what a model gains or loses whose attention is ours, and on a
GPU what a step gains that is replayed as a CUDA graph. And on a CPU forward and backward of a student of two layers, of
sentences of any length, by the model's own forward, the same compiled, and as recipes train."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.encoders import batch, encoder, ragged
from benchmarks.harness import DEVICE, OURS, TINY, measure, sizes
from fastdistill.cuda_graphs import AFTER, CudaGraphs
from fastdistill.models.cpu_kernels import cpu_kernels
from fastdistill.models.first_token import first_token_only
from fastdistill.models.fused_residuals import fused_residuals
from fastdistill.models.packed import packed_forward
from fastdistill.training.graphed import GraphedBackward, Told

# like, layers, tokens
CASES = sizes(tiny=[("MiniLM", 1, 8)], cpu=[("MiniLM", 6, 128)], cuda=[("BERT-base", 12, 128)])
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


GRAPHS = ", graphs"  # of either attention it is ours that captures
FUSED = ", fused residuals"
GRAPHED = [f"{OURS}{GRAPHS}", f"{OURS}, sdpa{GRAPHS}", f"{OURS}, sdpa{FUSED}{GRAPHS}"] if DEVICE == "cuda" else []


@pytest.mark.parametrize("implementation", ["sdpa", "eager", OURS, *GRAPHED])
@pytest.mark.parametrize("like,layers,tokens", CASES)
def test_train_step(benchmark: Any, implementation: str, like: str, layers: int, tokens: int) -> None:
    attention = implementation.removesuffix(GRAPHS).removesuffix(FUSED).removeprefix(f"{OURS}, ")
    model = encoder(layers, like=like, dtype=DTYPE, attention=attention).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-5, fused=True)
    features = batch(32, tokens)

    def loss_of(given: dict[str, Any]) -> Told:
        return model(**given).loss, {}, {}

    backward = None
    if implementation.endswith(GRAPHS):
        backward = GraphedBackward(loss_of, list(model.parameters()), [], CudaGraphs(torch.device(DEVICE)))

    def step() -> None:
        optimizer.zero_grad()
        if backward is None or backward(features) is None:
            loss_of(features)[0].backward()
        optimizer.step()

    case = f"{like} 32x{tokens}"
    with fused_residuals(model if FUSED in implementation else None, devices=[DEVICE]):
        for _ in range(AFTER):  # the last is captured
            step()
        measure(benchmark, step, op="train step", case=case, implementation=implementation, dtype=DTYPE)


@pytest.mark.skipif(DEVICE == "cuda", reason="padding is left out of training on the CPU")
@pytest.mark.parametrize("implementation", ["own forward", "own forward, compiled", f"{OURS}, with padding", OURS])
@pytest.mark.parametrize("order", ["any order", "grouped by length"])
def test_ragged_train_step(benchmark: Any, order: str, implementation: str) -> None:
    size, number, tokens = (4, 2, 16) if TINY else (32, 4, 64)
    model, called = encoder(2).train(), encoder(2)
    if implementation == "own forward, compiled":
        torch.compiler.reset()
        called = torch.compile(model, dynamic=True)

    def run() -> None:
        for features, _ in ragged(size, number, tokens, order == "grouped by length"):
            model.zero_grad()
            outputs = packed_forward(model, features) if implementation == OURS else called(**features)
            outputs.logits.logsumexp(-1).mean().backward()

    given = (model,) if implementation.startswith(OURS) else ()
    case = f"2 layers, {number} batches of {size}, {order}"
    with cpu_kernels(*given), first_token_only(*given):
        measure(benchmark, run, op="training without padding", case=case, implementation=implementation)
