"""The loss by autograd in plain PyTorch, in whatever dtype it is given: in float64 the answer, in the logits' own dtype
what error is ordinary."""

from __future__ import annotations

import torch
from torch import Tensor


def _divergence(target: Tensor, other: Tensor, soft_ce: bool) -> Tensor:
    log_target, log_other = target.log_softmax(-1), other.log_softmax(-1)
    weight = log_target.exp()
    value = -log_other if soft_ce else log_target - log_other
    return (weight * torch.where(weight == 0, 0, value)).sum(-1)


def kd_ce_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    divergence: str,
    scale_by_temperature: bool,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    counts = torch.ones(student.shape[:-1], dtype=torch.bool) if labels is None else (labels != ignore_index).cpu()
    counts = counts.to(student.device)
    s, t = student[counts], teacher[counts]
    rows = torch.zeros(len(s), dtype=torch.promote_types(s.dtype, t.dtype), device=s.device)
    if kd_weight != 0:
        sides = (s / temperature, t / temperature) if divergence == "reverse_kl" else (t / temperature, s / temperature)
        factor = kd_weight * temperature**2 if scale_by_temperature else kd_weight
        rows = rows + factor * _divergence(*sides, divergence == "soft_ce")
    if labels is not None:
        y = labels[counts].long()
        valid = (y >= 0) & (y < s.shape[-1])
        if ce_weight != 0:
            log_p = s.log_softmax(-1)
            ce = -log_p.gather(-1, torch.where(valid, y, 0)[:, None])[:, 0]
            if label_smoothing != 0:
                ce = (1 - label_smoothing) * ce - label_smoothing * log_p.mean(-1)
            rows = rows + ce_weight * ce
        rows = rows * torch.where(valid, 1.0, torch.nan)
    if reduction == "none":
        return torch.zeros(student.shape[:-1], dtype=rows.dtype, device=rows.device).masked_scatter(counts, rows)
    return rows.sum() / counts.sum() if reduction == "mean" else rows.sum()


def with_gradients(student: Tensor, teacher: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, student gradient, teacher gradient), the gradients of the loss or of the losses' sum."""
    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    loss = kd_ce_loss(student, teacher, *args)  # type: ignore[arg-type]
    if not loss.requires_grad:  # no row counts
        return loss, torch.zeros_like(student), torch.zeros_like(teacher)
    grads = torch.autograd.grad(loss.sum(), (student, teacher), allow_unused=True)
    pairs = zip(grads, (student, teacher), strict=True)
    return loss.detach(), *(torch.zeros_like(x) if g is None else g for g, x in pairs)
