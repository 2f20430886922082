"""MetaDistil's objective: plain distillation from a teacher that learns from what its student makes of a quiz."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from torch import Tensor

from fastdistill.objectives.base import Needs, WeightedSum
from fastdistill.objectives.distilbert import OneLabel
from fastdistill.objectives.logits import MSE, LogitsKD, TaskLoss
from fastdistill.ops.checks import check_choice, check_number


class MetaKD(WeightedSum):
    r"""Distillation with a teacher that adapts to its student: MetaDistil (Zhou et al. 2022, "BERT Learns to Teach"),
    the MetaKD of STARK's Table 2.

    The student's loss is :math:`w_{kd}\,\tau^2\,\mathrm{KL} + w_{ce}\,\mathrm{CE}` or, of one output, squared errors.
    The teacher's is that of examples held out, the quiz, by the student one step further:

    .. math::
        L_{quiz}\big(\theta - \alpha \nabla_\theta L(\theta, \phi)\big)

    with the student's weights :math:`\theta` and the teacher's :math:`\phi`. `fastdistill.MetaTrainer` trains both; for
    any other trainer this is plain distillation.

    Args:
        temperature, kd_weight, ce_weight, label_smoothing: of the student's loss; kd_weight > 0.
        quiz: in (0, 1), the share of the training examples that recipes hold out for the quiz.
        teacher_rate: > 0, the teacher's learning rate as a multiple of the student's.
        problem: "classification" or "regression".

    Its parts are "kd" and "ce". Raises ValueError or TypeError for arguments out of their range.
    """

    def __init__(
        self,
        temperature: float = 2.0,
        kd_weight: float = 1.0,
        ce_weight: float = 1.0,
        *,
        label_smoothing: float = 0.0,
        quiz: float = 0.1,
        teacher_rate: float = 1 / 3,
        problem: OneLabel = "classification",
    ) -> None:
        check_choice("problem", problem, get_args(OneLabel))
        check_number("kd_weight", kd_weight, above=0)
        check_number("quiz", quiz, above=0, below=1)
        check_number("teacher_rate", teacher_rate, above=0)
        self.temperature, self.kd_weight, self.problem = temperature, kd_weight, problem
        self.quiz, self.teacher_rate = quiz, teacher_rate
        soft = LogitsKD(temperature, ce_weight=0.0) if problem == "classification" else MSE(label_weight=0.0)
        super().__init__({"kd": (kd_weight, soft), "ce": (ce_weight, TaskLoss(label_smoothing))})

    @property
    def needs(self) -> Needs:
        """A teacher that runs in every step: nothing of it can be stored."""
        return replace(super().needs, only=None)

    @property
    def fingerprint(self) -> str:
        return f"MetaKD({super().fingerprint}, quiz={self.quiz!r}, teacher_rate={self.teacher_rate!r})"

    def pull(self, teacher_logits: Tensor, tangent: Tensor) -> Tensor:
        r"""The change of the student's loss as its logits change by `tangent` ``[B, C]``, as far as it depends on the
        teacher: :math:`-w_{kd}\,\tau\,\frac{1}{B}\sum_b \langle p_{t,b}^\tau, \dot z_b \rangle`."""
        if self.problem == "regression":
            return -2 * self.kd_weight * (teacher_logits * tangent).sum() / len(tangent)
        p = (teacher_logits / self.temperature).softmax(-1)
        return -self.kd_weight * self.temperature * (p * tangent).sum() / len(tangent)
