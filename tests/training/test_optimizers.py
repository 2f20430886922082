from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fastdistill.training import optimizers
from fastdistill.training.optimizers import step_together

STEPS = 4


def weights(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (5,), (3, 2), (4,))]


def adamw(own: list[nn.Parameter], place: int, **settings: Any) -> torch.optim.Optimizer:
    """Of two groups, as Trainer's is; the first two have equal settings, and the third another rate."""
    groups = [{"params": own[::2]}, {"params": own[1::2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=(1e-2, 1e-2, 1e-3)[place], **{"fused": True, **settings})


def sgd(own: list[nn.Parameter], place: int) -> torch.optim.Optimizer:
    return torch.optim.SGD(own, lr=0.1, momentum=0.9)


def hooked(own: list[nn.Parameter], place: int) -> torch.optim.Optimizer:
    """With a hook that takes the gradients' halves."""
    made = adamw(own, place)

    def halve(optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = None if weight.grad is None else weight.grad / 2

    made.register_step_pre_hook(halve)
    return made


def gradients_of(own: list[nn.Parameter], step: int) -> dict[Tensor, Tensor]:
    """The last weight has none at first."""
    return {weight: torch.randn_like(weight) for weight in (own if step else own[:-1])}


@pytest.mark.parametrize(
    "make, calls",
    [
        (adamw, [0, 0, 4, 4]),  # of two rates and two decays, once each weight has a state
        (lambda own, place: adamw(own, place, amsgrad=True), [0] * STEPS),
        (lambda own, place: adamw(own, place, fused=False), [0] * STEPS),
        (lambda own, place: adamw(own, place, maximize=True), [0] * STEPS),
        (hooked, [0] * STEPS),
        (sgd, [0] * STEPS),
    ],
)
@pytest.mark.parametrize("accelerated", [False, True])
def test_steps_are_each_ones_own(make: Callable[..., Any], calls: list[int], accelerated: bool) -> None:
    own, alone = ([weights(seed) for seed in range(3)] for _ in range(2))
    together = [make(one, place) for place, one in enumerate(own)]
    apart = [make(one, place) for place, one in enumerate(alone)]
    accelerator = Accelerator(cpu=True)
    given = [accelerator.prepare_optimizer(one) for one in together] if accelerated else together
    for step in range(STEPS):
        torch.manual_seed(step)
        found = [gradients_of(one, step) for one in own]
        for one, others, optimizer in zip(found, alone, apart, strict=True):
            for weight, gradient in zip(others, one.values(), strict=False):
                weight.grad = gradient.clone()
            optimizer.step()
            optimizer.zero_grad()
        with patch.object(optimizers, "adamw", wraps=optimizers.adamw) as counted:
            step_together(given, {weight: gradient for one in found for weight, gradient in one.items()})
        assert counted.call_count == calls[step]
        torch.testing.assert_close(own, alone, rtol=0, atol=0)
        assert all(weight.grad is None for one in own for weight in one)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one.state_dict()["state"], other.state_dict()["state"], rtol=0, atol=0)
