"""Every op in plain PyTorch: the definition, the tests' oracle, and what runs where no kernel does.

Each function has its op's schema. Gradients are written out, so that a test of them against autograd is a test of the
formulas that the kernels share.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor has it, else float32: what a loss is computed in and returned as."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _expectation(probabilities: Tensor, values: Tensor) -> Tensor:
    """Sum over classes of p * x, with 0 * x = 0 for infinite x too."""
    return torch.where(probabilities == 0, 0.0, probabilities * values).sum(-1, keepdim=True)


def _divergence(target: Tensor, other: Tensor, self_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """KL(target || other) of two rows of logits (without the target's entropy: soft cross-entropy), and its gradients
    with respect to both."""
    log_target, log_other = target.log_softmax(-1), other.log_softmax(-1)
    p_target, p_other = log_target.exp(), log_other.exp()
    difference = (log_target if self_entropy else 0) - log_other
    value = _expectation(p_target, difference)
    grad_target = torch.where(p_target == 0, 0.0, p_target * (difference - value))
    return value, grad_target, p_other - p_target


def kd_ce_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    divergence: str,
    scale_by_temperature: bool,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    student_grad: bool,
    teacher_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and, where asked for, its gradients for an upstream gradient of one (see ops/kd_ce_loss.py)."""
    dtype = accumulation_dtype(student_logits, teacher_logits)
    student, teacher = student_logits.to(dtype), teacher_logits.to(dtype)
    loss = student.new_zeros(*student.shape[:-1], 1)
    grad_student, grad_teacher = torch.zeros_like(student), torch.zeros_like(teacher)

    if kd_weight != 0:
        weight = kd_weight * temperature**2 if scale_by_temperature else kd_weight
        s, t = student / temperature, teacher / temperature
        if divergence == "reverse_kl":
            value, from_student, from_teacher = _divergence(s, t, self_entropy=True)
        else:
            value, from_teacher, from_student = _divergence(t, s, self_entropy=divergence == "forward_kl")
        loss = loss + weight * value
        grad_student = grad_student + weight / temperature * from_student
        grad_teacher = grad_teacher + weight / temperature * from_teacher

    if labels is not None:
        labels = labels.long().unsqueeze(-1)
        classes = student.shape[-1]
        ignored = labels == ignore_index
        outside = ~ignored & ((labels < 0) | (labels >= classes))
        if labels.device.type == "cpu" and outside.any():
            row = int(outside.flatten().nonzero()[0])
            raise ValueError(
                f"labels holds {labels.flatten()[row].item()} at row {row}; expected 0 <= label < {classes} "
                f"(the number of classes) or ignore_index ({ignore_index})"
            )
        if ce_weight != 0:
            log_p = student.log_softmax(-1)
            safe = labels.masked_fill(ignored | outside, 0)
            cross_entropy = -(1 - label_smoothing) * log_p.gather(-1, safe)
            if label_smoothing > 0:
                cross_entropy = cross_entropy - label_smoothing * log_p.mean(-1, keepdim=True)
            loss = loss + ce_weight * cross_entropy
            target = torch.full_like(student, label_smoothing / classes)
            target = target.scatter_add(-1, safe, torch.full_like(loss, 1 - label_smoothing))
            grad_student = grad_student + ce_weight * (log_p.exp() - target)
        loss, grad_student, grad_teacher = (
            x.masked_fill(outside, torch.nan).masked_fill(ignored, 0.0) for x in (loss, grad_student, grad_teacher)
        )

    loss = loss.squeeze(-1)
    if reduction == "mean":
        counted = (~ignored).sum() if labels is not None else torch.tensor(loss.numel(), device=loss.device)
        grad_student, grad_teacher = (g / counted.clamp(min=1) for g in (grad_student, grad_teacher))
        loss = loss.sum() / counted
    elif reduction == "sum":
        loss = loss.sum()
    none = torch.empty(0)
    return (
        loss,
        grad_student.to(student_logits.dtype) if student_grad else none.to(student_logits),
        grad_teacher.to(teacher_logits.dtype) if teacher_grad else none.to(teacher_logits),
    )


def scale_rows(grad: Tensor, upstream: Tensor) -> Tensor:
    """``grad[..., c] * upstream[...]``; ``upstream`` has the leading shape of ``grad`` or is a scalar."""
    return (grad * upstream.unsqueeze(-1)).to(grad.dtype)


def scale_rows_(grad: Tensor, upstream: Tensor) -> None:
    grad.mul_(upstream.unsqueeze(-1))


def accumulate_sensitivity_(totals: list[Tensor], grads: list[Tensor], weights: list[Tensor] | None) -> None:
    """``totals[i] += |grads[i] * weights[i]|``, or ``|grads[i]|`` without weights."""
    if not totals:
        return
    dtypes = [accumulation_dtype(*tensors) for tensors in zip(totals, grads, weights or grads, strict=True)]
    products = [grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]
    if weights is not None:
        factors = [weight.to(dtype) for weight, dtype in zip(weights, dtypes, strict=True)]
        products = list(torch._foreach_mul(products, factors))
    torch._foreach_add_(totals, torch._foreach_abs(products))


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


def uncertainty_backward(upstream: Tensor, logits: Tensor, kind: str, normalize: bool) -> Tensor:
    """The gradient to the logits for an ``upstream`` gradient of the logits' leading shape."""
    gap, exponential, held, runner_up, others, total, second = _around_the_largest(logits)
    if kind == "entropy":
        grad = exponential * ((exponential * gap).sum(-1, keepdim=True) / total - gap)
    elif kind == "least_confidence":
        grad = torch.where(held, -others, exponential) / total
    else:
        grad = exponential * (1 - second)
        grad = torch.where(held, -others - second, torch.where(runner_up, grad + second * total, grad)) / total
    scale = upstream.unsqueeze(-1) / (_at_uniform(kind, logits.shape[-1]) if normalize else 1)
    return (grad / total * scale).to(logits.dtype)


def rank(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest of all scores, NaN before any number and equals by lower index, and their indices."""
    values, indices = scores.flatten().sort(descending=True, stable=True)
    return values[:count].clone(), indices[:count].clone()
