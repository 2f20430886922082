from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastdistill
from fastdistill.models import budgets
from fastdistill.models.architectures import blocks
from fastdistill.models.budgets import flops_without, latency, parameters_without
from fastdistill.models.scores import Scores, random_scores
from tests import tiny
from tests.models.known import batch_of, model_of

KINDS = ["bert", "llama", "gpt2", "gpt_neox", "modernbert", "albert", "deberta-v2", "qwen2"]


def scored(kind: str) -> tuple[Any, Scores]:
    model = model_of(kind)
    return model, random_scores(model, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_model_within_a_number_of_parameters(kind: str, uniform: bool) -> None:
    model, scores = scored(kind)
    total = model.num_parameters()
    least = fastdistill.prune(model, scores, 1.0).num_parameters()
    budget = (total + least) // 2
    smaller = fastdistill.prune(model, scores, parameters=budget, uniform=uniform)
    assert smaller.num_parameters() <= budget
    neurons = sum(block.neurons for block in blocks(model))
    kept = round(neurons * (1 - sum(block.neurons for block in blocks(smaller)) / neurons))
    larger = fastdistill.prune(model, scores, max(kept - len(blocks(model)), 0) / neurons, uniform=uniform)
    assert larger.num_parameters() > budget
    assert fastdistill.prune(model, scores, parameters=total).num_parameters() == total
    for sparsity in (0.0, 0.3, 0.6):
        expected = fastdistill.prune(model, scores, sparsity)
        assert parameters_without(model, *scores.kept(sparsity)) == expected.num_parameters()


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_those_that_pytorch_counts(kind: str) -> None:
    model, scores = scored(kind)
    model.set_attn_implementation("eager")
    batch = {name: value[:1] for name, value in batch_of(kind).items()}
    found = []
    for sparsity in (0.0, 0.3, 0.6):
        smaller = fastdistill.prune(model, scores, sparsity).eval().requires_grad_(False)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            smaller(**batch)
        found.append(counter.get_total_flops() - flops_without(model, 9, *scores.kept(sparsity)))
    if kind == "deberta-v2":  # of which those of relative positions are not counted
        assert found[0] > found[1] > found[2] > 0
    else:
        assert found[0] == found[1] == found[2] >= 0  # embeddings, pooler and head
    budget = flops_without(model, 9, *scores.kept(0.5))
    smaller = fastdistill.prune(model, scores, flops=budget, length=9)
    everything = [torch.arange(b.heads) for b in blocks(smaller)], [torch.arange(b.neurons) for b in blocks(smaller)]
    assert 0.9 * budget < flops_without(smaller, 9, *everything) <= budget


def test_time_is_bisected(monkeypatch: pytest.MonkeyPatch) -> None:
    model, scores = scored("bert")
    measured = []

    def by_neurons(smaller: Any, batch: Any) -> float:
        assert batch is given
        measured.append(sum(block.neurons for block in blocks(smaller)))
        return 2.0 * measured[-1]

    monkeypatch.setattr(budgets, "latency", by_neurons)
    given = batch_of("bert")
    smaller = fastdistill.prune(model, scores, latency_ms=50.0, batch=given)
    assert 23 <= sum(block.neurons for block in blocks(smaller)) <= 25
    assert len(measured) == 8
    monkeypatch.setattr(budgets, "latency", lambda *_: 7.0)
    with pytest.raises(
        ValueError, match="latency_ms is 1; expected at least 7, what is left without heads and neurons"
    ):
        fastdistill.prune(model, scores, latency_ms=1.0, batch=given)


def test_time_is_the_median_of_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0] * budgets.WARM_UP + [0.0, 0.003] * (budgets.RUNS - 1) + [0.0, 5.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    model = tiny.bert().train()
    assert latency(model, {"input_ids": torch.tensor([[5, 6]])}) == pytest.approx(3.0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "nothing is given; expected one of sparsity, parameters, flops, latency_ms"),
        ({"sparsity": 0.5, "parameters": 9}, "sparsity, parameters is given; expected one of"),
        ({"flops": 9}, "expected length with flops, and batch with latency_ms"),
        ({"sparsity": 0.5, "length": 9}, "expected length with flops"),
        ({"flops": 9, "length": 0}, "length is 0; expected a positive integer"),
        ({"latency_ms": 9}, "expected length with flops, and batch with latency_ms"),
        ({"parameters": 10}, r"parameters is 10; expected at least \d+, what is left without heads and neurons"),
        ({"parameters": 0}, "parameters is 0; expected"),
        ({"parameters": float("nan")}, "parameters is nan; expected"),
    ],
)
def test_budgets_that_cannot_be(options: dict[str, Any], message: str) -> None:
    model, scores = scored("bert")
    with pytest.raises(ValueError, match=message):
        fastdistill.prune(model, scores, **options)
