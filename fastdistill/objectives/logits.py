"""Losses of logits and labels: distillation of classes, of one output, of many labels, and the task's own loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.models.heads import IGNORED
from fastdistill.objectives.base import Needs, Objective, check_teacher, counting, weighted_sum
from fastdistill.ops.checks import check_bool, check_choice, check_number
from fastdistill.ops.kd_ce_loss import DIVERGENCES, Divergence, kd_ce_loss


@dataclass(frozen=True)
class LogitsKD(Objective):
    """Distillation of class logits plus cross-entropy on hard labels: `fastdistill.kd_ce_loss`, which see.

    Args:
        temperature, kd_weight, ce_weight, divergence, scale_by_temperature, label_smoothing: as there.
        vocab: "common" where the last tokens of one vocabulary are the other's padding, or lack there: of logits
            ``[..., C]`` of other sizes the distillation term sees as many of the first as both have, each with a
            softmax of these alone. Cross-entropy is of all.

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
    vocab: Literal["same", "common"] = "same"

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, above=0)
        check_weights(kd_weight=self.kd_weight, ce_weight=self.ce_weight)
        check_choice("divergence", self.divergence, DIVERGENCES)
        check_choice("vocab", self.vocab, ("same", "common"))
        if not isinstance(self.scale_by_temperature, bool):
            raise TypeError(f"scale_by_temperature is {self.scale_by_temperature!r}; expected True or False")
        check_number("label_smoothing", self.label_smoothing, minimum=0, below=1)
        if self.label_smoothing and not self.ce_weight:
            raise ValueError(f"label_smoothing is {self.label_smoothing} but ce_weight is 0; expected 0 as well")

    on_host = None

    @property
    def needs(self) -> Needs:
        return Needs(
            teacher=self.kd_weight > 0,
            only="probabilities",
            problem="classification",
            labels=self.ce_weight > 0,
            vocab=self.vocab,
        )

    def parts(self, student: Any, teacher: Any, labels: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        check_given(self, teacher, labels if self.ce_weight else True)
        teacher_logits = teacher.logits if self.kd_weight else None
        if (
            teacher_logits is not None
            and self.vocab == "common"
            and teacher_logits.shape[-1] != student.logits.shape[-1]
        ):
            return weighted_sum(self._apart(student, teacher_logits, labels))
        loss, kd, ce = kd_ce_loss(
            student.logits,
            teacher_logits,
            counting(student, labels),
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            divergence=self.divergence,
            scale_by_temperature=self.scale_by_temperature,
            label_smoothing=self.label_smoothing,
            return_terms=True,
        )
        return loss, ({"kd": kd} if self.kd_weight else {}) | ({"ce": ce} if self.ce_weight else {})

    def _apart(self, student: Any, teacher: Tensor, labels: Tensor | None) -> dict[str, tuple[float, Tensor]]:
        """The two terms, of which distillation is of the classes that both have."""
        logits = student.logits
        common = min(logits.shape[-1], teacher.shape[-1])
        counted = counting(student, labels)
        kd = kd_ce_loss(
            logits[..., :common],
            teacher[..., :common],
            None if counted is None else torch.where(counted == IGNORED, IGNORED, 0),
            temperature=self.temperature,
            ce_weight=0.0,
            divergence=self.divergence,
            scale_by_temperature=self.scale_by_temperature,
        )
        terms = {"kd": (self.kd_weight, kd)}
        if self.ce_weight:
            smoothing = self.label_smoothing
            ce = kd_ce_loss(logits, None, labels, kd_weight=0.0, label_smoothing=smoothing)
            terms["ce"] = self.ce_weight, ce
        return terms

    def summands(self, student: Any, teacher: Any, labels: Tensor | None, **columns: Tensor) -> dict[str, Tensor]:
        alone = {"kd": replace(self, ce_weight=0.0, label_smoothing=0.0)} if self.kd_weight else {}
        alone |= {"ce": replace(self, kd_weight=0.0)} if self.ce_weight else {}
        return {name: one(student, teacher, labels) for name, one in alone.items()}


@dataclass(frozen=True)
class MSE(Objective):
    r"""Regression: :math:`w_{kd}\,(z_s - z_t)^2 + w_y\,(z_s - y)^2` for one output :math:`z`.

    Args:
        kd_weight, label_weight: >= 0, not both 0. With a weight of 0 the teacher or the labels may be None.

    An example whose label is NaN counts in neither term; of none that count, the loss is 0. Its parts are "kd" and
    "label". Raises ValueError for logits of more than one output, ``[..., 1]``, and
    for labels of another shape than ``[...]``.
    """

    kd_weight: float = 1.0
    label_weight: float = 1.0

    def __post_init__(self) -> None:
        check_weights(kd_weight=self.kd_weight, label_weight=self.label_weight)

    on_host = None

    @property
    def needs(self) -> Needs:
        return Needs(teacher=self.kd_weight > 0, only="logits", problem="regression", labels=self.label_weight > 0)

    def parts(self, student: Any, teacher: Any, labels: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        check_given(self, teacher, labels if self.label_weight else True)
        prediction = _one_output("student", student.logits)
        terms = {}
        if self.kd_weight:
            answer = _one_output("teacher", teacher.logits)
            terms["kd"] = self.kd_weight, _mean(F.mse_loss(prediction, answer, reduction="none"), labels)
        if self.label_weight:
            terms["label"] = self.label_weight, _squared_error(prediction, labels)
        return weighted_sum(terms)

    def summands(self, student: Any, teacher: Any, labels: Tensor | None, **columns: Tensor) -> dict[str, Tensor]:
        alone = {"kd": replace(self, label_weight=0.0)} if self.kd_weight else {}
        alone |= {"label": replace(self, kd_weight=0.0)} if self.label_weight else {}
        return {name: one(student, teacher, labels) for name, one in alone.items()}


@dataclass(frozen=True)
class MultiLabelKD(Objective):
    r"""Several labels an example, each there or not: distillation of every sigmoid, plus binary cross-entropy.

    .. math::
        \ell = w_{kd}\,\tau^2\,\frac{1}{BC}\sum_{b,c} D\big(\sigma(z^t_{bc}/\tau), \sigma(z^s_{bc}/\tau)\big)
        + w_{bce}\,\mathrm{BCE}(\sigma(z^s), y)

    with D the divergence of two probabilities and their complements, by `fastdistill.kd_ce_loss` of logits (0, z).

    Args:
        kd_weight, bce_weight: >= 0, not both 0. With a weight of 0 the teacher or the labels may be None.
        temperature, divergence, scale_by_temperature: as of `fastdistill.kd_ce_loss`.

    ``logits [B, C]``, ``labels [B, C]`` from 0 to 1. A label that is NaN or -100 counts in neither term, nor in the
    mean. Its parts are "kd" and "bce". Raises ValueError for other shapes.
    """

    temperature: float = 2.0
    kd_weight: float = 1.0
    bce_weight: float = 1.0
    divergence: Divergence = "forward_kl"
    scale_by_temperature: bool = True

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, above=0)
        check_weights(kd_weight=self.kd_weight, bce_weight=self.bce_weight)
        check_choice("divergence", self.divergence, DIVERGENCES)
        check_bool("scale_by_temperature", self.scale_by_temperature)

    on_host = None

    @property
    def needs(self) -> Needs:
        return Needs(teacher=self.kd_weight > 0, only="logits", problem="multi_label", labels=self.bce_weight > 0)

    def parts(self, student: Any, teacher: Any, labels: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        check_given(self, teacher, labels if self.bce_weight else True)
        if labels is not None:
            labels = _of_each_class(student.logits, labels)
        terms = {}
        if self.kd_weight:
            kd = kd_ce_loss(
                _with_complement(student.logits),
                _with_complement(teacher.logits),
                None if labels is None else torch.where(labels == labels, 0, IGNORED),
                temperature=self.temperature,
                ce_weight=0.0,
                divergence=self.divergence,
                scale_by_temperature=self.scale_by_temperature,
            )
            terms["kd"] = self.kd_weight, kd
        if self.bce_weight:
            assert labels is not None
            terms["bce"] = self.bce_weight, _binary_cross_entropy(student.logits, labels)
        return weighted_sum(terms)

    def summands(self, student: Any, teacher: Any, labels: Tensor | None, **columns: Tensor) -> dict[str, Tensor]:
        alone = {"kd": replace(self, bce_weight=0.0)} if self.kd_weight else {}
        alone |= {"bce": replace(self, kd_weight=0.0)} if self.bce_weight else {}
        return {name: one(student, teacher, labels) for name, one in alone.items()}


@dataclass(frozen=True)
class TaskLoss(Objective):
    """The task's own loss on labels, with no teacher: cross-entropy; mean squared error for one output; binary
    cross-entropy for labels that are numbers, ``[B, C]`` as the logits.

    Args:
        label_smoothing: in [0, 1), for cross-entropy; an error otherwise.

    A label that is NaN, or of classes -100, does not count.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_number("label_smoothing", self.label_smoothing, minimum=0, below=1)

    on_host = None

    @property
    def needs(self) -> Needs:
        return Needs(teacher=False, problem="classification" if self.label_smoothing else None, labels=True)

    def parts(self, student: Any, teacher: Any, labels: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        check_given(self, teacher, labels)
        logits = student.logits
        assert labels is not None
        is_multi_label = labels.is_floating_point() and logits.shape[-1] > 1
        if is_multi_label and not self.label_smoothing:
            loss = _binary_cross_entropy(logits, _of_each_class(logits, labels))
        elif is_multi_label:
            raise ValueError(f"label_smoothing is {self.label_smoothing} but labels are {labels.dtype}; expected 0")
        elif logits.shape[-1] > 1:
            loss = kd_ce_loss(logits, None, labels, kd_weight=0.0, label_smoothing=self.label_smoothing)
        elif self.label_smoothing:
            raise ValueError(f"label_smoothing is {self.label_smoothing} but the student has one output; expected 0")
        else:
            loss = _squared_error(_one_output("student", logits), labels)
        return loss, {}


def check_weights(**weights: float) -> None:
    for name, weight in weights.items():
        check_number(name, weight, minimum=0)
    if not any(weights.values()):
        raise ValueError(f"{' and '.join(weights)} are both 0; expected a positive one")


def check_given(objective: Objective, teacher: Any, labels: object) -> None:
    if objective.needs.teacher:
        check_teacher(objective, teacher)
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
    squares = F.mse_loss(prediction, labels.to(prediction.dtype).nan_to_num(), reduction="none")
    return _mean(squares, labels)


def _mean(values: Tensor, labels: Tensor | None) -> Tensor:
    """Over those whose label is not NaN; of none it is 0."""
    if labels is None:
        return values.mean()
    there = labels == labels
    return torch.where(there, values, 0.0).sum() / there.sum().clamp(min=1)


def _of_each_class(logits: Tensor, labels: Tensor) -> Tensor:
    """Labels ``[B, C]`` in the dtype that losses are computed in, NaN where there is none."""
    if labels.shape != logits.shape:
        raise ValueError(f"labels has shape {tuple(labels.shape)}; expected {tuple(logits.shape)}, one for each class")
    return labels.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(labels == IGNORED, torch.nan)


def _with_complement(logits: Tensor) -> Tensor:
    """Two logits for each, whose softmax is its sigmoid's complement and its sigmoid."""
    return torch.stack([torch.zeros_like(logits), logits], -1)


def _binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    each = F.binary_cross_entropy_with_logits(logits.to(labels.dtype), labels.nan_to_num(), reduction="none")
    return _mean(each, labels)
