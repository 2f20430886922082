"""The forward pass of a 6-layer teacher with 25, 50 and 75 % of its heads and neurons pruned, uneven by layer: against
the dense one, and one whose layers were made with the same widths."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn

import fastdistill
from benchmarks.encoders import batch, encoder
from benchmarks.harness import DEVICE, OURS, measure
from fastdistill.models.architectures import blocks
from fastdistill.models.scores import random_scores


@functools.cache
def pruned(percent: int) -> Any:
    scores = random_scores(encoder(), torch.Generator().manual_seed(0))
    return fastdistill.prune(encoder(), scores, percent / 100).eval()


def born(percent: int) -> Any:
    """The same widths, of linear layers that never were wider."""
    model = copy.deepcopy(encoder())
    for block, like in zip(blocks(model), blocks(pruned(percent)), strict=True):
        for name in (*block.names.head_in, block.names.head_out, *block.names.neuron_in, block.names.neuron_out):
            wanted = like.layer.get_submodule(name)
            block.replace(name, nn.Linear(wanted.in_features, wanted.out_features, device=DEVICE))
    return model


MODELS = {"dense": lambda percent: encoder(), "born with the widths": born, OURS: pruned}


@pytest.mark.parametrize("implementation", MODELS)
@pytest.mark.parametrize("percent", [25, 50, 75])
@pytest.mark.parametrize("tokens", [32, 128])
def test_pruned_forward(benchmark: Any, implementation: str, tokens: int, percent: int) -> None:
    model = MODELS[implementation](percent)
    features = {name: value for name, value in batch(32, tokens).items() if name != "labels"}

    @torch.inference_mode()
    def forward() -> None:
        model(**features)

    case = f"32x{tokens}, {percent} % pruned"
    measure(benchmark, forward, op="pruned forward", case=case, implementation=implementation)
