"""Knowledge distillation and cross-entropy in one loss."""

from __future__ import annotations

from typing import Literal, Unpack, overload

from torch import Tensor

from fastdistill.ops import reference
from fastdistill.ops.checks import FLOATING, check_tensor
from fastdistill.ops.distillation import (
    DIVERGENCES,
    Divergence,
    Options,
    Reduction,
    apart,
    call,
    check,
    define_loss,
)
from fastdistill.ops.native import NATIVE

__all__ = ["DIVERGENCES", "Divergence", "Reduction", "kd_ce_loss"]


@overload
def kd_ce_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None = None,
    *,
    return_terms: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...
@overload
def kd_ce_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None = None,
    *,
    return_terms: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor, Tensor]: ...
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
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, ...]:
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
        return_terms: return both terms, too, from the same pass.

    Returns:
        The loss, float32 (float64 if either input is), of shape ``[]`` or, for ``"none"``, ``[...]``. With
        ``return_terms`` ``(loss, kd, ce)``: besides the loss the distillation term with its temperature factor and
        cross-entropy, reduced as it is, without their weights and without a gradient; 0 where a weight is 0.

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
    check(
        student_logits, teacher_logits, labels, temperature, kd_weight, ce_weight, divergence, scale_by_temperature,
        ignore_index, label_smoothing, reduction, return_terms,
    )  # fmt: skip
    if labels is None:
        if ignore_index != -100 or label_smoothing != 0 or ce_weight not in (0, 1):
            _explain_no_labels(ignore_index, label_smoothing, ce_weight)
        ce_weight = 0.0
    if kd_weight == 0 and ce_weight == 0:
        raise ValueError("kd_weight and ce_weight are both 0 (without labels the latter is); expected a positive one")
    loss = call(
        _op, student_logits, teacher_logits, labels, temperature, kd_weight, ce_weight, divergence,
        scale_by_temperature, ignore_index, label_smoothing, reduction,
        temperature=temperature if kd_weight != 0 else 1.0, return_terms=return_terms,
    )  # fmt: skip
    return apart(loss) if return_terms else loss


def _explain_no_labels(ignore_index: int, label_smoothing: float, ce_weight: float) -> None:
    if ignore_index != -100:
        raise ValueError(f"ignore_index is {ignore_index} but labels is None; expected labels to ignore")
    if label_smoothing != 0:
        raise ValueError(f"label_smoothing is {label_smoothing} but labels is None; expected labels to smooth")
    raise ValueError(f"ce_weight is {ce_weight} but labels is None; expected labels, or ce_weight left alone")


_op = define_loss(
    "kd_ce_loss(Tensor student_logits, Tensor teacher_logits, Tensor? labels, float temperature, float kd_weight, "
    "float ce_weight, str divergence, bool scale_by_temperature, int ignore_index, float label_smoothing, "
    "str reduction, bool student_grad, bool teacher_grad, bool return_terms=False) "
    "-> (Tensor loss, Tensor grad_student, Tensor grad_teacher)",
    reference.kd_ce_loss,
    terms=2,
    triton=None if NATIVE.cuda else "kd_ce_loss",
)
