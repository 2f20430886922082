"""Steps of several optimizers at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.adamw import adamw

SHARED = "lr", "betas", "eps", "weight_decay"


@torch.no_grad()
def step_together(optimizers: Iterable[Any], gradients: Mapping[Tensor, Tensor]) -> None:
    """``step()`` of each optimizer, PyTorch's or accelerate's around it, of weights with these gradients.

    What they make of the weights is the same. Those of AdamW by its fused kernel, from their second step on, are one
    call for all weights with equal settings, where each optimizer would have one, or two, of its own.
    """
    shared: dict[tuple[Any, ...], list[tuple[Tensor, dict[str, Tensor]]]] = {}
    for given in optimizers:
        optimizer: Optimizer = getattr(given, "optimizer", given)
        if not _is_plain(optimizer, gradients):
            _step(given, gradients)
            continue
        for group in optimizer.param_groups:
            moved = shared.setdefault(tuple(group[name] for name in SHARED), [])
            moved += [(weight, optimizer.state[weight]) for weight in group["params"] if weight in gradients]
    for (lr, (beta1, beta2), eps, weight_decay), moved in shared.items():
        weights, states = [weight for weight, _ in moved], [state for _, state in moved]
        first, second, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        adamw(
            weights, [gradients[weight] for weight in weights], first, second, [], steps,
            fused=True, amsgrad=False, maximize=False,
            lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
        )  # fmt: skip


def _step(optimizer: Any, gradients: Mapping[Tensor, Tensor]) -> None:
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for weight in weights:
        weight.grad = gradients.get(weight)
    optimizer.step()
    for weight in weights:
        weight.grad = None


def _is_plain(optimizer: Optimizer, gradients: Mapping[Tensor, Tensor]) -> bool:
    """Whether it is AdamW's fused kernel that its next step runs, and nothing else."""
    if type(optimizer) is not AdamW or optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return False
    unusual = "amsgrad", "maximize", "differentiable", "capturable"
    return all(
        group["fused"]
        and not any(group[name] for name in unusual)
        and isinstance(group["lr"], float)
        and all(weight in optimizer.state or weight not in gradients for weight in group["params"])
        for group in optimizer.param_groups
    )
