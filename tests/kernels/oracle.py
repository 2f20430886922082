"""The loss by autograd in plain PyTorch, in whatever dtype it is given: in float64 the answer, in the logits' own dtype
what error is ordinary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _divergence(target: Tensor, other: Tensor, soft_ce: bool) -> Tensor:
    log_target, log_other = target.log_softmax(-1), other.log_softmax(-1)
    weight = log_target.exp()
    value = -log_other if soft_ce else log_target - log_other
    return (weight * torch.where(weight == 0, 0, value)).sum(-1)


def kd_ce_loss(
    student: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float, kd_weight: float, *options: Any
) -> Tensor:
    def distillation(s: Tensor, t: Tensor, labels: Tensor | None, divergence: str) -> list[tuple[float, Tensor]]:
        if kd_weight == 0:
            return [(0.0, torch.zeros(len(s), dtype=torch.promote_types(s.dtype, t.dtype), device=s.device))]
        return [(kd_weight, _divergence_of(s / temperature, t / temperature, divergence))]

    return _loss(distillation, student, teacher, labels, temperature, *options)


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    target_weight: float,
    nontarget_weight: float,
    *options: Any,
) -> Tensor:
    def distillation(s: Tensor, t: Tensor, labels: Tensor | None, divergence: str) -> list[tuple[float, Tensor]]:
        assert labels is not None
        is_target = torch.zeros_like(s, dtype=torch.bool).scatter(-1, labels[:, None], True)
        pairs, others = [], []
        for logits in (s / temperature, t / temperature):
            rest = logits[~is_target].view(len(s), -1)
            pairs.append(torch.stack([logits[is_target], rest.logsumexp(-1)], -1))
            others.append(rest)
        return [
            (target_weight, _divergence_of(*pairs, divergence)),
            (nontarget_weight, _divergence_of(*others, divergence)),
        ]

    return _loss(distillation, student, teacher, labels, temperature, *options)


def _divergence_of(s: Tensor, t: Tensor, divergence: str) -> Tensor:
    return _divergence(*((s, t) if divergence == "reverse_kl" else (t, s)), divergence == "soft_ce")


def _loss(
    distillation: Callable[..., list[tuple[float, Tensor]]],
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperature: float,
    ce_weight: float,
    divergence: str,
    scale_by_temperature: bool,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    return_terms: bool = False,
) -> Tensor:
    counts = torch.ones(student.shape[:-1], dtype=torch.bool) if labels is None else (labels != ignore_index).cpu()
    counts = counts.to(student.device)
    s, t = student[counts], teacher[counts]
    factor = temperature**2 if scale_by_temperature else 1
    y, unknown = None, torch.ones(len(s), device=s.device)
    if labels is not None:
        y = labels[counts].long()
        valid = (y >= 0) & (y < s.shape[-1])
        y, unknown = torch.where(valid, y, 0), torch.where(valid, 1.0, torch.nan)
    terms = [(weight, factor * value) for weight, value in distillation(s, t, y, divergence)]
    ce = torch.zeros_like(terms[0][1])
    if y is not None and ce_weight != 0:
        log_p = s.log_softmax(-1)
        ce = -log_p.gather(-1, y[:, None])[:, 0]
        if label_smoothing != 0:
            ce = (1 - label_smoothing) * ce - label_smoothing * log_p.mean(-1)
    terms.append((ce_weight, ce))
    values = [sum((weight * value for weight, value in terms if weight), torch.zeros_like(ce))]
    values += [value for _, value in terms] if return_terms else []
    found = []
    for rows in values:
        rows = rows * unknown
        if reduction == "none":
            whole = torch.zeros(student.shape[:-1], dtype=rows.dtype, device=rows.device)
            found.append(whole.masked_scatter(counts, rows))
        else:
            found.append(rows.sum() / counts.sum() if reduction == "mean" else rows.sum())
    return torch.stack(found) if return_terms else found[0]


def with_gradients(
    student: Tensor, teacher: Tensor, *args: Any, loss: Callable[..., Tensor] = kd_ce_loss
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, student gradient, teacher gradient), the gradients of the loss or of the losses' sum."""
    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    value = loss(student, teacher, *args)
    if not value.requires_grad:  # no row counts
        return value, torch.zeros_like(student), torch.zeros_like(teacher)
    grads = torch.autograd.grad(value.sum(), (student, teacher), allow_unused=True)
    pairs = zip(grads, (student, teacher), strict=True)
    return value.detach(), *(torch.zeros_like(x) if g is None else g for g, x in pairs)
