"""Losses of logits and labels: distillation of classes, of one output, and the task's own loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.objectives.base import Needs, Objective, weighted_sum
from fastdistill.ops.checks import check_choice, check_number
from fastdistill.ops.kd_ce_loss import DIVERGENCES, Divergence, kd_ce_loss


@dataclass(frozen=True)
class LogitsKD(Objective):
    """Distillation of class logits plus cross-entropy on hard labels: `fastdistill.kd_ce_loss`, which see.

    Args:
        temperature, kd_weight, ce_weight, divergence, scale_by_temperature, label_smoothing: as there.

    Its parts are "kd", the distillation term with its temperature factor, and "ce"; their weighted sum is the
    loss. With a weight of 0 the teacher or the labels may be None. Raises TypeError or ValueError for an
    argument out of its range.
    """

    temperature: float = 2.0
    kd_weight: float = 1.0
    ce_weight: float = 1.0
    divergence: Divergence = "forward_kl"
    scale_by_temperature: bool = True
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, above=0)
        _check_weights(kd_weight=self.kd_weight, ce_weight=self.ce_weight)
        check_choice("divergence", self.divergence, DIVERGENCES)
        if not isinstance(self.scale_by_temperature, bool):
            raise TypeError(f"scale_by_temperature is {self.scale_by_temperature!r}; expected True or False")
        check_number("label_smoothing", self.label_smoothing, minimum=0, below=1)
        if self.label_smoothing and not self.ce_weight:
            raise ValueError(f"label_smoothing is {self.label_smoothing} but ce_weight is 0; expected 0 as well")

    @property
    def needs(self) -> Needs:
        return Needs(teacher=self.kd_weight > 0, only="probabilities", problem="classification")

    def parts(self, student: Any, teacher: Any, labels: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        _check_given(self, teacher, labels if self.ce_weight else True)
        teacher_logits = teacher.logits if self.needs.teacher else student.logits.detach()
        loss = kd_ce_loss(
            student.logits,
            teacher_logits,
            labels,
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            divergence=self.divergence,
            scale_by_temperature=self.scale_by_temperature,
            label_smoothing=self.label_smoothing,
        )
        total = loss.detach()
        if not self.ce_weight:
            return loss, {"kd": total / self.kd_weight}
        if not self.kd_weight:
            return loss, {"ce": total / self.ce_weight}
        with torch.no_grad():  # the kernel gives the sum; a pass for the cheaper term gives both
            ce = kd_ce_loss(student.logits, teacher_logits, labels, kd_weight=0.0, label_smoothing=self.label_smoothing)
        return loss, {"kd": (total - self.ce_weight * ce) / self.kd_weight, "ce": ce}

    def summands(self, student: Any, teacher: Any, labels: Tensor | None, **columns: Tensor) -> dict[str, Tensor]:
        alone = {"kd": replace(self, ce_weight=0.0, label_smoothing=0.0)} if self.kd_weight else {}
        alone |= {"ce": replace(self, kd_weight=0.0)} if self.ce_weight else {}
        return {name: one(student, teacher, labels) for name, one in alone.items()}


@dataclass(frozen=True)
class MSE(Objective):
    r"""Regression: :math:`w_{kd}\,(z_s - z_t)^2 + w_y\,(z_s - y)^2` for one output :math:`z`.

    Args:
        kd_weight, label_weight: >= 0, not both 0. With a weight of 0 the teacher or the labels may be None.

    Its parts are "kd" and "label". Raises ValueError for logits of more than one output, ``[..., 1]``, and
    for labels of another shape than ``[...]``.
    """

    kd_weight: float = 1.0
    label_weight: float = 1.0

    def __post_init__(self) -> None:
        _check_weights(kd_weight=self.kd_weight, label_weight=self.label_weight)

    @property
    def needs(self) -> Needs:
        return Needs(teacher=self.kd_weight > 0, only="logits", problem="regression")

    def parts(self, student: Any, teacher: Any, labels: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        _check_given(self, teacher, labels if self.label_weight else True)
        prediction = _one_output("student", student.logits)
        terms = {}
        if self.kd_weight:
            terms["kd"] = self.kd_weight, F.mse_loss(prediction, _one_output("teacher", teacher.logits))
        if self.label_weight:
            terms["label"] = self.label_weight, _squared_error(prediction, labels)
        return weighted_sum(terms)

    def summands(self, student: Any, teacher: Any, labels: Tensor | None, **columns: Tensor) -> dict[str, Tensor]:
        alone = {"kd": replace(self, label_weight=0.0)} if self.kd_weight else {}
        alone |= {"label": replace(self, kd_weight=0.0)} if self.label_weight else {}
        return {name: one(student, teacher, labels) for name, one in alone.items()}


@dataclass(frozen=True)
class TaskLoss(Objective):
    """The task's own loss on labels, with no teacher: cross-entropy, or mean squared error for one output.

    Args:
        label_smoothing: in [0, 1), for cross-entropy; an error for one output.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_number("label_smoothing", self.label_smoothing, minimum=0, below=1)

    @property
    def needs(self) -> Needs:
        return Needs(teacher=False, problem="classification" if self.label_smoothing else None)

    def parts(self, student: Any, teacher: Any, labels: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        _check_given(self, teacher, labels)
        logits = student.logits
        if logits.shape[-1] > 1:
            loss = kd_ce_loss(logits, logits.detach(), labels, kd_weight=0.0, label_smoothing=self.label_smoothing)
        elif self.label_smoothing:
            raise ValueError(f"label_smoothing is {self.label_smoothing} but the student has one output; expected 0")
        else:
            loss = _squared_error(_one_output("student", logits), labels)
        return loss, {}


def _check_weights(**weights: float) -> None:
    for name, weight in weights.items():
        check_number(name, weight, minimum=0)
    if not any(weights.values()):
        raise ValueError(f"{' and '.join(weights)} are both 0; expected a positive one")


def _check_given(objective: Objective, teacher: Any, labels: object) -> None:
    if objective.needs.teacher and teacher is None:
        raise ValueError(f"teacher is None; {objective} needs its outputs")
    if labels is None:
        raise ValueError(f"labels is None; {objective} needs them")


def _one_output(name: str, logits: Tensor) -> Tensor:
    if logits.shape[-1] != 1:
        raise ValueError(f"{name}.logits has shape {tuple(logits.shape)}; expected one output, [..., 1]")
    return logits.squeeze(-1).to(torch.promote_types(logits.dtype, torch.float32))


def _squared_error(prediction: Tensor, labels: Tensor | None) -> Tensor:
    assert labels is not None
    if labels.shape != prediction.shape:
        raise ValueError(f"labels has shape {tuple(labels.shape)}; expected {tuple(prediction.shape)}")
    return F.mse_loss(prediction, labels.to(prediction.dtype))
