"""Decoupled distillation of class logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fastdistill.objectives.base import Needs, Objective
from fastdistill.objectives.logits import check_given, check_weights
from fastdistill.ops.checks import check_bool, check_choice, check_number
from fastdistill.ops.distillation import DIVERGENCES, Divergence
from fastdistill.ops.dkd_loss import dkd_loss


@dataclass(frozen=True)
class DKD(Objective):
    """Decoupled distillation (Zhao et al. 2022) of class logits, of the target's class and of the others apart, plus
    cross-entropy on hard labels: `fastdistill.dkd_loss`, which see.

    Args:
        alpha, beta: of TCKD and NCKD; the temperature, too, is that of the released code on CIFAR-100.
        temperature, kd_weight, ce_weight, divergence, scale_by_temperature, label_smoothing: as there.

    Its parts are "tckd" and "nckd", with their temperature factor, and "ce"; their weights in the loss are kd_weight
    times alpha and beta, and ce_weight, and a term whose weight is 0 is no part. With a kd_weight of 0 the teacher may
    be None; labels may not, which say what the target is. Raises TypeError or ValueError for an argument out of its
    range.
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0
    kd_weight: float = 1.0
    ce_weight: float = 1.0
    divergence: Divergence = "forward_kl"
    scale_by_temperature: bool = True
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_weights(alpha=self.alpha, beta=self.beta)
        check_weights(kd_weight=self.kd_weight, ce_weight=self.ce_weight)
        check_number("temperature", self.temperature, above=0)
        check_choice("divergence", self.divergence, DIVERGENCES)
        check_bool("scale_by_temperature", self.scale_by_temperature)
        check_number("label_smoothing", self.label_smoothing, minimum=0, below=1)
        if self.label_smoothing and not self.ce_weight:
            raise ValueError(f"label_smoothing is {self.label_smoothing} but ce_weight is 0; expected 0 as well")

    on_host = None

    @property
    def needs(self) -> Needs:
        return Needs(teacher=self.kd_weight > 0, only="probabilities", problem="classification", labels=True)

    @property
    def _weights(self) -> dict[str, float]:
        return {"tckd": self.kd_weight * self.alpha, "nckd": self.kd_weight * self.beta, "ce": self.ce_weight}

    def parts(self, student: Any, teacher: Any, labels: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        check_given(self, teacher, labels)
        assert labels is not None
        loss, *terms = dkd_loss(
            student.logits,
            teacher.logits if self.kd_weight else None,
            labels,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            divergence=self.divergence,
            scale_by_temperature=self.scale_by_temperature,
            label_smoothing=self.label_smoothing,
            return_terms=True,
        )
        return loss, {name: term for (name, weight), term in zip(self._weights.items(), terms, strict=True) if weight}

    def summands(self, student: Any, teacher: Any, labels: Tensor | None, **columns: Tensor) -> dict[str, Tensor]:
        distillation = replace(self, ce_weight=0.0, label_smoothing=0.0) if self.kd_weight else self
        alone: dict[str, DKD] = {}
        if self._weights["tckd"]:
            alone["tckd"] = replace(distillation, beta=0.0)
        if self._weights["nckd"]:
            alone["nckd"] = replace(distillation, alpha=0.0)
        if self.ce_weight:
            alone["ce"] = replace(self, kd_weight=0.0)
        return {name: one(student, teacher, labels) for name, one in alone.items()}
