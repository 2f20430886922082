"""Knowledge distillation and cross-entropy in one loss."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastdistill.ops import reference
from fastdistill.ops.checks import (
    FLOATING,
    INTEGER,
    LARGEST,
    NUMBERS,
    STRIDED,
    TEMPERATURES,
    check_bool,
    check_choice,
    check_number,
    check_same_device,
    check_temperature,
    check_tensor,
    is_floating,
)
from fastdistill.ops.library import define, define_autograd
from fastdistill.ops.native import NATIVE
from fastdistill.ops.scale_rows import scale_rows

Divergence = Literal["forward_kl", "soft_ce", "reverse_kl"]
Reduction = Literal["mean", "sum", "none"]
DIVERGENCES = ("forward_kl", "soft_ce", "reverse_kl")
REDUCTIONS = ("mean", "sum", "none")
FLOAT32_TEMPERATURE = 100
"""The highest that float32 serves: the loss is tau^2 times a divergence that shrinks with tau^2 and is the difference
of numbers that do not, so that its relative error, no larger than plain PyTorch's, grows with tau^2."""


def kd_ce_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 1.0,
    divergence: Divergence = "forward_kl",
    scale_by_temperature: bool = True,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Temperature-scaled distillation plus cross-entropy on hard labels, in one pass over the logits.

    .. math::
        \ell = w_{kd}\,\tau^2\,D(p_t^\tau, p_s^\tau) + w_{ce}\,\mathrm{CE}(z_s, y),
        \qquad p^\tau = \mathrm{softmax}(z/\tau)

    with the divergence :math:`D` one of

    * ``"forward_kl"``: :math:`\sum p_t^\tau (\log p_t^\tau - \log p_s^\tau)` (Hinton et al. 2015; DeKD, Pea-KD);
    * ``"soft_ce"``: :math:`-\sum p_t^\tau \log p_s^\tau` (STARK). Its gradient to the student is forward KL's, its
      gradient to the teacher is not;
    * ``"reverse_kl"``: :math:`\sum p_s^\tau (\log p_s^\tau - \log p_t^\tau)` (MiniLLM, Gu et al. 2024).

    A class with probability 0 (a logit of -inf) on the side that weighs adds 0.

    Args:
        student_logits, teacher_logits: ``[..., C]`` with C >= 2; float32, float64, bfloat16 or float16, each its own.
            Gradients go to whichever requires one. Computed in float32 (float64 if either is, or tau > 100), also under
            autocast. The teacher's may be None where ``kd_weight`` is 0.
        labels: ``[...]``, any integer dtype; None for the distillation term alone (``ce_weight`` must then be left
            at its default or be 0).
        temperature: 1e-4 <= tau <= 1e4, on both sides of the distillation term; cross-entropy is always at temperature
            1. Above 100 copies of the logits in float64 are made.
        kd_weight, ce_weight: >= 0, not both 0. A term with weight 0 is not computed.
        scale_by_temperature: multiply the distillation term by tau^2, so that its gradient does not shrink with tau.
        ignore_index: rows with this label count in neither term, nor in the mean's denominator; gradient 0.
        label_smoothing: in [0, 1), as in :func:`torch.nn.functional.cross_entropy`; acts on the hard labels only.
        reduction: ``"mean"`` over the rows that count (NaN if none does), ``"sum"``, or ``"none"`` for ``[...]``.

    Returns:
        The loss, float32 (float64 if either input is), of shape ``[]`` or, for ``"none"``, ``[...]``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that differ, a number or name out of its range, a label outside ``[0, C)`` that is not
            ``ignore_index`` (on CPU; on CUDA, where looking would cost a synchronisation, that row's loss and
            gradients are NaN, and nothing is read out of bounds).

    The gradient is computed in the forward call, when one is wanted; the backward only scales it, in place where the
    graph is not retained, and not at all for an upstream gradient of 1. It cannot be differentiated twice, nor by
    torch.func; torch.vmap calls it once for each example of its batch.
    """
    if teacher_logits is None:
        if kd_weight != 0:
            raise ValueError(f"teacher_logits is None but kd_weight is {kd_weight}; expected logits, or kd_weight=0")
        check_tensor("student_logits", student_logits, FLOATING)
        teacher_logits = student_logits.detach()
    if not (
        is_floating(student_logits)
        and is_floating(teacher_logits)
        and (shape := student_logits.shape) == teacher_logits.shape
        and len(shape) > 0
        and shape[-1] > 1
        and student_logits.device == teacher_logits.device
    ):
        _explain_logits(student_logits, teacher_logits)
    if not (
        type(temperature) in NUMBERS
        and type(kd_weight) in NUMBERS
        and type(ce_weight) in NUMBERS
        and type(label_smoothing) in NUMBERS
        and type(ignore_index) is int
        and TEMPERATURES[0] <= temperature <= TEMPERATURES[1]
        and 0 <= kd_weight <= LARGEST
        and 0 <= ce_weight <= LARGEST
        and 0 <= label_smoothing < 1
        and -(2**63) <= ignore_index < 2**63
        and divergence in DIVERGENCES
        and reduction in REDUCTIONS
        and type(scale_by_temperature) is bool
    ):
        _explain_options(
            temperature, kd_weight, ce_weight, label_smoothing, ignore_index, divergence, reduction,
            scale_by_temperature,
        )  # fmt: skip
    if labels is None:
        if ignore_index != -100 or label_smoothing != 0 or ce_weight not in (0, 1):
            _explain_no_labels(ignore_index, label_smoothing, ce_weight)
        ce_weight = 0.0
    elif not (
        isinstance(labels, Tensor)
        and labels.dtype in INTEGER
        and labels.layout is STRIDED
        and not labels.is_nested
        and labels.shape == student_logits.shape[:-1]
        and labels.device == student_logits.device
    ):
        _explain_labels(labels, student_logits)
    if kd_weight == 0 and ce_weight == 0:
        raise ValueError("kd_weight and ce_weight are both 0 (without labels the latter is); expected a positive one")
    dtype = None
    if temperature > FLOAT32_TEMPERATURE and kd_weight != 0:
        dtype = reference.accumulation_dtype(student_logits, teacher_logits)
        student_logits, teacher_logits = student_logits.double(), teacher_logits.double()
    loss: Tensor = _op(
        student_logits, teacher_logits, labels, temperature, kd_weight, ce_weight, divergence, scale_by_temperature,
        ignore_index, label_smoothing, reduction,
        student_logits.requires_grad and torch.is_grad_enabled(),
        teacher_logits.requires_grad and torch.is_grad_enabled(),
    )[0]  # fmt: skip
    return loss if dtype is None else loss.to(dtype)


def _explain_logits(student: Tensor, teacher: Tensor) -> None:
    check_tensor("student_logits", student, FLOATING)
    check_tensor("teacher_logits", teacher, FLOATING)
    if student.shape != teacher.shape:
        what = "leading shape" if student.shape[:-1] != teacher.shape[:-1] else "number of classes"
        raise ValueError(
            f"teacher_logits has shape {tuple(teacher.shape)}, student_logits {tuple(student.shape)}; "
            f"expected the same {what}"
        )
    if student.dim() == 0 or student.shape[-1] < 2:
        raise ValueError(
            f"student_logits has shape {tuple(student.shape)}; expected [..., C] with at least 2 classes. "
            "For regression (one output) use torch.nn.functional.mse_loss"
        )
    check_same_device("teacher_logits", teacher, "student_logits", student)


def _explain_options(
    temperature: float, kd_weight: float, ce_weight: float, label_smoothing: float, ignore_index: int, divergence: str,
    reduction: str, scale_by_temperature: bool,
) -> None:  # fmt: skip
    check_temperature("temperature", temperature)
    check_number("kd_weight", kd_weight, minimum=0)
    check_number("ce_weight", ce_weight, minimum=0)
    check_number("label_smoothing", label_smoothing, minimum=0, below=1)
    check_choice("divergence", divergence, DIVERGENCES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_bool("scale_by_temperature", scale_by_temperature)
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index is {ignore_index!r}; expected an int")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index is {ignore_index}; expected an int of 64 bits")


def _explain_no_labels(ignore_index: int, label_smoothing: float, ce_weight: float) -> None:
    if ignore_index != -100:
        raise ValueError(f"ignore_index is {ignore_index} but labels is None; expected labels to ignore")
    if label_smoothing != 0:
        raise ValueError(f"label_smoothing is {label_smoothing} but labels is None; expected labels to smooth")
    raise ValueError(f"ce_weight is {ce_weight} but labels is None; expected labels, or ce_weight left alone")


def _explain_labels(labels: Tensor, student: Tensor) -> None:
    check_tensor("labels", labels, INTEGER)
    if labels.shape != student.shape[:-1]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; expected {tuple(student.shape[:-1])}, "
            "the leading shape of student_logits"
        )
    check_same_device("labels", labels, "student_logits", student)


def _fake(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    reduction, student_grad, teacher_grad = args[-3:]
    shape = student_logits.shape[:-1] if reduction == "none" else ()
    loss = student_logits.new_empty(shape, dtype=reference.accumulation_dtype(student_logits, teacher_logits))
    grad_student, grad_teacher = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else x.new_empty(0)
        for x, wanted in ((student_logits, student_grad), (teacher_logits, teacher_grad))
    )
    return loss, grad_student, grad_teacher


_op = define(
    "kd_ce_loss(Tensor student_logits, Tensor teacher_logits, Tensor? labels, float temperature, float kd_weight, "
    "float ce_weight, str divergence, bool scale_by_temperature, int ignore_index, float label_smoothing, "
    "str reduction, bool student_grad, bool teacher_grad) -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)",
    reference.kd_ce_loss,
    _fake,
    triton=None if NATIVE.cuda else "kd_ce_loss",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    wanted, grads = ctx.needs_input_grad[:2], output[1:]
    if any(w and not asked for w, asked in zip(wanted, inputs[-2:], strict=True)):  # torch.vmap hid it from the caller
        grads = _op(*inputs[:-2], *wanted)[1:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*grads)
    ctx.mark_non_differentiable(*output[1:])
    ctx.student_grad, ctx.teacher_grad = wanted


def _backward(ctx: Any, grad_output: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("kd_ce_loss cannot be differentiated twice (create_graph=True)")
    grads = (
        scale_rows(grad, grad_output) if wanted and grad_output is not None else None
        for grad, wanted in zip(ctx.saved_tensors, (ctx.student_grad, ctx.teacher_grad), strict=True)
    )
    return *grads, *(None,) * 11


define_autograd("kd_ce_loss", _backward, _setup_context)
