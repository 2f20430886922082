"""Decoupled knowledge distillation and cross-entropy in one loss."""

from __future__ import annotations

from typing import Literal, Unpack, overload

from torch import Tensor

from fastdistill.ops import reference
from fastdistill.ops.checks import INTEGER, check_bool, check_number, check_tensor
from fastdistill.ops.distillation import Divergence, Options, Reduction, apart, call, check, define_loss
from fastdistill.ops.kd_ce_loss import kd_ce_loss


@overload
def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    return_terms: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...
@overload
def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    return_terms: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 1.0,
    divergence: Divergence = "forward_kl",
    scale_by_temperature: bool = True,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    r"""Decoupled distillation (Zhao et al. 2022) plus cross-entropy on hard labels, in one pass over the logits.

    .. math::
        \ell = w_{kd}\,\tau^2\,\big(\alpha\,D(b_t, b_s) + \beta\,D(q_t, q_s)\big) + w_{ce}\,\mathrm{CE}(z_s, y),
        \qquad b = (p^\tau_y,\, 1 - p^\tau_y), \qquad q = \mathrm{softmax}\big((z/\tau)_{i \ne y}\big)

    ``D(b_t, b_s)`` is TCKD, distillation of whether it is the target, the label's class; ``D(q_t, q_s)`` is NCKD, that
    of the other classes among themselves. With forward KL :math:`D(p_t, p_s) = \mathrm{TCKD} + (1 - p_{t,y})\,
    \mathrm{NCKD}`: a confident teacher mutes what it knows of the other classes, and :math:`\beta` does not. Of two
    classes NCKD is 0. Both are exact however near 1 the target's probability is. The released code raises the
    distillation's weight over the first epochs; here that is for the caller to do.

    Args:
        alpha, beta: >= 0, not both 0; the released code's for most models on CIFAR-100 by default (with
            ``temperature=4``).
        labels: ``[...]``, any integer dtype.
        student_logits, teacher_logits, temperature, kd_weight, ce_weight, divergence, scale_by_temperature,
            ignore_index, label_smoothing, reduction: as in :func:`fastdistill.kd_ce_loss`, also as to gradients, which
            go to both sides. Smoothing acts on cross-entropy only.
        return_terms: return the terms, too, from the same pass.

    Returns:
        The loss, as kd_ce_loss. With ``return_terms`` ``(loss, tckd, nckd, ce)``: besides the loss both distillation
        terms with their temperature factor and cross-entropy, reduced as it is, without their weights and without a
        gradient. Cross-entropy is 0 where its weight is, and TCKD and NCKD where ``kd_weight`` is.

        NaN for a row whose logits but the target's are all -inf: they are no distribution.

    Raises:
        TypeError, ValueError: as kd_ce_loss.
    """
    check_number("alpha", alpha, minimum=0)
    check_number("beta", beta, minimum=0)
    if alpha == 0 and beta == 0:
        raise ValueError("alpha and beta are both 0; expected a positive one")
    check_bool("return_terms", return_terms)
    if labels is None:
        check_tensor("labels", labels, INTEGER)
    if teacher_logits is None or kd_weight == 0:
        options = Options(
            temperature=temperature, kd_weight=kd_weight, ce_weight=ce_weight, divergence=divergence,
            scale_by_temperature=scale_by_temperature, ignore_index=ignore_index, label_smoothing=label_smoothing,
            reduction=reduction,
        )  # fmt: skip
        if not return_terms:
            return kd_ce_loss(student_logits, teacher_logits, labels, **options)
        loss, kd, ce = kd_ce_loss(student_logits, teacher_logits, labels, return_terms=True, **options)
        return loss, kd, kd, ce
    check(
        student_logits, teacher_logits, labels, temperature, kd_weight, ce_weight, divergence, scale_by_temperature,
        ignore_index, label_smoothing, reduction, return_terms,
    )  # fmt: skip
    loss = call(
        _op, student_logits, teacher_logits, labels, temperature, kd_weight * alpha, kd_weight * beta, ce_weight,
        divergence, scale_by_temperature, ignore_index, label_smoothing, reduction,
        temperature=temperature, return_terms=return_terms,
    )  # fmt: skip
    return apart(loss) if return_terms else loss


_op = define_loss(
    "dkd_loss(Tensor student_logits, Tensor teacher_logits, Tensor labels, float temperature, float target_weight, "
    "float nontarget_weight, float ce_weight, str divergence, bool scale_by_temperature, int ignore_index, "
    "float label_smoothing, str reduction, bool student_grad, bool teacher_grad, bool return_terms=False) "
    "-> (Tensor loss, Tensor grad_student, Tensor grad_teacher)",
    reference.dkd_loss,
    terms=3,
    triton="kd_ce_loss",
)
