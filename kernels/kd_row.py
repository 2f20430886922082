"""What the kernels of kd_ce_loss and dkd_loss share: a tile's sums, a row's loss and its gradients from them.

A tile has three axes, ``[parts, lanes, columns]``, and is summed once per lane.

Everything is computed from logits shifted by a reference and scaled to base 2,
``u = (z - reference) / temperature * log2(e)``. A divergence between p_a, the distribution that weighs, and p_b, the
other (teacher and student; exchanged for reverse KL), needs the sums of ``2**u`` and one number more, the mean gap: the
mean under p_a of ``u_a - u_b``, or of ``-u_b`` for soft cross-entropy. In units of log(2),

    D = mean gap + log2(sum 2**u_b) - log2(sum 2**u_a)     (without the last term for soft cross-entropy)
    dD/db = (p_b - p_a) / temperature                      dD/da = p_a (gap - mean gap) / temperature

dkd_loss is the same with the target's class taken out of both distributions, and put back by its log odds x, which have
a divergence of their own: APART. Of two outcomes of probabilities p = 1 / (1 + exp(-x)) and 1 - p,

    dD/dx_b = p_b - p_a                                    dD/dx_a = p_a (1 - p_a) (x_a - x_b)
    dx/dz = (one at the target, less the distribution over the others) / temperature

Any reference near the maximum is as good as the maximum.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


class Tensors(NamedTuple):
    """What a kernel reads and writes."""

    student: Any  # [rows, classes], any row stride, unit column stride
    teacher: Any  # the same; not read if SPEC.DIVERGENCE is "none"
    labels: Any  # [rows], integer; not read unless LABELLED
    counts: Any  # [count_programs], from _count_kernel; read for a mean over labelled rows, unless SINGLE
    losses: Any  # out [1 + terms, rows], or [1 + terms, programs] if reduced; its dtype is the one computed in
    student_grad: Any  # out [rows, classes], contiguous; not written unless STUDENT_GRAD
    teacher_grad: Any  # out [rows, classes], contiguous; not written unless TEACHER_GRAD


class Pair(NamedTuple):
    """What there is of both sides."""

    student: Any
    teacher: Any


class Numbers(NamedTuple):
    """What a row's loss depends on, in the dtype computed in."""

    temperature: Any
    factor: Any  # of the divergences: temperature^2, or 1
    kd_weight: Any
    target_weight: Any  # of the target's own term, if it is APART
    ce_weight: Any
    label_smoothing: Any
    scale: Any  # log2(e) / temperature


class Specialization(NamedTuple):
    """What a kernel is compiled for."""

    DIVERGENCE: str  # "forward_kl", "soft_ce", "reverse_kl" or "none"
    LABELLED: bool  # there are labels
    TASK: bool  # cross-entropy is part of the loss
    SMOOTH: bool  # and its label_smoothing is not 0
    POWER: int  # the temperature, to take exp(z) as exp(z / temperature) ** temperature; 0 not to
    APART: bool  # the target, from the classes that the divergence is of
    REDUCTION: str  # "mean", "sum" or "none"
    TERMS: bool  # after the loss the terms are wanted
    STUDENT_GRAD: bool
    TEACHER_GRAD: bool
    ALIGNMENT: int  # divides classes and both strides


SIZES = ["rows", "classes", "student_stride", "teacher_stride", "count_programs", "ignore_index"]
"""Arguments of the kernels that none is compiled anew for."""


@triton.jit
def _numbers(temperature, factor, kd_weight, target_weight, ce_weight, label_smoothing, DTYPE: tl.constexpr):
    temperature = tl.full([], temperature, DTYPE)
    return Numbers(
        temperature, tl.full([], factor, DTYPE), tl.full([], kd_weight, DTYPE), tl.full([], target_weight, DTYPE),
        tl.full([], ce_weight, DTYPE), tl.full([], label_smoothing, DTYPE), LOG2_E / temperature,
    )  # fmt: skip


# Sums over a tile -----------------------------------------------------------------------------------------------------


@triton.jit
def _lane_max(tile):
    return tl.max(tl.max(tile, 2), 0)


@triton.jit
def _lane_sum(tile):
    return tl.sum(tl.sum(tile, 2), 0)


@triton.jit
def _spread(lanes):
    """A value per lane, or one for all, made to broadcast against a tile."""
    if len(lanes.shape) == 0:
        return lanes
    else:
        return lanes[None, :, None]


@triton.jit
def _shift(logits, reference, scale, CAREFUL: tl.constexpr):
    """u of the module's docstring. The reference is a logit where CAREFUL, else a logit times scale: that saves an
    instruction, and is as exact until the product is so large that its rounding error overflows exp2."""
    if CAREFUL:
        return (logits - reference) * scale
    else:
        return tl.fma(logits, scale, -reference)


@triton.jit
def _power(x, EXPONENT: tl.constexpr):
    """x ** EXPONENT, EXPONENT >= 1, by repeated squaring."""
    if EXPONENT == 1:
        return x
    elif EXPONENT % 2 == 0:
        return _power(x * x, EXPONENT // 2)
    else:
        return x * _power(x * x, EXPONENT // 2)


@triton.jit
def _task_exp(shifted, soft_exp, temperature, SPEC: tl.constexpr):
    """The exponential at temperature 1, from soft_exp = 2**shifted, the one at temperature, where POWER allows."""
    if SPEC.POWER == 0:
        return tl.exp2(shifted * temperature)
    else:
        return _power(soft_exp, SPEC.POWER)


@triton.jit
def _gap(student_shifted, teacher_shifted, SPEC: tl.constexpr):
    if SPEC.DIVERGENCE == "forward_kl":
        return teacher_shifted - student_shifted
    elif SPEC.DIVERGENCE == "reverse_kl":
        return student_shifted - teacher_shifted
    else:
        return -student_shifted


@triton.jit
def _by_role(student, teacher, SPEC: tl.constexpr):
    """(the side that weighs, the other side); its own inverse."""
    if SPEC.DIVERGENCE == "reverse_kl":
        return student, teacher
    else:
        return teacher, student


@triton.jit
def _sums(student, teacher, inside, references, numbers, SPEC: tl.constexpr, CAREFUL: tl.constexpr):
    """Per lane: sums of the student's exponentials at temperature and at 1, of the teacher's at temperature, of the
    weighted gaps, and of the student's shifted logits. Elements not inside the row must have exponentials of 0."""
    student_shifted = _shift(student, references.student, numbers.scale, CAREFUL)
    student_exp = tl.exp2(student_shifted)
    student_sum = _lane_sum(student_exp)
    task_sum, teacher_sum, gap_sum, shifted_sum = student_sum, student_sum, student_sum, student_sum
    if SPEC.TASK and SPEC.POWER != 1:
        task_sum = _lane_sum(_task_exp(student_shifted, student_exp, numbers.temperature, SPEC))
    if SPEC.SMOOTH:
        shifted_sum = _lane_sum(tl.where(inside, student_shifted, 0.0))
    if SPEC.DIVERGENCE != "none":
        teacher_shifted = _shift(teacher, references.teacher, numbers.scale, CAREFUL)
        teacher_exp = tl.exp2(teacher_shifted)
        teacher_sum = _lane_sum(teacher_exp)
        gap = _gap(student_shifted, teacher_shifted, SPEC)
        weight, _ = _by_role(student_exp, teacher_exp, SPEC)
        if CAREFUL:
            gap = tl.where(weight == 0, 0.0, gap)  # no weight, no gap, however large
        gap_sum = _lane_sum(weight * gap)
    return student_sum, task_sum, teacher_sum, gap_sum, shifted_sum


# The target apart from the others -------------------------------------------------------------------------------------


@triton.jit
def _odds(log_odds):
    """The log odds, -log of the probability and of the other outcome's, and both probabilities: never by 1 - p. NaN for
    an infinite logit."""
    log_odds += tl.maximum(log_odds, 0.0) - tl.maximum(log_odds, 0.0)
    exp = tl.exp(-tl.abs(log_odds))
    more = 1 + exp
    tail = tl.where(more == 1, exp, tl.log(more) * (exp / (more - 1)))  # log(1 + exp), exact where exp is small
    surprise = tl.maximum(-log_odds, 0.0) + tail
    other_surprise = tl.maximum(log_odds, 0.0) + tail
    return log_odds, surprise, other_surprise, tl.exp(-surprise), tl.exp(-other_surprise)


@triton.jit
def _weighted(weight, x):
    return tl.where(weight == 0, 0.0, weight * x)


@triton.jit
def _target_divergence(sums, targets, SPEC: tl.constexpr):
    """(divergence, gradient to the student's log odds, to the teacher's), from the targets' shifted logits."""
    student_sum, _, teacher_sum, _, _ = sums
    student_odds = (targets.student - tl.log2(student_sum)) * LN_2
    teacher_odds = (targets.teacher - tl.log2(teacher_sum)) * LN_2
    odds_a, odds_b = _by_role(student_odds, teacher_odds, SPEC)
    odds_a, yes_a, no_a, p_a, q_a = _odds(odds_a)
    odds_b, yes_b, no_b, p_b, q_b = _odds(odds_b)
    to_b = tl.where(odds_a > 0, q_a - q_b, p_b - p_a)
    if SPEC.DIVERGENCE == "soft_ce":
        divergence = _weighted(p_a, yes_b) + _weighted(q_a, no_b)
        to_a = _weighted(p_a * q_a, -odds_b)
    else:
        divergence = _weighted(p_a, yes_b - yes_a) + _weighted(q_a, no_b - no_a)
        to_a = _weighted(p_a * q_a, odds_a - odds_b)
    to_student, to_teacher = _by_role(to_a, to_b, SPEC)
    return divergence, to_student, to_teacher


@triton.jit
def _without(student, teacher, position, label, PADDING: tl.constexpr, SPEC: tl.constexpr):
    """Logits of both sides, the target's replaced by PADDING if it is APART."""
    if SPEC.APART:
        student = tl.where(position == label, PADDING, student)
        teacher = tl.where(position == label, PADDING, teacher)
    return student, teacher


# Loss and gradients of a row, from its sums ---------------------------------------------------------------------------


@triton.jit
def _loss(sums, targets, classes, numbers, SPEC: tl.constexpr):
    """(loss, and without their weights the target's term, the divergence, cross-entropy), from a row's sums and the
    targets' shifted logits."""
    student_sum, task_sum, teacher_sum, gap_sum, shifted_sum = sums
    loss = tl.zeros_like(student_sum)
    target, divergence, cross_entropy = loss, loss, loss
    if SPEC.DIVERGENCE != "none":
        weigher_sum, other_sum = _by_role(student_sum, teacher_sum, SPEC)
        divergence = gap_sum / weigher_sum * LN_2
        if SPEC.DIVERGENCE == "soft_ce":
            divergence += tl.log(other_sum)
        else:
            divergence += tl.log(other_sum / weigher_sum)
        divergence *= numbers.factor
        loss += numbers.kd_weight * divergence
    if SPEC.APART:
        target = numbers.factor * _target_divergence(sums, targets, SPEC)[0]
        loss += numbers.target_weight * target
    if SPEC.TASK:
        unshift = numbers.temperature * LN_2
        log_sum = tl.log(task_sum)
        cross_entropy = log_sum - targets.student * unshift
        if SPEC.APART:
            cross_entropy = _odds(-cross_entropy)[1]
            log_sum = cross_entropy + targets.student * unshift
            shifted_sum += targets.student
        if SPEC.SMOOTH:
            uniform = log_sum - shifted_sum / classes * unshift
            cross_entropy = (1 - numbers.label_smoothing) * cross_entropy + numbers.label_smoothing * uniform
        loss += numbers.ce_weight * cross_entropy
    return loss, target, divergence, cross_entropy


@triton.jit
def _coefficients(sums, targets, share, classes, numbers, SPEC: tl.constexpr):
    """What the gradients of a row need whose loss counts share times: mean gap, factors of the student's and the
    teacher's exponentials at temperature and of the student's at 1, what to subtract at the label and at each class;
    if the target is APART, more factors of the exponentials at temperature, and the gradients at the label."""
    student_sum, task_sum, teacher_sum, gap_sum, _ = sums
    weigher_sum, _ = _by_role(student_sum, teacher_sum, SPEC)
    soft = share * numbers.kd_weight * numbers.factor / numbers.temperature
    hard = share * numbers.ce_weight
    task_factor = hard / task_sum
    at_student, at_teacher = hard, hard
    if SPEC.APART:
        _, at_student, at_teacher = _target_divergence(sums, targets, SPEC)
        at_student *= share * numbers.target_weight * numbers.factor / numbers.temperature
        at_teacher *= share * numbers.target_weight * numbers.factor / numbers.temperature
    student_target, teacher_target = -at_student / student_sum, -at_teacher / teacher_sum
    if SPEC.APART and SPEC.TASK:
        others = _odds(targets.student * numbers.temperature * LN_2 - tl.log(task_sum))[4]  # their probability
        task_factor *= others
        at_student += hard * (numbers.label_smoothing - numbers.label_smoothing / classes - others)
    return (
        _spread(gap_sum / weigher_sum),
        _spread(soft / student_sum),
        _spread(soft / teacher_sum),
        _spread(task_factor),
        _spread(hard * (1 - numbers.label_smoothing)),
        _spread(hard * numbers.label_smoothing / classes),
        _spread(student_target),
        _spread(teacher_target),
        _spread(at_student),
        _spread(at_teacher),
    )


@triton.jit
def _gradients(student, teacher, references, coefficients, numbers, SPEC: tl.constexpr, CAREFUL: tl.constexpr):
    """(student gradient, teacher gradient) of a tile, but for what is to be subtracted at the label, or to be put there
    if the target is APART."""
    mean_gap, student_factor, teacher_factor, task_factor, at_label, at_each = coefficients[:6]
    student_shifted = _shift(student, references.student, numbers.scale, CAREFUL)
    student_exp = tl.exp2(student_shifted)
    student_grad = tl.zeros_like(student)
    teacher_grad = student_grad + at_label * 0  # NaN where the label is no class
    if SPEC.DIVERGENCE != "none":
        teacher_shifted = _shift(teacher, references.teacher, numbers.scale, CAREFUL)
        teacher_exp = tl.exp2(teacher_shifted)
        gap = (_gap(student_shifted, teacher_shifted, SPEC) - mean_gap) * LN_2
        weight, other = _by_role(student_exp * student_factor, teacher_exp * teacher_factor, SPEC)
        if CAREFUL:
            gap = tl.where(weight == 0, 0.0, gap)
        student_grad, teacher_grad = _by_role(weight * gap, other - weight, SPEC)
        if SPEC.APART:
            student_grad += student_exp * coefficients[6]
            teacher_grad += teacher_exp * coefficients[7]
    if SPEC.TASK:
        student_grad += _task_exp(student_shifted, student_exp, numbers.temperature, SPEC) * task_factor
    if SPEC.SMOOTH:
        student_grad -= at_each
    return student_grad, teacher_grad


# Rows that count ------------------------------------------------------------------------------------------------------


@triton.jit
def _labels(labels_ptr, row, exists, classes, ignore_index, LABELLED: tl.constexpr):
    """(label, whether the row counts, whether the label is a class) of one row or of several."""
    label = row
    valid = exists
    if LABELLED:
        label = tl.load(labels_ptr + row, mask=exists, other=0).to(tl.int64)
        exists = exists & (label != ignore_index)
        valid = (label >= 0) & (label < classes)
    return label, exists, valid


@triton.jit
def _sum(values_ptr, count, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of count values, always in the same order."""
    offset = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], DTYPE)
    for start in range(0, count, BLOCK):
        total += tl.load(values_ptr + start + offset, mask=start + offset < count, other=0).to(DTYPE)
    return tl.sum(total, 0)


@triton.jit
def _rows_that_count(counts_ptr, count_programs, rows, LABELLED: tl.constexpr):
    if LABELLED:
        return _sum(counts_ptr, count_programs, tl.int32, 128)
    else:
        return rows
