"""Rows of many classes for kd_ce_loss and dkd_loss: a program has a row, and reads it block after block, twice.

All lanes share the row: each sums its own part of block after block without talking to the others, and a second sweep
writes the gradient, last block first, because what was read last is still in cache.

Any reference near the maximum is as good as the maximum. A sweep therefore takes the maximum of the row's first block,
and leaves out what only unusual logits need. Where the sums show that a row was unusual (an infinity, a NaN, a maximum
far above the first block's or too large to scale first and shift after), that row is swept again, carefully.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastdistill.kernels.common import _cast, _multiple
from fastdistill.kernels.kd_row import (
    LOG2_E,
    SIZES,
    _coefficients,
    _gradients,
    _labels,
    _loss,
    _rows_that_count,
    _shift,
    _sums,
    _without,
)


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
        teacher_label_shifted = label_shifted
        if APART:
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
            if APART:
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
