"""theta, the distribution that AutoSKDBERT samples teachers from, and its gradient (OpenReview, "AutoSKDBERT: Learn to
Stochastically Distill BERT", section 2).

It is that of ``L_val(w - a grad_w L_train(w, theta), theta)``. theta enters through the losses' target alone, so
``dL/dtheta_i`` is closed in the student's and the teachers' logits. The mixed second derivative times a vector needs
nothing of the student but its logits' change along that vector: one pass of forward-mode differentiation or, of a
single weight, one more backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdistill.ops import kd_ce_loss

LEAST = 1e-12
"""A teacher that is not dropped keeps at least this probability."""

Weights = Mapping[str, Tensor]
Forward = Callable[[Weights, Mapping[str, Any]], Tensor]
"""A student as a function of its weights and a batch's features; gives logits ``[B, C]``."""


Reduce = Callable[[list[Tensor]], list[Tensor]]
"""Of what each process found on its part of a batch the sums over processes."""


@dataclass(frozen=True)
class Batch:
    """What the student takes, and what the teachers said, ``[B, n, C]``.

    Of a batch that processes share this is one's part: `share` is how much of it, from 0 to 1."""

    features: Mapping[str, Any]
    team: Tensor
    share: float = 1.0


def target_loss(logits: Tensor, team: Tensor, theta: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Soft cross-entropy :math:`\tau^2\,\mathrm{CE}(\mathrm{softmax}(\sum_i \theta_i z_i/\tau), p_s^\tau)`, the mean
    over the batch; logits ``[B, C]``, team ``[B, n, C]``, theta ``[n]``."""
    target = _target(team, theta)
    return kd_ce_loss(logits, target, temperature=temperature, divergence="soft_ce", ce_weight=0.0)


def direct_gradient(logits: Tensor, team: Tensor, theta: Tensor, temperature: float = 1.0) -> Tensor:
    r"""`target_loss`'s gradient to theta at fixed student logits, ``[n]``:
    :math:`\tau\,\mathrm{Cov}_{p_t}(-\log p_s^\tau,\; z_i)`, the mean over the batch."""
    log_p = torch.log_softmax(logits / temperature, -1)
    return temperature * torch.einsum("nbc,bc->n", _cross_derivative(team, theta, temperature), log_p)


def mixed_gradient(tangent: Tensor, team: Tensor, theta: Tensor, temperature: float = 1.0) -> Tensor:
    r"""The change of `direct_gradient` as the student's logits change by `tangent` ``[B, C]``:
    :math:`-\mathrm{Cov}_{p_t}(\dot z_s,\; z_i)`, ``[n]``. It depends on nothing else of the student."""
    return torch.einsum("nbc,bc->n", _cross_derivative(team, theta, temperature), tangent)


def theta_gradient(
    forward: Forward,
    weights: Weights,
    train: Batch,
    validation: Batch,
    theta: Tensor,
    *,
    look_ahead: float,
    temperature: float = 1.0,
    reduce: Reduce = list,
) -> Tensor:
    r"""The gradient to theta, ``[n]``, of :math:`L_{val}(w - \alpha \nabla_w L_{train}(w, \theta), \theta)` (equations
    5 and 7), exactly:

    .. math::
        \partial_\theta L_{val}(w', \theta) - \alpha\, \partial_\theta \langle \nabla_w L_{train}(w, \theta), v\rangle,
        \qquad v = \nabla_{w'} L_{val}(w', \theta)

    Args:
        forward: must be the same function at each call: no dropout.
        weights: w; those to look ahead with.
        train, validation: their teams are of the teachers that theta has: for "sswo" of one, for "cr" of all.
        theta: ``[n]``.
        look_ahead: alpha >= 0; with 0 (first order) one forward pass is all that it takes.
        reduce: where processes share the batches, sums over them; each then has the gradient of the whole batches.

    The second derivative needs how train's logits change along v: forward-mode differentiation, which runs attention
    as plain matrix products, for PyTorch's fused kernels do not have it. For a single weight it is taken the other way
    round, from the weight to w, by a second backward pass through the look-ahead's own graph: that costs a third less.
    """
    if not look_ahead:
        with torch.no_grad():
            logits = forward(weights, validation.features)
        (direct,) = reduce([direct_gradient(logits, validation.team, theta, temperature) * validation.share])
        return direct
    single = len(theta) == 1
    leaves, logits = _run(forward, weights, train)
    slope = reduce(_loss_gradient(logits, leaves, train, theta, temperature, retain_graph=single))
    if single:
        cross = _cross_derivative(train.team, theta, temperature)[0]
        bend = torch.autograd.grad(logits, list(leaves.values()), cross, materialize_grads=True)
    moved = torch._foreach_add([leaf.detach() for leaf in leaves.values()], slope, alpha=-look_ahead)
    ahead, logits = _run(forward, dict(zip(weights, moved, strict=True)), validation)
    along = reduce(_loss_gradient(logits, ahead, validation, theta, temperature))
    direct = direct_gradient(logits.detach(), validation.team, theta, temperature)
    if single:
        mixed = torch.stack([torch.vdot(b.flatten(), v.flatten()) for b, v in zip(bend, along, strict=True)]).sum()
    else:
        tangent = tangent_of(forward, weights, dict(zip(weights, along, strict=True)), train.features)
        mixed = mixed_gradient(tangent, train.team, theta, temperature)
    (found,) = reduce([direct * validation.share - look_ahead * mixed * train.share])
    return found


def _run(forward: Forward, weights: Weights, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """Weights to differentiate by, and the logits."""
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    with torch.enable_grad():
        return leaves, forward(leaves, batch.features)


def _loss_gradient(
    logits: Tensor, leaves: Weights, batch: Batch, theta: Tensor, temperature: float, retain_graph: bool = False
) -> list[Tensor]:
    """The loss's gradient to each weight; of a batch that is shared, this part's."""
    with torch.enable_grad():
        loss = target_loss(logits, batch.team, theta, temperature) * batch.share
    inputs = list(leaves.values())
    return list(torch.autograd.grad(loss, inputs, retain_graph=retain_graph, materialize_grads=True))


def tangent_of(forward: Forward, weights: Weights, along: Weights, features: Mapping[str, Any]) -> Tensor:
    """How the logits change as the weights move along a direction."""
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        dual = {name: forward_ad.make_dual(weight.detach(), along[name]) for name, weight in weights.items()}
        logits = forward(dual, features)
        tangent = forward_ad.unpack_dual(logits).tangent
        return torch.zeros_like(logits) if tangent is None else tangent


def _target(team: Tensor, theta: Tensor) -> Tensor:
    return torch.einsum("bnc,n->bc", team, theta.to(team.dtype))


def _cross_derivative(team: Tensor, theta: Tensor, temperature: float) -> Tensor:
    r"""Of `target_loss` to each weight and to the student's logits, ``[n, B, C]``:
    :math:`-p_t \circ (z_i - E_{p_t} z_i) / B`. It depends on nothing of the student."""
    p = torch.softmax(_target(team, theta) / temperature, -1)
    z = team.transpose(0, 1).to(p.dtype)
    return -p * (z - (p * z).sum(-1, keepdim=True)) / len(team)


# As a distribution


def renormalize(theta: Tensor) -> Tensor:
    """theta after a step as a distribution again: at least `LEAST`, where it is not exactly 0 (a dropped teacher), and
    divided by its sum, as teacher selection is (equation 8 with p = 1). The paper does not say how."""
    kept = torch.where(theta == 0, theta, theta.clamp(min=LEAST))
    return kept / kept.sum()


def select_teachers(theta: Tensor, drop: int) -> Tensor:
    """Teacher selection (equation 8): the `drop` smallest become 0, the others are divided by their sum.

    Of equally likely ones the first are dropped. Raises ValueError unless 0 <= drop < n."""
    if isinstance(drop, bool) or not isinstance(drop, int) or not 0 <= drop < len(theta):
        raise ValueError(f"drop is {drop!r}; expected from 0 to {len(theta) - 1}, one less than the teachers")
    kept = theta.clone()
    kept[theta.argsort(stable=True)[:drop]] = 0
    return kept / kept.sum().clamp(min=LEAST)


def random_distributions(number: int, teachers: int, generator: torch.Generator) -> Tensor:
    """Uniform on the simplex: ``[number, teachers]``, float64."""
    drawn = torch.empty(number, teachers, dtype=torch.float64).exponential_(generator=generator)
    return drawn / drawn.sum(1, keepdim=True)
