"""Distillation plus task loss over logits, with its gradients, in Triton.

A tile has three axes, ``[parts, lanes, columns]``, and is summed once per lane. In the tile kernel a lane is a row, and
the program's rows stay in registers: one read, one write. In the sweep kernel (large vocabularies) all lanes share one
row: each sums its own part of block after block without talking to the others, and a second sweep writes the gradient,
last block first, because what was read last is still in cache.

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

Any reference near the maximum is as good as the maximum. A sweep therefore takes the maximum of the row's first block,
and leaves out what only unusual logits need. Where the sums show that a row was unusual (an infinity, a NaN, a maximum
far above the first block's or too large to scale first and shift after), that row is swept again, carefully.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from fastdistill.kernels.common import _cast, _multiple
from torch import Tensor

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))

TILE_SIZE = 1024  # elements in a tile of 4 warps
TILE_COLUMNS = 4096  # the most classes that a tile holds; more are swept
LONG_ROW = 65536  # from this many classes on, one row in flight per multiprocessor: two would not fit in L2
COUNT_BLOCK = 4096  # labels that a program counts
REDUCE_BLOCK = 4096  # losses added up at a time
MAX_POWER = 16  # the largest temperature for which exp(z) is taken as a power of exp(z / temperature)

SIZES = ["rows", "classes", "student_stride", "teacher_stride", "count_programs", "ignore_index"]


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
def _task_exp(shifted, soft_exp, temperature, POWER: tl.constexpr):
    """The exponential at temperature 1, from soft_exp = 2**shifted, the one at temperature, where POWER allows."""
    if POWER == 0:
        return tl.exp2(shifted * temperature)
    else:
        return _power(soft_exp, POWER)


@triton.jit
def _gap(student_shifted, teacher_shifted, DIVERGENCE: tl.constexpr):
    if DIVERGENCE == "forward_kl":
        return teacher_shifted - student_shifted
    elif DIVERGENCE == "reverse_kl":
        return student_shifted - teacher_shifted
    else:
        return -student_shifted


@triton.jit
def _by_role(student, teacher, DIVERGENCE: tl.constexpr):
    """(the side that weighs, the other side); its own inverse."""
    if DIVERGENCE == "reverse_kl":
        return student, teacher
    else:
        return teacher, student


@triton.jit
def _sums(student, teacher, inside, student_reference, teacher_reference, scale, temperature,
          DIVERGENCE: tl.constexpr, TASK: tl.constexpr, SMOOTH: tl.constexpr, POWER: tl.constexpr,
          CAREFUL: tl.constexpr):  # fmt: skip
    """Per lane: sums of the student's exponentials at temperature and at 1, of the teacher's at temperature, of the
    weighted gaps, and of the student's shifted logits. Elements not inside the row must have exponentials of 0."""
    student_shifted = _shift(student, student_reference, scale, CAREFUL)
    student_exp = tl.exp2(student_shifted)
    student_sum = _lane_sum(student_exp)
    task_sum, teacher_sum, gap_sum, shifted_sum = student_sum, student_sum, student_sum, student_sum
    if TASK and POWER != 1:
        task_sum = _lane_sum(_task_exp(student_shifted, student_exp, temperature, POWER))
    if SMOOTH:
        shifted_sum = _lane_sum(tl.where(inside, student_shifted, 0.0))
    if DIVERGENCE != "none":
        teacher_shifted = _shift(teacher, teacher_reference, scale, CAREFUL)
        teacher_exp = tl.exp2(teacher_shifted)
        teacher_sum = _lane_sum(teacher_exp)
        gap = _gap(student_shifted, teacher_shifted, DIVERGENCE)
        weight, _ = _by_role(student_exp, teacher_exp, DIVERGENCE)
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
def _target_divergence(sums, student_target, teacher_target, DIVERGENCE: tl.constexpr):
    """(divergence, gradient to the student's log odds, to the teacher's), from the targets' shifted logits."""
    student_sum, _, teacher_sum, _, _ = sums
    student_odds = (student_target - tl.log2(student_sum)) * LN_2
    teacher_odds = (teacher_target - tl.log2(teacher_sum)) * LN_2
    odds_a, odds_b = _by_role(student_odds, teacher_odds, DIVERGENCE)
    odds_a, yes_a, no_a, p_a, q_a = _odds(odds_a)
    odds_b, yes_b, no_b, p_b, q_b = _odds(odds_b)
    to_b = tl.where(odds_a > 0, q_a - q_b, p_b - p_a)
    if DIVERGENCE == "soft_ce":
        divergence = _weighted(p_a, yes_b) + _weighted(q_a, no_b)
        to_a = _weighted(p_a * q_a, -odds_b)
    else:
        divergence = _weighted(p_a, yes_b - yes_a) + _weighted(q_a, no_b - no_a)
        to_a = _weighted(p_a * q_a, odds_a - odds_b)
    to_student, to_teacher = _by_role(to_a, to_b, DIVERGENCE)
    return divergence, to_student, to_teacher


@triton.jit
def _without(student, teacher, position, label, APART: tl.constexpr, PADDING: tl.constexpr):
    """Logits of both sides, the target's replaced by PADDING if it is APART."""
    if APART:
        student = tl.where(position == label, PADDING, student)
        teacher = tl.where(position == label, PADDING, teacher)
    return student, teacher


# Loss and gradients of a row, from its sums ---------------------------------------------------------------------------


@triton.jit
def _loss(sums, label_shifted, teacher_label_shifted, classes, temperature, factor, kd_weight, target_weight, ce_weight,
          label_smoothing, DIVERGENCE: tl.constexpr, TASK: tl.constexpr, SMOOTH: tl.constexpr,
          APART: tl.constexpr):  # fmt: skip
    """(loss, and without their weights the target's term, the divergence, cross-entropy)."""
    student_sum, task_sum, teacher_sum, gap_sum, shifted_sum = sums
    loss = tl.zeros_like(student_sum)
    target, divergence, cross_entropy = loss, loss, loss
    if DIVERGENCE != "none":
        weigher_sum, other_sum = _by_role(student_sum, teacher_sum, DIVERGENCE)
        divergence = gap_sum / weigher_sum * LN_2
        if DIVERGENCE == "soft_ce":
            divergence += tl.log(other_sum)
        else:
            divergence += tl.log(other_sum / weigher_sum)
        divergence *= factor
        loss += kd_weight * divergence
    if APART:
        target = factor * _target_divergence(sums, label_shifted, teacher_label_shifted, DIVERGENCE)[0]
        loss += target_weight * target
    if TASK:
        unshift = temperature * LN_2
        log_sum = tl.log(task_sum)
        cross_entropy = log_sum - label_shifted * unshift
        if APART:
            cross_entropy = _odds(-cross_entropy)[1]
            log_sum = cross_entropy + label_shifted * unshift
            shifted_sum += label_shifted
        if SMOOTH:
            uniform = log_sum - shifted_sum / classes * unshift
            cross_entropy = (1 - label_smoothing) * cross_entropy + label_smoothing * uniform
        loss += ce_weight * cross_entropy
    return loss, target, divergence, cross_entropy


@triton.jit
def _coefficients(sums, label_shifted, teacher_label_shifted, share, classes, temperature, factor, kd_weight,
                  target_weight, ce_weight, label_smoothing, DIVERGENCE: tl.constexpr, TASK: tl.constexpr,
                  APART: tl.constexpr):  # fmt: skip
    """What the gradients of a row need whose loss counts share times: mean gap, factors of the student's and the
    teacher's exponentials at temperature and of the student's at 1, what to subtract at the label and at each class;
    if the target is APART, more factors of the exponentials at temperature, and the gradients at the label."""
    student_sum, task_sum, teacher_sum, gap_sum, _ = sums
    weigher_sum, _ = _by_role(student_sum, teacher_sum, DIVERGENCE)
    soft, hard = share * kd_weight * factor / temperature, share * ce_weight
    task_factor = hard / task_sum
    at_student, at_teacher = hard, hard
    if APART:
        _, at_student, at_teacher = _target_divergence(sums, label_shifted, teacher_label_shifted, DIVERGENCE)
        at_student *= share * target_weight * factor / temperature
        at_teacher *= share * target_weight * factor / temperature
    student_target, teacher_target = -at_student / student_sum, -at_teacher / teacher_sum
    if APART and TASK:
        others = _odds(label_shifted * temperature * LN_2 - tl.log(task_sum))[4]  # their probability
        task_factor *= others
        at_student += hard * (label_smoothing - label_smoothing / classes - others)
    return (
        _spread(gap_sum / weigher_sum),
        _spread(soft / student_sum),
        _spread(soft / teacher_sum),
        _spread(task_factor),
        _spread(hard * (1 - label_smoothing)),
        _spread(hard * label_smoothing / classes),
        _spread(student_target),
        _spread(teacher_target),
        _spread(at_student),
        _spread(at_teacher),
    )


@triton.jit
def _gradients(student, teacher, student_reference, teacher_reference, coefficients, scale, temperature,
               DIVERGENCE: tl.constexpr, TASK: tl.constexpr, SMOOTH: tl.constexpr, POWER: tl.constexpr,
               APART: tl.constexpr, CAREFUL: tl.constexpr):  # fmt: skip
    """(student gradient, teacher gradient) of a tile, but for what is to be subtracted at the label, or to be put there
    if the target is APART."""
    mean_gap, student_factor, teacher_factor, task_factor, at_label, at_each = coefficients[:6]
    student_shifted = _shift(student, student_reference, scale, CAREFUL)
    student_exp = tl.exp2(student_shifted)
    student_grad = tl.zeros_like(student)
    teacher_grad = student_grad + at_label * 0  # NaN where the label is no class
    if DIVERGENCE != "none":
        teacher_shifted = _shift(teacher, teacher_reference, scale, CAREFUL)
        teacher_exp = tl.exp2(teacher_shifted)
        gap = (_gap(student_shifted, teacher_shifted, DIVERGENCE) - mean_gap) * LN_2
        weight, other = _by_role(student_exp * student_factor, teacher_exp * teacher_factor, DIVERGENCE)
        if CAREFUL:
            gap = tl.where(weight == 0, 0.0, gap)
        student_grad, teacher_grad = _by_role(weight * gap, other - weight, DIVERGENCE)
        if APART:
            student_grad += student_exp * coefficients[6]
            teacher_grad += teacher_exp * coefficients[7]
    if TASK:
        student_grad += _task_exp(student_shifted, student_exp, temperature, POWER) * task_factor
    if SMOOTH:
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


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _count_kernel(
    labels_ptr,  # [rows], integer
    counts_ptr,  # out [programs], int32: how many of a program's labels are not ignore_index
    rows,
    ignore_index,
    BLOCK: tl.constexpr,  # labels a program
):
    program = tl.program_id(0)
    row = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _, counts, _ = _labels(labels_ptr, row, row < rows, 0, ignore_index, True)
    tl.store(counts_ptr + program, tl.sum(counts.to(tl.int32), 0))


@triton.jit(do_not_specialize=["losses", "rows", "count_programs"])
def _reduce_kernel(
    losses_ptr,  # [programs, losses], of a row or of a program's rows each; of the loss, and if wanted of its terms
    counts_ptr,  # [count_programs], from _count_kernel; read if LABELLED and MEAN
    loss_ptr,  # out [programs]
    losses,
    rows,
    count_programs,
    LABELLED: tl.constexpr,  # there are labels
    MEAN: tl.constexpr,  # divide by the number of rows that count
    BLOCK: tl.constexpr,  # losses at a time
):
    plane = tl.program_id(0)
    loss = _sum(losses_ptr + plane * losses, losses, loss_ptr.dtype.element_ty, BLOCK)
    if MEAN:
        loss /= _rows_that_count(counts_ptr, count_programs, rows, LABELLED)
    tl.store(loss_ptr + plane, loss)


# The two forms --------------------------------------------------------------------------------------------------------


@triton.jit
def _store_losses(losses_ptr, losses, row, rows, exists, counts, valid, divisor, REDUCTION: tl.constexpr,
                  SINGLE: tl.constexpr):  # fmt: skip
    """Losses of a program's rows, or their sum; returns where the next term's go."""
    losses = tl.where(counts, tl.where(valid, losses, float("nan")), 0.0)
    if REDUCTION == "none":
        tl.store(losses_ptr + row, losses, mask=exists)
        return losses_ptr + rows
    elif SINGLE:
        tl.store(losses_ptr, tl.sum(losses) / divisor)
        return losses_ptr + 1
    else:
        tl.store(losses_ptr + tl.program_id(0), tl.sum(losses))
        return losses_ptr + tl.num_programs(0)


@triton.jit(do_not_specialize=SIZES)
def _tile_kernel(
    student_ptr,  # [rows, classes], any row stride, unit column stride
    teacher_ptr,  # the same; not read if DIVERGENCE is "none"
    labels_ptr,  # [rows], integer; not read unless LABELLED
    counts_ptr,  # [count_programs], from _count_kernel; read for a mean over labelled rows, unless SINGLE
    losses_ptr,  # out [1 + terms, rows], or [1 + terms, programs] if reduced; its dtype is the one computed in
    student_grad_ptr,  # out [rows, classes], contiguous; not written unless STUDENT_GRAD
    teacher_grad_ptr,  # out [rows, classes], contiguous; not written unless TEACHER_GRAD
    rows,
    classes,
    student_stride,  # elements from a row to the next
    teacher_stride,
    count_programs,
    ignore_index,
    temperature: tl.float64,
    factor: tl.float64,  # of the divergences: temperature^2, or 1
    kd_weight: tl.float64,
    target_weight: tl.float64,  # of the target's own term, if it is APART
    ce_weight: tl.float64,
    label_smoothing: tl.float64,
    DIVERGENCE: tl.constexpr,  # "forward_kl", "soft_ce", "reverse_kl" or "none"
    LABELLED: tl.constexpr,  # there are labels
    TASK: tl.constexpr,  # cross-entropy is part of the loss
    SMOOTH: tl.constexpr,  # and its label_smoothing is not 0
    POWER: tl.constexpr,  # the temperature, to take exp(z) as exp(z / temperature) ** temperature; 0 not to
    APART: tl.constexpr,  # the target, from the classes that the divergence is of
    REDUCTION: tl.constexpr,  # "mean", "sum" or "none"
    TERMS: tl.constexpr,  # after the loss the terms are wanted
    STUDENT_GRAD: tl.constexpr,
    TEACHER_GRAD: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # divides classes and both strides
    SINGLE: tl.constexpr,  # there is only this program, and the loss it writes is the final one
    ROWS: tl.constexpr,  # rows a program
    COLUMNS: tl.constexpr,  # not fewer than classes
):
    DTYPE: tl.constexpr = losses_ptr.dtype.element_ty
    temperature, factor = tl.full([], temperature, DTYPE), tl.full([], factor, DTYPE)
    kd_weight, target_weight = tl.full([], kd_weight, DTYPE), tl.full([], target_weight, DTYPE)
    ce_weight, label_smoothing = tl.full([], ce_weight, DTYPE), tl.full([], label_smoothing, DTYPE)
    scale = LOG2_E / temperature
    classes = _multiple(classes, ALIGNMENT)

    program = tl.program_id(0)
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, None, :]
    exists = row < rows
    inside = _spread(exists) & (column < classes)
    label, counts, valid = _labels(labels_ptr, row, exists, classes, ignore_index, LABELLED)

    student_row = student_ptr + row * _multiple(student_stride, ALIGNMENT)
    student = tl.load(_spread(student_row) + column, mask=inside, other=-float("inf")).to(DTYPE)
    teacher, teacher_row = student, student_row
    if DIVERGENCE != "none":
        teacher_row = teacher_ptr + row * _multiple(teacher_stride, ALIGNMENT)
        teacher = tl.load(_spread(teacher_row) + column, mask=inside, other=-float("inf")).to(DTYPE)
    student, teacher = _without(student, teacher, column, _spread(label), APART, -float("inf"))
    student_max, teacher_max = _lane_max(student), _lane_max(teacher)
    label_shifted, teacher_label_shifted = student_max, student_max
    if TASK or APART:
        label_logit = tl.load(student_row + label, mask=counts & valid, other=0).to(DTYPE)
        label_shifted = _shift(label_logit, student_max, scale, True)
    if APART:
        label_logit = tl.load(teacher_row + label, mask=counts & valid, other=0).to(DTYPE)
        teacher_label_shifted = _shift(label_logit, teacher_max, scale, True)

    summed = inside
    if APART:
        summed = inside & (column != _spread(label))
    sums = _sums(
        student, teacher, summed, _spread(student_max), _spread(teacher_max), scale, temperature,
        DIVERGENCE, TASK, SMOOTH, POWER, True,
    )  # fmt: skip
    loss, target, divergence, cross_entropy = _loss(
        sums, label_shifted, teacher_label_shifted, classes, temperature, factor, kd_weight, target_weight, ce_weight,
        label_smoothing, DIVERGENCE, TASK, SMOOTH, APART,
    )  # fmt: skip
    divisor = tl.full([], 1, DTYPE)
    if REDUCTION == "mean" and SINGLE:
        divisor = tl.sum(counts.to(DTYPE))
    elif REDUCTION == "mean":
        divisor = _rows_that_count(counts_ptr, count_programs, rows, LABELLED).to(DTYPE)
    losses_ptr = _store_losses(losses_ptr, loss, row, rows, exists, counts, valid, divisor, REDUCTION, SINGLE)
    if TERMS:
        if APART:
            losses_ptr = _store_losses(losses_ptr, target, row, rows, exists, counts, valid, divisor, REDUCTION, SINGLE)
        losses_ptr = _store_losses(losses_ptr, divergence, row, rows, exists, counts, valid, divisor, REDUCTION, SINGLE)
        _store_losses(losses_ptr, cross_entropy, row, rows, exists, counts, valid, divisor, REDUCTION, SINGLE)

    if STUDENT_GRAD or TEACHER_GRAD:
        share = tl.where(valid, 1 / divisor, float("nan"))
        coefficients = _coefficients(
            sums, label_shifted, teacher_label_shifted, share, classes, temperature, factor, kd_weight, target_weight,
            ce_weight, label_smoothing, DIVERGENCE, TASK, APART,
        )  # fmt: skip
        student_grad, teacher_grad = _gradients(
            student, teacher, _spread(student_max), _spread(teacher_max), coefficients, scale, temperature,
            DIVERGENCE, TASK, SMOOTH, POWER, APART, True,
        )  # fmt: skip
        start = _spread(row * classes)
        if STUDENT_GRAD:
            if APART:
                student_grad = tl.where(column == _spread(label), coefficients[8], student_grad)
            elif TASK:
                student_grad -= tl.where(column == _spread(label), coefficients[4], 0.0)
            student_grad = tl.where(_spread(counts), student_grad, 0.0)
            tl.store(student_grad_ptr + start + column, _cast(student_grad, student_grad_ptr), mask=inside)
        if TEACHER_GRAD:
            if APART:
                teacher_grad = tl.where(column == _spread(label), coefficients[9], teacher_grad)
            teacher_grad = tl.where(_spread(counts), teacher_grad, 0.0)
            tl.store(teacher_grad_ptr + start + column, _cast(teacher_grad, teacher_grad_ptr), mask=inside)


@triton.jit
def _load(student_ptr, teacher_ptr, position, inside, whole, PADDING: tl.constexpr, DTYPE: tl.constexpr,
          DIVERGENCE: tl.constexpr, EVICT: tl.constexpr):  # fmt: skip
    """A block of both logits, with PADDING where it is not inside the row; in wide loads, unmasked, if whole."""
    if DIVERGENCE == "none":
        teacher_ptr = student_ptr
    if whole:
        student = tl.load(student_ptr + position, eviction_policy=EVICT)
        teacher = tl.load(teacher_ptr + position, eviction_policy=EVICT)
    else:
        student = tl.load(student_ptr + position, mask=inside, other=PADDING, eviction_policy=EVICT)
        teacher = tl.load(teacher_ptr + position, mask=inside, other=PADDING, eviction_policy=EVICT)
    return student.to(DTYPE), teacher.to(DTYPE)


@triton.jit
def _store(row_ptr, position, block, inside, whole):
    """Nothing here reads it again: it must not displace logits that are still to be read."""
    block = _cast(block, row_ptr)
    if whole:
        tl.store(row_ptr + position, block, eviction_policy="evict_first")
    else:
        tl.store(row_ptr + position, block, mask=inside, eviction_policy="evict_first")


@triton.jit
def _offset(PARTS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Positions of a tile's elements in a block: neighbouring lanes hold neighbouring vectors of WIDTH elements."""
    return (
        tl.arange(0, PARTS)[:, None, None] * (LANES * WIDTH)
        + tl.arange(0, LANES)[None, :, None] * WIDTH
        + tl.arange(0, WIDTH)[None, None, :]
    )


@triton.jit
def _block(index, offset, begin, end, SIZE: tl.constexpr):
    """(positions, which are inside the row, whether all are) of a block of a row that lies in [begin, end)."""
    start = index * SIZE
    position = start + offset
    return position, (position >= begin) & (position < end), (start >= begin) & (start + SIZE <= end)


@triton.jit
def _sweep_max(student_ptr, teacher_ptr, offset, begin, end, label, blocks, DTYPE: tl.constexpr, SIZE: tl.constexpr,
               DIVERGENCE: tl.constexpr, APART: tl.constexpr):  # fmt: skip
    """The largest logits of the row's first blocks; NaN may go unnoticed."""
    student_max = tl.full([], -float("inf"), DTYPE)
    teacher_max = student_max
    for index in range(blocks):
        position, inside, whole = _block(index, offset, begin, end, SIZE)
        student, teacher = _load(
            student_ptr, teacher_ptr, position, inside, whole, -float("inf"), DTYPE, DIVERGENCE, ""
        )
        student, teacher = _without(student, teacher, position, label, APART, -float("inf"))
        student_max = tl.maximum(student_max, tl.max(student))
        teacher_max = tl.maximum(teacher_max, tl.max(teacher))
    return student_max, teacher_max


@triton.jit
def _sweep_sums(student_ptr, teacher_ptr, offset, begin, end, label, student_reference, teacher_reference, scale,
                temperature, DTYPE: tl.constexpr, SIZE: tl.constexpr, DIVERGENCE: tl.constexpr, TASK: tl.constexpr,
                SMOOTH: tl.constexpr, POWER: tl.constexpr, PADDING: tl.constexpr, APART: tl.constexpr,
                CAREFUL: tl.constexpr):  # fmt: skip
    """_sums of a row."""
    zero = tl.zeros([offset.shape[1]], DTYPE)
    student_sum, task_sum, teacher_sum, gap_sum, shifted_sum = zero, zero, zero, zero, zero
    for index in range(tl.cdiv(end, SIZE)):
        position, inside, whole = _block(index, offset, begin, end, SIZE)
        student, teacher = _load(student_ptr, teacher_ptr, position, inside, whole, PADDING, DTYPE, DIVERGENCE, "")
        student, teacher = _without(student, teacher, position, label, APART, PADDING)
        if APART:
            inside = inside & (position != label)
        sums = _sums(
            student, teacher, inside, student_reference, teacher_reference, scale, temperature,
            DIVERGENCE, TASK, SMOOTH, POWER, CAREFUL,
        )  # fmt: skip
        student_sum += sums[0]
        task_sum += sums[1]
        teacher_sum += sums[2]
        gap_sum += sums[3]
        shifted_sum += sums[4]
    return tl.sum(student_sum), tl.sum(task_sum), tl.sum(teacher_sum), tl.sum(gap_sum), tl.sum(shifted_sum)


@triton.jit
def _sweep_gradients(student_ptr, teacher_ptr, student_grad_ptr, teacher_grad_ptr, offset, begin, end, label, valid,
                     student_reference, teacher_reference, coefficients, scale, temperature, DTYPE: tl.constexpr,
                     SIZE: tl.constexpr, DIVERGENCE: tl.constexpr, TASK: tl.constexpr, SMOOTH: tl.constexpr,
                     POWER: tl.constexpr, APART: tl.constexpr, STUDENT_GRAD: tl.constexpr,
                     TEACHER_GRAD: tl.constexpr, CAREFUL: tl.constexpr):  # fmt: skip
    """Writes the gradients of a row, last block first."""
    blocks = tl.cdiv(end, SIZE)
    for step in range(blocks):
        position, inside, whole = _block(blocks - 1 - step, offset, begin, end, SIZE)
        student, teacher = _load(
            student_ptr, teacher_ptr, position, inside, whole, 0.0, DTYPE, DIVERGENCE, "evict_first"
        )
        student_grad, teacher_grad = _gradients(
            student, teacher, student_reference, teacher_reference, coefficients, scale, temperature,
            DIVERGENCE, TASK, SMOOTH, POWER, APART, CAREFUL,
        )  # fmt: skip
        if STUDENT_GRAD:
            _store(student_grad_ptr, position, student_grad, inside, whole)
        if TEACHER_GRAD:
            _store(teacher_grad_ptr, position, teacher_grad, inside, whole)
    if APART:
        tl.debug_barrier()  # after the block that it is in
        if STUDENT_GRAD:
            tl.store(student_grad_ptr + label, _cast(coefficients[8], student_grad_ptr), mask=valid)
        if TEACHER_GRAD:
            tl.store(teacher_grad_ptr + label, _cast(coefficients[9], teacher_grad_ptr), mask=valid)
    elif TASK and STUDENT_GRAD:  # the label's element once more: cheaper than to look for it in every block
        student = tl.load(student_ptr + label, mask=valid, other=0).to(DTYPE)
        teacher = student
        if DIVERGENCE != "none":
            teacher = tl.load(teacher_ptr + label, mask=valid, other=0).to(DTYPE)
        student_grad, _ = _gradients(
            student, teacher, student_reference, teacher_reference, coefficients, scale, temperature,
            DIVERGENCE, TASK, SMOOTH, POWER, APART, CAREFUL,
        )  # fmt: skip
        tl.debug_barrier()
        tl.store(student_grad_ptr + label, _cast(student_grad - coefficients[4], student_grad_ptr), mask=valid)


@triton.jit(do_not_specialize=SIZES)
def _sweep_kernel(
    student_ptr,  # as in _tile_kernel, down to ALIGNMENT; a program has one row, so losses_ptr is [1 + terms, rows]
    teacher_ptr,
    labels_ptr,
    counts_ptr,
    losses_ptr,
    student_grad_ptr,
    teacher_grad_ptr,
    rows,
    classes,
    student_stride,
    teacher_stride,
    count_programs,
    ignore_index,
    temperature: tl.float64,
    factor: tl.float64,
    kd_weight: tl.float64,
    target_weight: tl.float64,
    ce_weight: tl.float64,
    label_smoothing: tl.float64,
    DIVERGENCE: tl.constexpr,
    LABELLED: tl.constexpr,
    TASK: tl.constexpr,
    SMOOTH: tl.constexpr,
    POWER: tl.constexpr,
    APART: tl.constexpr,
    REDUCTION: tl.constexpr,
    TERMS: tl.constexpr,
    STUDENT_GRAD: tl.constexpr,
    TEACHER_GRAD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PACKED: tl.constexpr,  # both strides are classes: where rows are not aligned, blocks are, and begin before the row
    PARTS: tl.constexpr,  # vectors of a lane in a block
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,  # elements of a vector: 16 bytes of the narrower logits
):
    DTYPE: tl.constexpr = losses_ptr.dtype.element_ty
    SIZE: tl.constexpr = PARTS * LANES * WIDTH
    NARROW: tl.constexpr = LANES * WIDTH
    FP16: tl.constexpr = student_ptr.dtype.element_ty == tl.float16 or teacher_ptr.dtype.element_ty == tl.float16
    PADDING: tl.constexpr = -65504.0 if FP16 else -1e30  # finite, for no gap between paddings to be inf - inf
    temperature, factor = tl.full([], temperature, DTYPE), tl.full([], factor, DTYPE)
    kd_weight, target_weight = tl.full([], kd_weight, DTYPE), tl.full([], target_weight, DTYPE)
    ce_weight, label_smoothing = tl.full([], ce_weight, DTYPE), tl.full([], label_smoothing, DTYPE)
    scale = LOG2_E / temperature
    classes = _multiple(classes, ALIGNMENT)
    row = tl.program_id(0).to(tl.int64)
    label, counts, valid = _labels(labels_ptr, row, row < rows, classes, ignore_index, LABELLED)

    grad_start = row * classes
    student_start = row * _multiple(student_stride, ALIGNMENT)
    teacher_start = row * _multiple(teacher_stride, ALIGNMENT)
    begin = 0
    if PACKED and ALIGNMENT < WIDTH:
        begin = (grad_start % WIDTH).to(tl.int32)
        grad_start = grad_start // WIDTH * WIDTH
        student_start, teacher_start = grad_start, grad_start
    student_ptr += student_start
    teacher_ptr += teacher_start
    student_grad_ptr += grad_start
    teacher_grad_ptr += grad_start
    end = begin + classes
    label = begin + label.to(tl.int32)
    offset = _offset(PARTS, LANES, WIDTH)
    narrow = _offset(1, LANES, WIDTH)  # for the careful sweeps, which need more registers

    if counts:
        label_logit, teacher_label_logit = tl.zeros([], DTYPE), tl.zeros([], DTYPE)
        if TASK or APART:
            label_logit = tl.load(student_ptr + label, mask=valid, other=0).to(DTYPE)
        if APART:
            teacher_label_logit = tl.load(teacher_ptr + label, mask=valid, other=0).to(DTYPE)
        student_max, teacher_max = _sweep_max(
            student_ptr, teacher_ptr, offset, begin, end, label, 1, DTYPE, SIZE, DIVERGENCE, APART
        )
        student_reference, teacher_reference = student_max * scale, teacher_max * scale
        label_shifted = _shift(label_logit, student_reference, scale, False)
        teacher_label_shifted = _shift(teacher_label_logit, teacher_reference, scale, False)
        student_sum, task_sum, teacher_sum, gap_sum, shifted_sum = _sweep_sums(
            student_ptr, teacher_ptr, offset, begin, end, label, student_reference, teacher_reference, scale,
            temperature, DTYPE, SIZE, DIVERGENCE, TASK, SMOOTH, POWER, PADDING, APART, False,
        )  # fmt: skip
        total = student_sum + task_sum + teacher_sum + tl.abs(gap_sum)
        padding = PADDING * scale - tl.minimum(student_reference, teacher_reference)
        plain = (
            (total < 2**60)  # nor is one over it too small
            & (tl.abs(student_reference) + tl.abs(teacher_reference) < 2**24)
            & (tl.maximum(padding, padding * temperature) < -200)
        )
        if not plain:
            student_reference, teacher_reference = _sweep_max(
                student_ptr, teacher_ptr, narrow, begin, end, label, tl.cdiv(end, NARROW), DTYPE, NARROW, DIVERGENCE,
                APART,
            )  # fmt: skip
            label_shifted = _shift(label_logit, student_reference, scale, True)
            teacher_label_shifted = _shift(teacher_label_logit, teacher_reference, scale, True)
            student_sum, task_sum, teacher_sum, gap_sum, shifted_sum = _sweep_sums(
                student_ptr, teacher_ptr, narrow, begin, end, label, student_reference, teacher_reference, scale,
                temperature, DTYPE, NARROW, DIVERGENCE, TASK, SMOOTH, POWER, -float("inf"), APART, True,
            )  # fmt: skip
        sums = (student_sum, task_sum, teacher_sum, gap_sum, shifted_sum)
        loss, target, divergence, cross_entropy = _loss(
            sums, label_shifted, teacher_label_shifted, classes, temperature, factor, kd_weight, target_weight,
            ce_weight, label_smoothing, DIVERGENCE, TASK, SMOOTH, APART,
        )  # fmt: skip
        tl.store(losses_ptr + row, tl.where(valid, loss, float("nan")))
        if TERMS:
            if APART:
                losses_ptr += rows
                tl.store(losses_ptr + row, tl.where(valid, target, float("nan")))
            tl.store(losses_ptr + rows + row, tl.where(valid, divergence, float("nan")))
            tl.store(losses_ptr + 2 * rows + row, tl.where(valid, cross_entropy, float("nan")))

        if STUDENT_GRAD or TEACHER_GRAD:
            divisor = tl.full([], 1, DTYPE)
            if REDUCTION == "mean":
                divisor = _rows_that_count(counts_ptr, count_programs, rows, LABELLED).to(DTYPE)
            share = tl.where(valid, 1 / divisor, float("nan"))
            coefficients = _coefficients(
                sums, label_shifted, teacher_label_shifted, share, classes, temperature, factor, kd_weight,
                target_weight, ce_weight, label_smoothing, DIVERGENCE, TASK, APART,
            )  # fmt: skip
            if plain:
                _sweep_gradients(
                    student_ptr, teacher_ptr, student_grad_ptr, teacher_grad_ptr, offset, begin, end, label, valid,
                    student_reference, teacher_reference, coefficients, scale, temperature, DTYPE, SIZE,
                    DIVERGENCE, TASK, SMOOTH, POWER, APART, STUDENT_GRAD, TEACHER_GRAD, False,
                )  # fmt: skip
            else:
                _sweep_gradients(
                    student_ptr, teacher_ptr, student_grad_ptr, teacher_grad_ptr, narrow, begin, end, label, valid,
                    student_reference, teacher_reference, coefficients, scale, temperature, DTYPE, NARROW,
                    DIVERGENCE, TASK, SMOOTH, POWER, APART, STUDENT_GRAD, TEACHER_GRAD, True,
                )  # fmt: skip
    else:
        for plane in tl.static_range(3 + APART if TERMS else 1):
            tl.store(losses_ptr + plane * rows + row, 0.0)
        zero = tl.zeros([PARTS, LANES, WIDTH], DTYPE)
        for index in range(tl.cdiv(end, SIZE)):
            position, inside, whole = _block(index, offset, begin, end, SIZE)
            if STUDENT_GRAD:
                _store(student_grad_ptr, position, zero, inside, whole)
            if TEACHER_GRAD:
                _store(teacher_grad_ptr, position, zero, inside, whole)


# Rows times their upstream gradient -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "classes", "grad_output_stride"])
def _scale_kernel(
    grad_ptr,  # [rows, classes], contiguous
    grad_output_ptr,  # [rows]
    out_ptr,  # out [rows, classes], contiguous; may be grad_ptr
    rows,
    classes,
    grad_output_stride,  # elements from a row's upstream gradient to the next; 0 if all rows share one
    DTYPE: tl.constexpr,  # what to multiply in
    IN_PLACE: tl.constexpr,  # out_ptr is grad_ptr: nothing to do where grad_output is 1
    ALIGNMENT: tl.constexpr,  # divides classes
    ROWS: tl.constexpr,  # rows a program
    COLUMNS: tl.constexpr,  # columns at a time
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    grad_output = tl.load(grad_output_ptr + row * grad_output_stride, mask=row < rows, other=1).to(DTYPE)
    others = tl.sum((grad_output != 1).to(tl.int32))
    if IN_PLACE and others == 0:
        return
    classes = _multiple(classes, ALIGNMENT)
    for start in range(0, classes, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = (row < rows) & (column < classes)
        grad = tl.load(grad_ptr + row * classes + column, mask=inside).to(DTYPE)
        tl.store(out_ptr + row * classes + column, _cast(grad * grad_output, out_ptr), mask=inside)


# Launchers ------------------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """(x or a contiguous copy of it, elements from a row to the next): without a copy where rows are evenly spaced."""
    classes = x.shape[-1]
    if x.is_contiguous():
        return x, classes
    try:
        rows = x.view(-1, classes)
    except RuntimeError:  # not one stride for all leading dimensions
        return x.contiguous(), classes
    if classes > 1 and rows.stride(1) != 1:
        return x.contiguous(), classes
    return rows, rows.stride(0)


def kd_ce_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """What computes the op of the same name: (loss, student gradient, teacher gradient), the gradients for an upstream
    gradient of one, and empty unless asked for."""
    return _launch(student_logits, teacher_logits, labels, temperature, None, kd_weight, ce_weight, *options)


def dkd_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, ...]:
    """The same for the op of this name."""
    return _launch(student_logits, teacher_logits, labels, *options)


def _launch(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    temperature: float,
    target_weight: float | None,
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
    """Of kd_ce_loss, or with a target_weight of dkd_loss. One launch for a batch of few classes; otherwise, where a
    reduction needs them, one more to count the labels that are not ignored and one to add up the losses."""
    apart = target_weight is not None
    student, student_stride = _rows(student_logits)
    teacher, teacher_stride = _rows(teacher_logits)
    shape = student_logits.shape
    classes = shape[-1]
    rows = student_logits.numel() // classes
    dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    grad_student = student.new_empty(shape if student_grad else 0)
    grad_teacher = teacher.new_empty(shape if teacher_grad else 0)
    planes = (3 + apart,) if return_terms else ()
    loss = student.new_empty((*planes, *(shape[:-1] if reduction == "none" else ())), dtype=dtype)
    if rows == 0:
        return loss.fill_(math.nan if reduction == "mean" else 0), grad_student, grad_teacher

    if kd_weight == 0 and not apart:
        divergence, temperature = "none", 1.0
    labelled = labels is not None
    task = labelled and ce_weight != 0
    targets = labels.contiguous() if labels is not None else student
    power = 1
    if task and temperature != 1:
        cheaper = student.itemsize == 2 and temperature <= MAX_POWER and temperature % 1 == 0
        power = int(temperature) if cheaper else 0
    tiled = classes <= TILE_COLUMNS
    columns = 1 << (classes - 1).bit_length()
    tile_rows = max(TILE_SIZE // columns, 1)
    programs = -(-rows // tile_rows) if tiled else rows
    single = tiled and programs == 1
    reduce = reduction != "none" and not single
    alignment = math.gcd(classes, student_stride, teacher_stride, 16)
    losses = student.new_empty((*planes, programs), dtype=dtype) if reduce else loss
    with torch.cuda.device_of(student):
        counts, count_programs = losses, 0
        if reduction == "mean" and labelled and not single:
            count_programs = -(-rows // COUNT_BLOCK)
            counts = student.new_empty(count_programs, dtype=torch.int32)
            _count_kernel[(count_programs,)](targets, counts, rows, ignore_index, COUNT_BLOCK, num_warps=8)
        arguments = (
            student, teacher, targets, counts, losses, grad_student, grad_teacher, rows, classes, student_stride,
            teacher_stride, count_programs, ignore_index, temperature,
            temperature**2 if scale_by_temperature else 1.0, kd_weight, target_weight or 0.0, ce_weight,
            label_smoothing, divergence, labelled, task, task and label_smoothing != 0, power, apart, reduction,
            return_terms, student_grad, teacher_grad, alignment,
        )  # fmt: skip
        if tiled:
            _tile_kernel[(programs,)](
                *arguments, single, tile_rows, columns, num_warps=max(columns // 256, 4), enable_fp_fusion=True
            )
        else:
            width = 16 // min(student.itemsize, teacher.itemsize)
            packed = student_stride == classes == teacher_stride
            weigher_grad = student_grad if divergence == "reverse_kl" else teacher_grad
            warps, registers = (32 if classes >= LONG_ROW else 16), 64
            parts = 1 if weigher_grad or alignment < width or student.dtype != teacher.dtype else 2
            if dtype == torch.float64:
                warps, registers, parts = 8, 128, 1
            _sweep_kernel[(rows,)](
                *arguments, packed, parts, 32 * warps, width,
                num_warps=warps, maxnreg=registers, enable_fp_fusion=True,
            )  # fmt: skip
        if reduce:
            _reduce_kernel[planes or (1,)](
                losses, counts, loss, programs, rows, count_programs, labelled, reduction == "mean",
                REDUCE_BLOCK, num_warps=8,
            )  # fmt: skip
    return loss, grad_student, grad_teacher
