"""How much heads and neurons matter by the weights that they consist of: DynaBERT's importance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers.pytorch_utils import Conv1D

from fastdistill.cuda_graphs import replaying
from fastdistill.models.architectures import Block, blocks
from fastdistill.models.first_token import first_token_only
from fastdistill.models.hooks import refuse_peft
from fastdistill.models.scores import Scores
from fastdistill.objectives.logits import TaskLoss
from fastdistill.processes import sum_over_processes
from fastdistill.sensitivity.units import (
    check_loader,
    check_totals,
    evaluating,
    graphs_of,
    objective_of,
    outputs_of,
    split_batch,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def importance(
    model: PreTrainedModel,
    loader: Iterable[Mapping[str, Any]],
    *,
    progress: bool = True,
    cuda_graphs: bool = False,
) -> Scores:
    r"""The first-order estimate of how the loss changes without a unit, by its weights (DynaBERT, Hou et al. 2020,
    section 2.1).

    .. math::
        I = E_B \Big| \sum_{w \in W} w\,\frac{\partial L}{\partial w} \Big|

    with W a neuron's weights, those that come in and those that go out, but no bias; of a head those of the output
    projection that it alone meets, whose sum is its output times the gradient of it. The mean is over batches, of the
    gradient of the batch's mean loss. One backward pass a batch; a sum over a unit's weights, and not of absolute
    values, it differs for neurons from `fastdistill.score`'s expressiveness by the weights that come in. The published
    code takes the absolute value of each side by itself, with the incoming bias.

    DynaBERT ranks each layer by itself: ``fastdistill.prune(model, importance(model, loader), 0.3, uniform=True)``.

    Arguments and errors as of `fastdistill.score`; in a data-parallel run processes sum what they find.
    """
    objective = objective_of(model, None, None)
    check_loader(loader)
    refuse_peft(model)
    layers = blocks(model)
    modules = [one for block in layers for one in (block.head_out, block.neuron_out, *block.neuron_in)]
    weights = [module.weight for module in modules]
    device = weights[0].device
    sizes = [size for block in layers for size in (block.heads, block.neurons)]
    totals, batches = torch.zeros(sum(sizes), device=device), torch.zeros(1, device=device)

    def passes(features: dict[str, Any], labels: Tensor) -> dict[str, Tensor]:
        with torch.enable_grad():
            loss = TaskLoss()(outputs_of(model, features, None), None, labels)
        gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
        given = dict(zip(modules, map(_products, modules, gradients), strict=True))
        totals.add_(torch.cat([_of_units(block, given) for block in layers]).abs())
        return {}

    graphs = graphs_of("importance", model, None, objective) if cuda_graphs else None
    run = replaying(passes, graphs, "importance")
    with evaluating(model, trained=weights), first_token_only(model):
        for batch in tqdm(loader, desc="importance", disable=not progress):
            features, _, labels, labelled = split_batch(batch, objective, model, None, device)
            if labelled:
                run(features, labels)
                batches += 1
    sum_over_processes(totals, batches)
    if not batches.item():
        raise ValueError("loader gave no labelled example; expected at least one")
    check_totals(totals, model, None)
    found = (totals / batches).split(sizes)
    return Scores(list(found[::2]), list(found[1::2]))


def _products(module: Any, gradient: Tensor) -> Tensor:
    """Each weight times its gradient, ``[out, in]``."""
    product: Tensor = module.weight.detach().float() * gradient.float()
    return product.T if isinstance(module, Conv1D) else product


def _of_units(block: Block, products: Mapping[Any, Tensor]) -> Tensor:
    """The sums of a layer's heads, then neurons."""
    neurons = products[block.neuron_out].sum(0)
    heads = products[block.head_out].sum(0).view(block.heads, -1).sum(1) if block.heads else neurons.new_empty(0)
    for module in block.neuron_in:
        neurons = neurons + products[module].sum(1).view(block.names.neuron_parts, -1).sum(0)
    return torch.cat([heads.to(neurons.device), neurons])
