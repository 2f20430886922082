"""What a model would cost without some of its heads and neurons, and how many may stay within a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastdistill.models.architectures import Block, applications, blocks
from fastdistill.models.narrowing import made_up, without

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kept = tuple[list[Tensor], list[Tensor]]
"""The heads and the neurons that stay, by layer, as sorted indices."""

WARM_UP, RUNS = 2, 7
"""Forward passes before those whose time counts, and those."""


def within(
    name: str,
    budget: float,
    cost: Callable[[Sequence[Tensor], Sequence[Tensor]], float],
    kept: Callable[[float], Kept],
    steps: int,
) -> float:
    """The smallest sparsity, in `steps`, whose cost is within the budget, by bisection."""
    if cost(*kept(0.0)) <= budget:
        return 0.0
    if (least := cost(*kept(1.0))) > budget:
        raise ValueError(f"{name} is {budget:g}; expected at least {least:g}, what is left without heads and neurons")
    too_much, enough = 0, steps
    while enough - too_much > 1:
        middle = (too_much + enough) // 2
        if cost(*kept(middle / steps)) <= budget:
            enough = middle
        else:
            too_much = middle
    return enough / steps


def parameters_without(model: PreTrainedModel, heads: Sequence[Tensor], neurons: Sequence[Tensor]) -> int:
    """The parameters that all of the model has where these heads and neurons stay."""
    number = model.num_parameters()
    for block, own_heads, own_neurons in zip(blocks(model), heads, neurons, strict=True):
        maps, out = _maps(block, own_heads, own_neurons), 0
        for module, gone, of in maps:
            out += gone * (module.weight.numel() // of)
        for module, gone, of in maps[:-2]:  # the last two lose columns
            out += gone * (0 if module.bias is None else module.bias.numel() // of)
        number -= out
    return number


def flops_without(model: PreTrainedModel, length: int, heads: Sequence[Tensor], neurons: Sequence[Tensor]) -> float:
    """The operations of the layers where these heads and neurons stay: see `fastdistill.prune`."""
    total = 0.0
    for block, own_heads, own_neurons in zip(blocks(model), heads, neurons, strict=True):
        for module, gone, of in _maps(block, own_heads, own_neurons):
            total += 2 * length * module.weight.numel() * (1 - gone / of)
        total += 4 * length**2 * len(made_up(own_heads, block)) * block.head_size
    return total * applications(model)


def latency_without(
    model: PreTrainedModel, batch: Mapping[str, Any], heads: Sequence[Tensor], neurons: Sequence[Tensor]
) -> float:
    return latency(without(model, heads, neurons), batch)


def latency(model: nn.Module, batch: Mapping[str, Any]) -> float:
    """The median time of a forward pass, in milliseconds."""
    device = next(model.parameters()).device
    model.eval()
    times = []
    with torch.inference_mode():
        for _ in range(WARM_UP + RUNS):
            _wait(device)
            start = time.perf_counter()
            model(**batch)
            _wait(device)
            times.append(1000 * (time.perf_counter() - start))
    return median(times[WARM_UP:])


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _maps(block: Block, heads: Tensor, neurons: Tensor) -> list[tuple[Any, int, int]]:
    """The layer's linear maps, each with how many of how many units it loses; last the two whose columns they are."""
    own = made_up(heads, block)
    heads_gone = block.heads - len(own), max(block.heads, 1)
    groups = max(block.groups, 1)
    groups_gone = groups - len((own // max(block.heads // groups, 1)).unique()), groups
    neurons_gone = block.neurons - len(neurons), max(block.neurons, 1)
    rows = [(module, *(groups_gone if is_shared else heads_gone)) for module, is_shared in block.head_rows()]
    rows += [(module, *neurons_gone) for module in block.neuron_in]
    return [*rows, (block.head_out, *heads_gone), (block.neuron_out, *neurons_gone)]
