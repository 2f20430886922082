"""How uncertain logits are, and the most uncertain."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistill.ops.reference.dtypes import accumulation_dtype


def _first(found: Tensor) -> Tensor:
    """The first of the last dimension's elements that are true."""
    return found & (found.cumsum(-1) == 1)


def _around_the_largest(logits: Tensor) -> tuple[Tensor, ...]:
    """The logits less the largest, their exponentials, where the largest is and where the second largest, the sum of
    all exponentials but the largest's, and of all (NaN if the largest is infinite), and the second's exponential."""
    logits = logits.to(accumulation_dtype(logits))
    largest, second = logits.topk(2, -1).values.split(1, -1)
    held = _first(logits == largest)
    runner_up = _first((logits == second) & ~held)
    gap = (logits - largest).masked_fill(held, 0).clamp_min(-1000)  # exponential 0 in float64 too, and 0 * gap = 0
    exponential = gap.exp()
    others = exponential.masked_fill(held, 0).sum(-1, keepdim=True)
    return gap, exponential, held, runner_up, others, 1 + others + (largest - largest), (second - largest).exp()


def _at_uniform(kind: str, classes: int) -> float:
    """The largest uncertainty that there is: that of equal probabilities."""
    return {"entropy": math.log(classes), "least_confidence": 1 - 1 / classes, "margin": 1.0}[kind]


def uncertainty(logits: Tensor, kind: str, normalize: bool) -> Tensor:
    """Of each row (see ops/uncertainty.py), as precise near 0 as elsewhere: nothing is subtracted from 1."""
    gap, exponential, _, _, others, total, second = _around_the_largest(logits)
    if kind == "entropy":
        value = others.log1p() - (exponential * gap).sum(-1, keepdim=True) / total
    elif kind == "least_confidence":
        value = others / total
    else:
        value = (others + second) / total
    return value.squeeze(-1) / (_at_uniform(kind, logits.shape[-1]) if normalize else 1)


def uncertainty_backward(grad_output: Tensor, logits: Tensor, kind: str, normalize: bool) -> Tensor:
    """The gradient to the logits for a ``grad_output`` of the logits' leading shape."""
    gap, exponential, held, runner_up, others, total, second = _around_the_largest(logits)
    if kind == "entropy":
        grad = exponential * ((exponential * gap).sum(-1, keepdim=True) / total - gap)
    elif kind == "least_confidence":
        grad = torch.where(held, -others, exponential) / total
    else:
        grad = exponential * (1 - second)
        grad = torch.where(held, -others - second, torch.where(runner_up, grad + second * total, grad)) / total
    scale = grad_output.unsqueeze(-1) / (_at_uniform(kind, logits.shape[-1]) if normalize else 1)
    return (grad / total * scale).to(logits.dtype).contiguous()


def rank(scores: Tensor, count: int) -> Tensor:
    """The indices of the highest of all scores, NaN before any number and equals by lower index."""
    scores = scores.flatten()
    scores = scores.masked_fill(scores.isnan(), torch.inf)  # CUDA sorts a NaN whose sign bit is set as the lowest
    return scores.sort(descending=True, stable=True).indices[:count].clone()
