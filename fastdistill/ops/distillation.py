"""What the distillation losses of logits share: the checks of their arguments, the call of their op, its autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

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
from fastdistill.ops.reference import accumulation_dtype
from fastdistill.ops.scale_rows import scale_rows

Divergence = Literal["forward_kl", "soft_ce", "reverse_kl"]
Reduction = Literal["mean", "sum", "none"]
DIVERGENCES = ("forward_kl", "soft_ce", "reverse_kl")
REDUCTIONS = ("mean", "sum", "none")
FLOAT32_TEMPERATURE = 100
"""The highest that float32 serves: the loss is tau^2 times a divergence that shrinks with tau^2 and is the difference
of numbers that do not, so that its relative error, no larger than plain PyTorch's, grows with tau^2."""


class Options(TypedDict, total=False):
    """Keywords of every distillation loss of logits."""

    temperature: float
    kd_weight: float
    ce_weight: float
    divergence: Divergence
    scale_by_temperature: bool
    ignore_index: int
    label_smoothing: float
    reduction: Reduction


def check(
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
    return_terms: bool,
) -> None:
    """Each argument for itself, in the order of the losses' keywords."""
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
        and type(return_terms) is bool
    ):
        _explain_options(
            temperature, kd_weight, ce_weight, label_smoothing, ignore_index, divergence, reduction,
            scale_by_temperature, return_terms,
        )  # fmt: skip
    if labels is not None and not (
        isinstance(labels, Tensor)
        and labels.dtype in INTEGER
        and labels.layout is STRIDED
        and not labels.is_nested
        and labels.shape == student_logits.shape[:-1]
        and labels.device == student_logits.device
    ):
        _explain_labels(labels, student_logits)


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
    reduction: str, scale_by_temperature: bool, return_terms: bool,
) -> None:  # fmt: skip
    check_temperature("temperature", temperature)
    check_number("kd_weight", kd_weight, minimum=0)
    check_number("ce_weight", ce_weight, minimum=0)
    check_number("label_smoothing", label_smoothing, minimum=0, below=1)
    check_choice("divergence", divergence, DIVERGENCES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_bool("scale_by_temperature", scale_by_temperature)
    check_bool("return_terms", return_terms)
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index is {ignore_index!r}; expected an int")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index is {ignore_index}; expected an int of 64 bits")


def _explain_labels(labels: Tensor, student: Tensor) -> None:
    check_tensor("labels", labels, INTEGER)
    if labels.shape != student.shape[:-1]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; expected {tuple(student.shape[:-1])}, "
            "the leading shape of student_logits"
        )
    check_same_device("labels", labels, "student_logits", student)


def call(
    op: Callable[..., Any],
    student_logits: Tensor,
    teacher_logits: Tensor,
    *options: Any,
    temperature: float,
    return_terms: bool,
) -> Tensor:
    """The op's first output, in float64 at a temperature that float32 does not serve. Options: labels, temperature and
    all up to the reduction."""
    dtype = None
    if temperature > FLOAT32_TEMPERATURE:
        dtype = accumulation_dtype(student_logits, teacher_logits)
        student_logits, teacher_logits = student_logits.double(), teacher_logits.double()
    loss: Tensor = op(
        student_logits, teacher_logits, *options,
        student_logits.requires_grad and torch.is_grad_enabled(),
        teacher_logits.requires_grad and torch.is_grad_enabled(),
        return_terms,
    )[0]  # fmt: skip
    return loss if dtype is None else loss.to(dtype)


def apart(loss: Tensor) -> tuple[Tensor, ...]:
    """The loss and its terms, which have no gradient."""
    total, *terms = loss.unbind()
    return total, *(term.detach() for term in terms)


def define_loss(schema: str, reference: Callable[..., Any], terms: int, *, triton: str | None) -> Callable[..., Any]:
    """Define ``fastdistill::<schema>``, a loss with a weight for each of its terms, and its autograd."""

    def fake(
        student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, *options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        reduction, student_grad, teacher_grad, *return_terms = options[5 + terms :]
        shape = student_logits.shape[:-1] if reduction == "none" else ()
        if any(return_terms):
            shape = (1 + terms, *shape)
        loss = student_logits.new_empty(shape, dtype=accumulation_dtype(student_logits, teacher_logits))
        grad_student, grad_teacher = (
            torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else x.new_empty(0)
            for x, wanted in ((student_logits, student_grad), (teacher_logits, teacher_grad))
        )
        return loss, grad_student, grad_teacher

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *arguments, student_grad, teacher_grad, ctx.return_terms = inputs
        wanted, grads = ctx.needs_input_grad[:2], output[1:]
        if any(w and not asked for w, asked in zip(wanted, (student_grad, teacher_grad), strict=True)):
            grads = op(*arguments, *wanted)[1:]  # torch.vmap hid it from the caller
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(*output[1:])
        ctx.wanted, ctx.others = wanted, len(inputs) - 2

    def backward(ctx: Any, grad_output: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(f"{name} cannot be differentiated twice (create_graph=True)")
        if grad_output is not None and ctx.return_terms:
            grad_output = grad_output[0]
        grads = (
            scale_rows(grad, grad_output) if wanted and grad_output is not None else None
            for grad, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
        )
        return *grads, *(None,) * ctx.others

    name = schema[: schema.index("(")]
    op = define(schema, reference, fake, triton=triton)
    define_autograd(name, backward, setup_context)
    return op
