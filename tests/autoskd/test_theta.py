"""theta's gradient, and theta as a distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from fastdistill.autoskd.theta import (
    direct_gradient,
    random_distributions,
    renormalize,
    select_teachers,
    target_loss,
    theta_gradient,
)
from tests import tiny
from tests.searches import batches

N = 3


def soft_ce(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """In plain PyTorch, which can be differentiated twice."""
    p = torch.softmax(target / temperature, -1)
    return -(temperature**2) * (p * torch.log_softmax(logits / temperature, -1)).sum(-1).mean()


@pytest.mark.parametrize("attention, alpha, temperature", [("eager", 0.3, 1.0), ("sdpa", 0.3, 3.0), ("sdpa", 0.0, 3.0)])
@pytest.mark.parametrize("active", [[1], [0, 1, 2]], ids=["sswo", "cr"])
def test_thetas_gradient_is_that_of_the_unrolled_step(
    attention: str, alpha: float, temperature: float, active: list[int]
) -> None:
    student = tiny.bert(layers=2, attn_implementation=attention, initializer_range=0.2).double().eval()
    train, validation = batches(6, 1, active), batches(5, 2, active)
    theta = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)[active]

    def forward(weights: Any, features: Any) -> Tensor:
        return functional_call(student, dict(weights), kwargs=dict(features)).logits

    weights = {name: weight.detach() for name, weight in student.named_parameters()}
    found = theta_gradient(forward, weights, train, validation, theta, look_ahead=alpha, temperature=temperature)

    student.set_attn_implementation("eager")  # PyTorch's fused attention cannot be differentiated twice
    theta = theta.clone().requires_grad_()
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    loss = soft_ce(forward(leaves, train.features), torch.einsum("bnc,n->bc", train.team, theta), temperature)
    slope = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
    ahead = {
        name: weight if g is None else weight - alpha * g
        for (name, weight), g in zip(leaves.items(), slope, strict=True)
    }
    unrolled = soft_ce(
        forward(ahead, validation.features), torch.einsum("bnc,n->bc", validation.team, theta), temperature
    )
    (expected,) = torch.autograd.grad(unrolled, theta)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    if alpha:  # the second derivative is there to be seen
        first = theta_gradient(
            forward, weights, train, validation, theta.detach(), look_ahead=0.0, temperature=temperature
        )
        assert (first - expected).abs().max() > 1e-4


def test_the_loss_is_kd_ce_loss() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, team = torch.randn(4, 3, generator=draw), torch.randn(4, N, 3, generator=draw)
    theta = torch.tensor([0.2, 0.7, 0.1], requires_grad=True)
    loss = target_loss(logits, team, theta, 2.0)
    torch.testing.assert_close(loss, soft_ce(logits, torch.einsum("bnc,n->bc", team, theta), 2.0))
    (expected,) = torch.autograd.grad(loss, theta)
    torch.testing.assert_close(direct_gradient(logits, team, theta.detach(), 2.0), expected)


def test_selection_gives_the_weights_of_the_smallest_to_the_others() -> None:
    theta = torch.tensor([0.1, 0.4, 0.2, 0.3])
    torch.testing.assert_close(select_teachers(theta, 2), torch.tensor([0.0, 4 / 7, 0.0, 3 / 7]))
    assert torch.equal(select_teachers(theta, 0), theta)
    for drop in (-1, 4, True):
        with pytest.raises(ValueError, match="expected from 0 to 3"):
            select_teachers(theta, drop)


def test_theta_is_a_distribution_after_any_step() -> None:
    found = renormalize(torch.tensor([-0.2, 0.0, 1.5, 0.5]))
    assert found.sum() == 1
    assert found[1] == 0
    assert (found[[0, 2, 3]] > 0).all()
    assert renormalize(torch.tensor([-1.0, -2.0])).tolist() == [0.5, 0.5]
    drawn = random_distributions(500, 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.sum(1), torch.ones(500, dtype=torch.float64))
    torch.testing.assert_close(drawn.mean(0), torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=0.03)
