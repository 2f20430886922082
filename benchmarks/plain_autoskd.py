"""AutoSKDBERT (SSWO) as it is written without this package: eager PyTorch, theta's gradient through
an unrolled step of the student; in the forms of `plain_stark.Form`."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import get_linear_schedule_with_warmup

from benchmarks.plain_stark import Form, accuracy, fit, loader, step, stored

THETA_RATE = 1e-3  # also how far the look-ahead goes


def inputs(batch: Any) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name not in ("labels", "said")}


@torch.no_grad()
def sample(theta: Tensor) -> int:
    return int(torch.multinomial(theta, 1))


@torch.no_grad()
def answers(team: Sequence[Any], drawn: int, batch: Any) -> Tensor:
    return batch["said"][:, drawn] if "said" in batch else team[drawn](**inputs(batch)).logits


def soft_ce(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target.softmax(-1))


def unrolled_loss(student: Any, halves: Sequence[Any], said: Sequence[Tensor], weight: Tensor) -> Tensor:
    """The validation loss after a step on the training half, as a function of the sampled teacher's weight."""
    train_half, validation_half = halves
    student.eval()
    names, weights = zip(*student.named_parameters(), strict=True)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
        slope = torch.autograd.grad(
            soft_ce(student(**inputs(train_half)).logits, weight * said[0]), weights, create_graph=True
        )
        moved = [w - THETA_RATE * g for w, g in zip(weights, slope, strict=True)]
        ahead = functional_call(student, dict(zip(names, moved, strict=True)), kwargs=inputs(validation_half)).logits
        return soft_ce(ahead, weight * said[1])


def search(
    student: Any, team: Sequence[Any], halves: Sequence[Any], epochs: int, candidates: int, drop: int, rate: float
) -> list[Tensor]:
    """The candidates: theta at so many times of the second half."""
    student = copy.deepcopy(student)
    theta = [torch.tensor(1 / len(team), requires_grad=True) for _ in team]
    optimizer = torch.optim.Adam(student.parameters(), rate, weight_decay=1e-4)
    of_theta = torch.optim.Adam(theta, THETA_RATE, weight_decay=1e-3)
    steps = epochs * len(halves[0])
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    first = -(-steps // 2)
    taken = {first + round((steps - first) * (i + 1) / candidates) for i in range(candidates)}
    found = []
    pairs = itertools.chain.from_iterable(zip(*halves, strict=True) for _ in range(epochs))
    for done, pair in enumerate(pairs, 1):
        drawn = sample(torch.stack(theta))
        said = [answers(team, drawn, batch) for batch in pair]
        (theta[drawn].grad,) = torch.autograd.grad(unrolled_loss(student, pair, said, theta[drawn]), theta[drawn])
        of_theta.step()
        of_theta.zero_grad()
        set_to(theta, normalized(torch.stack(theta).detach()))
        loss = soft_ce(student.train()(**inputs(pair[0])).logits, theta[drawn].detach() * said[0])
        step(student, loss, optimizer, schedule)
        if done == first:
            now = torch.stack(theta).detach()
            now[now.argsort()[:drop]] = 0
            set_to(theta, now / now.sum())
        if done in taken:
            found.append(torch.stack(theta).detach())
    return found


def normalized(theta: Tensor) -> Tensor:
    kept = torch.where(theta == 0, theta, theta.clamp(min=1e-12))
    return kept / kept.sum()


@torch.no_grad()
def set_to(theta: Sequence[Tensor], values: Tensor) -> None:
    for weight, value in zip(theta, values, strict=True):
        weight.copy_(value)


def autoskd(
    student: Any,
    team: Sequence[Any],
    data: Any,
    validation: Any,
    tokenizer: Any,
    form: Form,
    *,
    candidates: int,
    search_epochs: int,
    **training: Any,
) -> float:
    """The best student's accuracy."""
    team = [copy.deepcopy(teacher).requires_grad_(False).eval() for teacher in team]
    if form is Form.STORED:
        data = stored(data, tokenizer, team)
    batches, evaluated = loader(data, tokenizer, True, form), loader(validation, tokenizer, False, form)

    def trained(loss: Callable[[Tensor, Any], Tensor]) -> float:
        def of_batch(student: Any, batch: Any) -> Tensor:
            return loss(student(**inputs(batch)).logits, batch)

        return fit(student, batches, of_batch, evaluated, **training)[1]

    least = trained(lambda logits, batch: F.cross_entropy(logits, batch["labels"]))
    weaker = sum(accuracy(teacher, evaluated) < least for teacher in team)
    halves = [loader(data.shard(2, half), tokenizer, True, form) for half in range(2)]
    thetas = search(student, team, halves, search_epochs, candidates, min(weaker, len(team) - 1), training["rate"])

    def of_one(theta: Tensor) -> Callable[[Tensor, Any], Tensor]:
        return lambda logits, batch: soft_ce(logits, answers(team, sample(theta), batch))

    return max(trained(of_one(theta)) for theta in thetas)
