"""Really smaller models: heads and neurons taken out, layer by layer as many as are not wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from fastdistill.models.architectures import Block, blocks
from fastdistill.models.budgets import Kept, flops_without, latency_without, parameters_without, within
from fastdistill.models.hooks import refuse_hooked, refuse_quantized
from fastdistill.models.narrowing import without
from fastdistill.models.scores import Scores
from fastdistill.models.sharing import refuse_shared
from fastdistill.ops.checks import check_number

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Model = TypeVar("Model", bound=PreTrainedModel)


def prune(
    model: Model,
    scores: Scores,
    sparsity: float | None = None,
    *,
    parameters: float | None = None,
    flops: float | None = None,
    latency_ms: float | None = None,
    length: int | None = None,
    batch: Mapping[str, Any] | None = None,
    round_to: int = 1,
    uniform: bool = False,
) -> Model:
    r"""A new model without the heads and neurons of the lowest scores: smaller, and equal to masking them.

    All heads of all layers are ranked together, and so are all neurons; of both the lowest
    :math:`\mathrm{round}(s \cdot \mathrm{total})` are removed (STARK, Yang et al. 2022, section 3.2); ties go
    to the first. Layers are then of different widths, and may be left without heads or neurons; such a layer
    keeps its output bias, as a mask would. Embeddings, pooler and the head stay as they are. The logits are those of
    the model with the same gates at 0, within rounding.

    **Grouped queries.** Heads are those of query. Where several have one key and value, these go when all their heads
    do; and since those that stay must have equally many, a group with fewer keeps, of the heads that were to go, as
    many as make it up to the layer's fullest. They stay with output columns of 0, as a mask would have it, and train.

    **Layers that are applied again and again** (ALBERT) have one score for all applications, and are pruned in all.

    Args:
        model: of a known architecture, with any head; also one that was pruned before.
        scores: as `fastdistill.score` finds them.
        sparsity: s, from 0 to 1: the share of the heads, and of the neurons, that are removed. Or, in its place, one of
            the following: then it is the smallest with which the new model is within the budget.
        parameters: a budget of parameters: all of the model's, with its embeddings and head, each once.
        flops: a budget of floating-point operations, two for a multiply-add, of one example of `length` tokens: those
            of the layers' linear maps and of attention's two products, without embeddings, pooler and head.
        latency_ms: a budget of milliseconds, the median of several forward passes of the `batch` where the model is. It
            is measured for about 7 models: s is found to within 1/64, and no better than this machine keeps time.
        length: with `flops`.
        batch: with `latency_ms`: the model's inputs, on its device.
        round_to: the number of neurons that a layer keeps is rounded to the nearest multiple of it.
        uniform: every layer loses the same share of its own, ranked by itself: layers of one width stay so, and
            `fastdistill.export` makes a plain model of it. Of grouped queries whole groups go, by the sum of their
            scores; where there is one group, heads of it.

    The new model is saved by its own ``save_pretrained`` and loaded by `fastdistill.from_pretrained`. All its weights
    train. Raises TypeError for what are no scores, and ValueError for an unknown architecture, for a model with shared
    layers, for scores of another model, that are NaN, for arguments out of their range, for none or several of sparsity
    and budgets, and for a budget that the model exceeds without any head and neuron.
    """
    budgets = {"parameters": parameters, "flops": flops, "latency_ms": latency_ms}
    given = {name: value for name, value in {"sparsity": sparsity, **budgets}.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"{', '.join(given) or 'nothing'} is given; expected one of sparsity, {', '.join(budgets)}")
    if (flops is None) != (length is None) or (latency_ms is None) != (batch is None):
        raise ValueError("expected length with flops, and batch with latency_ms, and neither with anything else")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise ValueError(f"length is {length!r}; expected a positive integer")
    layers = _check(model, scores)

    def kept(sparsity: float) -> Kept:
        return evenly(scores, layers, sparsity, round_to) if uniform else scores.kept(sparsity, round_to)

    if sparsity is not None:
        return without(model, *kept(sparsity))
    (name, budget), steps = next(iter(given.items())), max(sum(block.neurons for block in layers), 64)
    check_number(name, budget, above=0)
    cost: Callable[[Sequence[Tensor], Sequence[Tensor]], float] = partial(parameters_without, model)
    if length is not None:
        cost = partial(flops_without, model, length)
    elif batch is not None:
        cost, steps = partial(latency_without, model, batch), 64
    return without(model, *kept(within(name, budget, cost, kept, steps)))


def _check(model: PreTrainedModel, scores: Scores) -> list[Block]:
    """The model's layers."""
    if not isinstance(scores, Scores):
        raise TypeError(
            f"scores is a {type(scores).__name__}; expected Scores, as fastdistill.score(...).knowledgeable() has them"
        )
    refuse_quantized(model)
    refuse_shared(model)
    refuse_hooked(model)
    layers = blocks(model)
    found = [(len(heads), len(neurons)) for heads, neurons in zip(scores.heads, scores.neurons, strict=True)]
    if found != (wanted := [(block.heads, block.neurons) for block in layers]):
        raise ValueError(f"scores has (heads, neurons) {found} by layer; expected the model's, {wanted}")
    return layers


def evenly(scores: Scores, layers: Sequence[Block], sparsity: float, round_to: int) -> Kept:
    """What stays, as `Scores.kept` says it, where each layer loses the same share."""
    heads, neurons = [], []
    for block, ours, theirs in zip(layers, scores.heads, scores.neurons, strict=True):
        per_group = block.heads // block.groups if block.groups > 1 else 1
        groups = ours.reshape(-1, per_group).sum(1)
        kept, own = Scores([groups], [theirs]).kept(sparsity, round_to)
        heads.append((kept[0].unsqueeze(1) * per_group + torch.arange(per_group, device="cpu")).flatten())
        neurons.append(own[0])
    return heads, neurons
