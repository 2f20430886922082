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
    SIZES,
    Pair,
    Tensors,
    _coefficients,
    _gradients,
    _labels,
    _loss,
    _numbers,
    _rows_that_count,
    _shift,
    _sums,
    _without,
)


@triton.jit
def _load(logits, position, inside, whole, PADDING: tl.constexpr, EVICT: tl.constexpr, DTYPE: tl.constexpr,
          SPEC: tl.constexpr):  # fmt: skip
    """A block of both logits, with PADDING where it is not inside the row; in wide loads, unmasked, if whole."""
    student_ptr, teacher_ptr = logits
    if SPEC.DIVERGENCE == "none":
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
def _sweep_max(logits, offset, begin, end, label, blocks, SIZE: tl.constexpr, DTYPE: tl.constexpr, SPEC: tl.constexpr):
    """The largest logits of the row's first blocks; NaN may go unnoticed."""
    student_max = tl.full([], -float("inf"), DTYPE)
    teacher_max = student_max
    for index in range(blocks):
        position, inside, whole = _block(index, offset, begin, end, SIZE)
        student, teacher = _load(logits, position, inside, whole, -float("inf"), "", DTYPE, SPEC)
        student, teacher = _without(student, teacher, position, label, -float("inf"), SPEC)
        student_max = tl.maximum(student_max, tl.max(student))
        teacher_max = tl.maximum(teacher_max, tl.max(teacher))
    return student_max, teacher_max


@triton.jit
def _sweep_sums(logits, offset, begin, end, label, references, numbers, SIZE: tl.constexpr, DTYPE: tl.constexpr,
                SPEC: tl.constexpr, PADDING: tl.constexpr, CAREFUL: tl.constexpr):  # fmt: skip
    """_sums of a row."""
    zero = tl.zeros([offset.shape[1]], DTYPE)
    student_sum, task_sum, teacher_sum, gap_sum, shifted_sum = zero, zero, zero, zero, zero
    for index in range(tl.cdiv(end, SIZE)):
        position, inside, whole = _block(index, offset, begin, end, SIZE)
        student, teacher = _load(logits, position, inside, whole, PADDING, "", DTYPE, SPEC)
        student, teacher = _without(student, teacher, position, label, PADDING, SPEC)
        if SPEC.APART:
            inside = inside & (position != label)
        sums = _sums(student, teacher, inside, references, numbers, SPEC, CAREFUL)
        student_sum += sums[0]
        task_sum += sums[1]
        teacher_sum += sums[2]
        gap_sum += sums[3]
        shifted_sum += sums[4]
    return tl.sum(student_sum), tl.sum(task_sum), tl.sum(teacher_sum), tl.sum(gap_sum), tl.sum(shifted_sum)


@triton.jit
def _sweep_gradients(logits, grads, offset, begin, end, label, valid, references, coefficients, numbers,
                     SIZE: tl.constexpr, DTYPE: tl.constexpr, SPEC: tl.constexpr, CAREFUL: tl.constexpr):  # fmt: skip
    """Writes the gradients of a row, last block first."""
    blocks = tl.cdiv(end, SIZE)
    for step in range(blocks):
        position, inside, whole = _block(blocks - 1 - step, offset, begin, end, SIZE)
        student, teacher = _load(logits, position, inside, whole, 0.0, "evict_first", DTYPE, SPEC)
        student_grad, teacher_grad = _gradients(student, teacher, references, coefficients, numbers, SPEC, CAREFUL)
        if SPEC.STUDENT_GRAD:
            _store(grads.student, position, student_grad, inside, whole)
        if SPEC.TEACHER_GRAD:
            _store(grads.teacher, position, teacher_grad, inside, whole)
    if SPEC.APART:
        tl.debug_barrier()  # after the block that it is in
        if SPEC.STUDENT_GRAD:
            tl.store(grads.student + label, _cast(coefficients[8], grads.student), mask=valid)
        if SPEC.TEACHER_GRAD:
            tl.store(grads.teacher + label, _cast(coefficients[9], grads.teacher), mask=valid)
    elif SPEC.TASK and SPEC.STUDENT_GRAD:  # the label's element once more: cheaper than to look for it in every block
        student = tl.load(logits.student + label, mask=valid, other=0).to(DTYPE)
        teacher = student
        if SPEC.DIVERGENCE != "none":
            teacher = tl.load(logits.teacher + label, mask=valid, other=0).to(DTYPE)
        student_grad, _ = _gradients(student, teacher, references, coefficients, numbers, SPEC, CAREFUL)
        tl.debug_barrier()
        tl.store(grads.student + label, _cast(student_grad - coefficients[4], grads.student), mask=valid)


@triton.jit(do_not_specialize=SIZES)
def _sweep_kernel(
    tensors: Tensors,  # a program has one row, so losses are [1 + terms, rows]
    rows, classes, student_stride, teacher_stride, count_programs, ignore_index,
    temperature: tl.float64, factor: tl.float64, kd_weight: tl.float64, target_weight: tl.float64,
    ce_weight: tl.float64, label_smoothing: tl.float64,
    SPEC: tl.constexpr,
    PACKED: tl.constexpr,  # both strides are classes: where rows are not aligned, blocks are, and begin before the row
    PARTS: tl.constexpr,  # vectors of a lane in a block
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,  # elements of a vector: 16 bytes of the narrower logits
):  # fmt: skip
    student_ptr, teacher_ptr, labels_ptr, counts_ptr, losses_ptr, student_grad_ptr, teacher_grad_ptr = tensors
    DTYPE: tl.constexpr = losses_ptr.dtype.element_ty
    SIZE: tl.constexpr = PARTS * LANES * WIDTH
    NARROW: tl.constexpr = LANES * WIDTH
    FP16: tl.constexpr = student_ptr.dtype.element_ty == tl.float16 or teacher_ptr.dtype.element_ty == tl.float16
    PADDING: tl.constexpr = -65504.0 if FP16 else -1e30  # finite, for no gap between paddings to be inf - inf
    numbers = _numbers(temperature, factor, kd_weight, target_weight, ce_weight, label_smoothing, DTYPE)
    classes = _multiple(classes, SPEC.ALIGNMENT)
    row = tl.program_id(0).to(tl.int64)
    label, counts, valid = _labels(labels_ptr, row, row < rows, classes, ignore_index, SPEC.LABELLED)

    grad_start = row * classes
    student_start = row * _multiple(student_stride, SPEC.ALIGNMENT)
    teacher_start = row * _multiple(teacher_stride, SPEC.ALIGNMENT)
    begin = 0
    if PACKED and SPEC.ALIGNMENT < WIDTH:
        begin = (grad_start % WIDTH).to(tl.int32)
        grad_start = grad_start // WIDTH * WIDTH
        student_start, teacher_start = grad_start, grad_start
    logits = Pair(student_ptr + student_start, teacher_ptr + teacher_start)
    grads = Pair(student_grad_ptr + grad_start, teacher_grad_ptr + grad_start)
    end = begin + classes
    label = begin + label.to(tl.int32)
    offset = _offset(PARTS, LANES, WIDTH)
    narrow = _offset(1, LANES, WIDTH)  # for the careful sweeps, which need more registers

    if counts:
        label_logit, teacher_label_logit = tl.zeros([], DTYPE), tl.zeros([], DTYPE)
        if SPEC.TASK or SPEC.APART:
            label_logit = tl.load(logits.student + label, mask=valid, other=0).to(DTYPE)
        if SPEC.APART:
            teacher_label_logit = tl.load(logits.teacher + label, mask=valid, other=0).to(DTYPE)
        student_max, teacher_max = _sweep_max(logits, offset, begin, end, label, 1, SIZE, DTYPE, SPEC)
        student_reference, teacher_reference = student_max * numbers.scale, teacher_max * numbers.scale
        label_shifted = _shift(label_logit, student_reference, numbers.scale, False)
        teacher_label_shifted = label_shifted
        if SPEC.APART:
            teacher_label_shifted = _shift(teacher_label_logit, teacher_reference, numbers.scale, False)
        references, targets = Pair(student_reference, teacher_reference), Pair(label_shifted, teacher_label_shifted)
        sums = _sweep_sums(
            logits, offset, begin, end, label, references, numbers, SIZE, DTYPE, SPEC, PADDING, False
        )  # fmt: skip
        student_sum, task_sum, teacher_sum, gap_sum, _ = sums
        total = student_sum + task_sum + teacher_sum + tl.abs(gap_sum)
        padding = PADDING * numbers.scale - tl.minimum(student_reference, teacher_reference)
        plain = (
            (total < 2**60)  # nor is one over it too small
            & (tl.abs(student_reference) + tl.abs(teacher_reference) < 2**24)
            & (tl.maximum(padding, padding * numbers.temperature) < -200)
        )
        if not plain:
            student_max, teacher_max = _sweep_max(
                logits, narrow, begin, end, label, tl.cdiv(end, NARROW), NARROW, DTYPE, SPEC
            )
            references = Pair(student_max, teacher_max)
            label_shifted = _shift(label_logit, student_max, numbers.scale, True)
            if SPEC.APART:
                teacher_label_shifted = _shift(teacher_label_logit, teacher_max, numbers.scale, True)
            targets = Pair(label_shifted, teacher_label_shifted)
            sums = _sweep_sums(
                logits, narrow, begin, end, label, references, numbers, NARROW, DTYPE, SPEC, -float("inf"), True
            )
        loss, target, divergence, cross_entropy = _loss(sums, targets, classes, numbers, SPEC)
        tl.store(losses_ptr + row, tl.where(valid, loss, float("nan")))
        if SPEC.TERMS:
            if SPEC.APART:
                losses_ptr += rows
                tl.store(losses_ptr + row, tl.where(valid, target, float("nan")))
            tl.store(losses_ptr + rows + row, tl.where(valid, divergence, float("nan")))
            tl.store(losses_ptr + 2 * rows + row, tl.where(valid, cross_entropy, float("nan")))

        if SPEC.STUDENT_GRAD or SPEC.TEACHER_GRAD:
            divisor = tl.full([], 1, DTYPE)
            if SPEC.REDUCTION == "mean":
                divisor = _rows_that_count(counts_ptr, count_programs, rows, SPEC.LABELLED).to(DTYPE)
            share = tl.where(valid, 1 / divisor, float("nan"))
            coefficients = _coefficients(sums, targets, share, classes, numbers, SPEC)
            if plain:
                _sweep_gradients(
                    logits, grads, offset, begin, end, label, valid, references, coefficients, numbers,
                    SIZE, DTYPE, SPEC, False,
                )  # fmt: skip
            else:
                _sweep_gradients(
                    logits, grads, narrow, begin, end, label, valid, references, coefficients, numbers,
                    NARROW, DTYPE, SPEC, True,
                )  # fmt: skip
    else:
        for plane in tl.static_range(3 + SPEC.APART if SPEC.TERMS else 1):
            tl.store(losses_ptr + plane * rows + row, 0.0)
        zero = tl.zeros([PARTS, LANES, WIDTH], DTYPE)
        for index in range(tl.cdiv(end, SIZE)):
            position, inside, whole = _block(index, offset, begin, end, SIZE)
            if SPEC.STUDENT_GRAD:
                _store(grads.student, position, zero, inside, whole)
            if SPEC.TEACHER_GRAD:
                _store(grads.teacher, position, zero, inside, whole)
