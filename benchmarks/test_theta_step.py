"""The second-order gradient to the teachers' weights (AutoSKDBERT), through a step of a 2-layer student: exact and
closed, against the look-ahead step unrolled and differentiated by autograd, finite differences, and first order, which
leaves the step out. One sampled teacher (SSWO), or six mixed (CR). Each with the student's last layer whole and, as a
search runs it, with its first token alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.encoders import batch, encoder
from benchmarks.harness import DEVICE, OURS, measure
from fastdistill.autoskd.theta import Batch, theta_gradient
from fastdistill.models.first_token import first_token_only

BATCH, TOKENS, CLASSES = 32, 32, 2
LOOK_AHEAD = 0.1  # its size costs nothing; the second derivative is then there to be seen
TEACHERS = {"SSWO": 1, "CR": 6}

Weights = dict[str, Tensor]


@functools.cache
def weights() -> Weights:
    return {name: weight.detach() for name, weight in encoder(2, CLASSES).named_parameters()}


@functools.cache
def halves(teachers: int) -> tuple[Batch, Batch]:
    """Examples of either half, and what the teachers say."""
    features = {name: value for name, value in batch(2 * BATCH, TOKENS).items() if name != "labels"}
    team = 3 * torch.randn(2 * BATCH, teachers, CLASSES, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    cuts = (slice(BATCH), slice(BATCH, None))
    train, validation = (Batch({name: x[cut] for name, x in features.items()}, team[cut]) for cut in cuts)
    return train, validation


def forward(leaves: Any, features: Any) -> Tensor:
    logits: Tensor = functional_call(encoder(2, CLASSES), dict(leaves), kwargs=dict(features)).logits
    return logits


def loss(leaves: Weights, examples: Batch, theta: Tensor) -> Tensor:
    target = torch.einsum("bnc,n->bc", examples.team, theta).softmax(-1)
    return torch.nn.functional.cross_entropy(forward(leaves, examples.features), target)


def leaf_weights() -> Weights:
    return {name: weight.clone().requires_grad_() for name, weight in weights().items()}


def moved(start: Weights, along: Sequence[Tensor], by: float) -> Weights:
    return {name: weight + by * slope for (name, weight), slope in zip(start.items(), along, strict=True)}


def unrolled(train: Batch, validation: Batch, theta: Tensor) -> Tensor:
    theta, leaves = theta.clone().requires_grad_(), leaf_weights()
    with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
        slope = torch.autograd.grad(loss(leaves, train, theta), list(leaves.values()), create_graph=True)
        (found,) = torch.autograd.grad(loss(moved(leaves, slope, -LOOK_AHEAD), validation, theta), theta)
    return found


def finite_differences(train: Batch, validation: Batch, theta: Tensor) -> Tensor:
    """As DARTS has it (Liu et al. 2019, equation 8): two passes with the weights moved along the outer gradient."""
    theta, leaves = theta.clone().requires_grad_(), leaf_weights()
    slope = torch.autograd.grad(loss(leaves, train, theta), list(leaves.values()))
    ahead = {name: weight.detach().requires_grad_() for name, weight in moved(leaves, slope, -LOOK_AHEAD).items()}
    direct, *along = torch.autograd.grad(loss(ahead, validation, theta), [theta, *ahead.values()])
    epsilon = 0.01 / float(torch.stack([v.norm() for v in along]).norm())
    sides = []
    for by in (epsilon, -epsilon):
        with torch.no_grad():
            log_p = forward(moved(weights(), along, by), train.features).log_softmax(-1)
        target = torch.einsum("bnc,n->bc", train.team, theta).softmax(-1)
        sides += torch.autograd.grad(-(target * log_p).sum(-1).mean(), theta)
    return direct - LOOK_AHEAD * (sides[0] - sides[1]) / (2 * epsilon)


def first_order(train: Batch, validation: Batch, theta: Tensor) -> Tensor:
    return theta_gradient(forward, weights(), train, validation, theta, look_ahead=0.0)


def ours(train: Batch, validation: Batch, theta: Tensor) -> Tensor:
    return theta_gradient(forward, weights(), train, validation, theta, look_ahead=LOOK_AHEAD)


IMPLEMENTATIONS = {
    "unrolled": unrolled,
    "finite differences": finite_differences,
    "first order": first_order,
    OURS: ours,
}


@functools.cache
def check(method: str) -> None:
    """All that look ahead agree, and see what first order does not."""
    arguments = inputs(method)
    expected = unrolled(*arguments)
    torch.testing.assert_close(ours(*arguments), expected, rtol=1e-4, atol=1e-6)
    with first_token_only(encoder(2, CLASSES)):
        torch.testing.assert_close(ours(*arguments), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(finite_differences(*arguments), expected, rtol=1e-2, atol=1e-4)
    assert (first_order(*arguments) - expected).abs().max() > 1e-3


def inputs(method: str) -> tuple[Batch, Batch, Tensor]:
    teachers = TEACHERS[method]
    return *halves(teachers), torch.full((teachers,), 1 / 6, device=DEVICE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("first_token", [False, True], ids=["whole", "first token"])
@pytest.mark.parametrize("method", TEACHERS)
def test_theta_step(benchmark: Any, implementation: str, method: str, first_token: bool) -> None:
    check(method)
    run, arguments = IMPLEMENTATIONS[implementation], inputs(method)
    case = f"{method}, {BATCH}x{TOKENS}, 2 layers{', first token alone' if first_token else ''}"
    with first_token_only(encoder(2, CLASSES) if first_token else None):
        measure(benchmark, lambda: run(*arguments), op="theta's gradient", case=case, implementation=implementation)
