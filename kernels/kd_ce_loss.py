"""Distillation plus task loss over logits, with its gradients, in Triton: kd_ce_loss and dkd_loss.

In the tile kernel a lane is a row, and the program's rows stay in registers: one read, one write. Large vocabularies
are swept (`kd_sweep`). Formulas: `kd_row`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from fastdistill.kernels.common import _cast, _multiple
from fastdistill.kernels.kd_row import (
    LOG2_E,
    SIZES,
    _coefficients,
    _gradients,
    _labels,
    _lane_max,
    _loss,
    _rows_that_count,
    _shift,
    _spread,
    _sum,
    _sums,
    _without,
)
from fastdistill.kernels.kd_sweep import _sweep_kernel
from torch import Tensor

TILE_SIZE = 1024  # elements in a tile of 4 warps
TILE_COLUMNS = 4096  # the most classes that a tile holds; more are swept
LONG_ROW = 65536  # from this many classes on, one row in flight per multiprocessor: two would not fit in L2
COUNT_BLOCK = 4096  # labels that a program counts
REDUCE_BLOCK = 4096  # losses added up at a time
MAX_POWER = 16  # the largest temperature for which exp(z) is taken as a power of exp(z / temperature)


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
            if apart and weigher_grad:  # needs a few registers more
                warps, registers = 16, 128
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
