"""The distillation losses of logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdistill.ops.reference.dtypes import accumulation_dtype


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


class _Term(NamedTuple):
    """A term of a loss by row, ``[..., 1]``, before its weight, and its gradients."""

    weight: float
    value: Tensor
    to_student: Tensor
    to_teacher: Tensor


def _distillation(
    weight: float, student: Tensor, teacher: Tensor, temperature: float, divergence: str, scale_by_temperature: bool
) -> _Term:
    """The divergence of logits that have been divided by temperature."""
    if divergence == "reverse_kl":
        value, to_student, to_teacher = _divergence(student, teacher, self_entropy=True)
    else:
        value, to_teacher, to_student = _divergence(teacher, student, self_entropy=divergence == "forward_kl")
    factor = temperature**2 if scale_by_temperature else 1.0
    return _Term(weight, factor * value, factor / temperature * to_student, factor / temperature * to_teacher)


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
    return_terms: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and, where asked for, its terms behind it and its gradients for an upstream gradient of one (see
    ops/kd_ce_loss.py)."""
    dtype = accumulation_dtype(student_logits, teacher_logits)
    student, teacher = student_logits.to(dtype), teacher_logits.to(dtype)
    kd = _Term(0.0, student.new_zeros(*student.shape[:-1], 1), torch.zeros_like(student), torch.zeros_like(teacher))
    if kd_weight != 0:
        s, t = student / temperature, teacher / temperature
        kd = _distillation(kd_weight, s, t, temperature, divergence, scale_by_temperature)
    return _with_cross_entropy(
        [kd], student_logits, teacher_logits, labels, ce_weight, ignore_index, label_smoothing, reduction,
        student_grad, teacher_grad, return_terms,
    )  # fmt: skip


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    target_weight: float,
    nontarget_weight: float,
    ce_weight: float,
    divergence: str,
    scale_by_temperature: bool,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    student_grad: bool,
    teacher_grad: bool,
    return_terms: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As kd_ce_loss, with distillation apart for the target and for the other classes (see ops/dkd_loss.py)."""
    dtype = accumulation_dtype(student_logits, teacher_logits)
    classes = student_logits.shape[-1]
    label = torch.where((labels >= 0) & (labels < classes), labels, 0).long().unsqueeze(-1)
    is_target = torch.arange(classes, device=label.device) == label
    odds, others, moves = [], [], []
    for logits in (student_logits, teacher_logits):
        scaled = logits.to(dtype) / temperature
        without = scaled.masked_fill(is_target, -torch.inf)
        log_odds = scaled.gather(-1, label) - without.logsumexp(-1, keepdim=True)
        odds.append(torch.cat([log_odds, torch.zeros_like(log_odds)], -1))
        others.append(without)
        moves.append(is_target.to(dtype) - without.softmax(-1))  # the log odds' gradient
    options = temperature, divergence, scale_by_temperature
    weight, value, *grads = _distillation(target_weight, odds[0], odds[1], *options)
    likely = odds[0 if divergence == "reverse_kl" else 1][..., :1] > 0  # then the rest's gradient has the right digits
    to_student, to_teacher = (
        torch.where(likely, -grad[..., 1:], grad[..., :1]) * move for grad, move in zip(grads, moves, strict=True)
    )
    tckd = _Term(weight, value, to_student, to_teacher)
    nckd = _distillation(nontarget_weight, others[0], others[1], *options)
    return _with_cross_entropy(
        [tckd, nckd], student_logits, teacher_logits, labels, ce_weight, ignore_index, label_smoothing, reduction,
        student_grad, teacher_grad, return_terms,
    )  # fmt: skip


def _with_cross_entropy(
    terms: list[_Term],
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    ce_weight: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    student_grad: bool,
    teacher_grad: bool,
    return_terms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """An op's outputs: the weighted sum of terms and cross-entropy, over the rows that count."""
    student = student_logits.to(accumulation_dtype(student_logits, teacher_logits))
    ce = _Term(0.0, torch.zeros_like(terms[0].value), torch.zeros_like(student), torch.zeros_like(student))
    ignored = outside = torch.zeros_like(ce.value, dtype=torch.bool)
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
            target = torch.full_like(student, label_smoothing / classes)
            target = target.scatter_add(-1, safe, torch.full_like(cross_entropy, 1 - label_smoothing))
            ce = _Term(ce_weight, cross_entropy, log_p.exp() - target, ce.to_teacher)

    terms = [*terms, ce]
    values = [sum((term.weight * term.value for term in terms), torch.zeros_like(ce.value))]
    if return_terms:
        values += [term.value for term in terms]
    grad_student = sum((term.weight * term.to_student for term in terms), torch.zeros_like(student))
    grad_teacher = sum((term.weight * term.to_teacher for term in terms), torch.zeros_like(student))
    loss, grad_student, grad_teacher = (
        x.masked_fill(outside, torch.nan).masked_fill(ignored, 0.0)
        for x in (torch.stack(values), grad_student, grad_teacher)
    )
    loss = loss.squeeze(-1)
    if reduction == "mean":
        counted = (~ignored).sum()
        grad_student, grad_teacher = (g / counted.clamp(min=1) for g in (grad_student, grad_teacher))
        loss = loss.flatten(1).sum(1) / counted
    elif reduction == "sum":
        loss = loss.flatten(1).sum(1)
    return (
        loss if return_terms else loss[0].clone(),
        grad_student.to(student_logits.dtype).contiguous() if student_grad else student_logits.new_empty(0),
        grad_teacher.to(teacher_logits.dtype).contiguous() if teacher_grad else teacher_logits.new_empty(0),
    )
