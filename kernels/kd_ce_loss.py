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
    SIZES,
    Pair,
    Specialization,
    Tensors,
    _coefficients,
    _gradients,
    _labels,
    _lane_max,
    _loss,
    _numbers,
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
def _store_losses(losses_ptr, losses, row, rows, exists, counts, valid, divisor, SPEC: tl.constexpr,
                  SINGLE: tl.constexpr):  # fmt: skip
    """Losses of a program's rows, or their sum; returns where the next term's go."""
    losses = tl.where(counts, tl.where(valid, losses, float("nan")), 0.0)
    if SPEC.REDUCTION == "none":
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
    tensors: Tensors,
    rows, classes, student_stride, teacher_stride, count_programs, ignore_index,
    temperature: tl.float64, factor: tl.float64, kd_weight: tl.float64, target_weight: tl.float64,
    ce_weight: tl.float64, label_smoothing: tl.float64,
    SPEC: tl.constexpr,
    SINGLE: tl.constexpr,  # there is only this program, and the loss it writes is the final one
    ROWS: tl.constexpr,  # rows a program
    COLUMNS: tl.constexpr,  # not fewer than classes
):  # fmt: skip
    losses_ptr = tensors.losses
    DTYPE: tl.constexpr = losses_ptr.dtype.element_ty
    numbers = _numbers(temperature, factor, kd_weight, target_weight, ce_weight, label_smoothing, DTYPE)
    classes = _multiple(classes, SPEC.ALIGNMENT)

    program = tl.program_id(0)
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, None, :]
    exists = row < rows
    inside = _spread(exists) & (column < classes)
    label, counts, valid = _labels(tensors.labels, row, exists, classes, ignore_index, SPEC.LABELLED)

    student_row = tensors.student + row * _multiple(student_stride, SPEC.ALIGNMENT)
    student = tl.load(_spread(student_row) + column, mask=inside, other=-float("inf")).to(DTYPE)
    teacher, teacher_row = student, student_row
    if SPEC.DIVERGENCE != "none":
        teacher_row = tensors.teacher + row * _multiple(teacher_stride, SPEC.ALIGNMENT)
        teacher = tl.load(_spread(teacher_row) + column, mask=inside, other=-float("inf")).to(DTYPE)
    student, teacher = _without(student, teacher, column, _spread(label), -float("inf"), SPEC)
    student_max, teacher_max = _lane_max(student), _lane_max(teacher)
    label_shifted, teacher_label_shifted = student_max, student_max
    if SPEC.TASK or SPEC.APART:
        label_logit = tl.load(student_row + label, mask=counts & valid, other=0).to(DTYPE)
        label_shifted = _shift(label_logit, student_max, numbers.scale, True)
    if SPEC.APART:
        label_logit = tl.load(teacher_row + label, mask=counts & valid, other=0).to(DTYPE)
        teacher_label_shifted = _shift(label_logit, teacher_max, numbers.scale, True)

    summed = inside
    if SPEC.APART:
        summed = inside & (column != _spread(label))
    references = Pair(_spread(student_max), _spread(teacher_max))
    targets = Pair(label_shifted, teacher_label_shifted)
    sums = _sums(student, teacher, summed, references, numbers, SPEC, True)
    loss, target, divergence, cross_entropy = _loss(sums, targets, classes, numbers, SPEC)
    divisor = tl.full([], 1, DTYPE)
    if SPEC.REDUCTION == "mean" and SINGLE:
        divisor = tl.sum(counts.to(DTYPE))
    elif SPEC.REDUCTION == "mean":
        divisor = _rows_that_count(tensors.counts, count_programs, rows, SPEC.LABELLED).to(DTYPE)
    losses_ptr = _store_losses(losses_ptr, loss, row, rows, exists, counts, valid, divisor, SPEC, SINGLE)
    if SPEC.TERMS:
        if SPEC.APART:
            losses_ptr = _store_losses(losses_ptr, target, row, rows, exists, counts, valid, divisor, SPEC, SINGLE)
        losses_ptr = _store_losses(losses_ptr, divergence, row, rows, exists, counts, valid, divisor, SPEC, SINGLE)
        _store_losses(losses_ptr, cross_entropy, row, rows, exists, counts, valid, divisor, SPEC, SINGLE)

    if SPEC.STUDENT_GRAD or SPEC.TEACHER_GRAD:
        share = tl.where(valid, 1 / divisor, float("nan"))
        coefficients = _coefficients(sums, targets, share, classes, numbers, SPEC)
        student_grad, teacher_grad = _gradients(student, teacher, references, coefficients, numbers, SPEC, True)
        start = _spread(row * classes)
        if SPEC.STUDENT_GRAD:
            if SPEC.APART:
                student_grad = tl.where(column == _spread(label), coefficients[8], student_grad)
            elif SPEC.TASK:
                student_grad -= tl.where(column == _spread(label), coefficients[4], 0.0)
            student_grad = tl.where(_spread(counts), student_grad, 0.0)
            tl.store(tensors.student_grad + start + column, _cast(student_grad, tensors.student_grad), mask=inside)
        if SPEC.TEACHER_GRAD:
            if SPEC.APART:
                teacher_grad = tl.where(column == _spread(label), coefficients[9], teacher_grad)
            teacher_grad = tl.where(_spread(counts), teacher_grad, 0.0)
            tl.store(tensors.teacher_grad + start + column, _cast(teacher_grad, tensors.teacher_grad), mask=inside)


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
        specialization = Specialization(
            DIVERGENCE=divergence, LABELLED=labelled, TASK=task, SMOOTH=task and label_smoothing != 0, POWER=power,
            APART=apart, REDUCTION=reduction, TERMS=return_terms, STUDENT_GRAD=student_grad,
            TEACHER_GRAD=teacher_grad, ALIGNMENT=alignment,
        )  # fmt: skip
        arguments = (
            Tensors(student, teacher, targets, counts, losses, grad_student, grad_teacher), rows, classes,
            student_stride, teacher_stride, count_programs, ignore_index, temperature,
            temperature**2 if scale_by_temperature else 1.0, kd_weight, target_weight or 0.0, ce_weight,
            label_smoothing, specialization,
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
