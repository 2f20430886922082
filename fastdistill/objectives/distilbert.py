"""DistilBERT's objective: soft targets, hard labels, and the direction of hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.objectives.base import ATTENTION_MASK, Needs, Objective, WeightedSum, check_teacher
from fastdistill.objectives.logits import MSE, LogitsKD, TaskLoss
from fastdistill.objectives.pkd import hidden_states
from fastdistill.objectives.tokens import mean_of, real_tokens
from fastdistill.ops.checks import check_choice

OneLabel = Literal["classification", "regression"]


class DistilBERT(WeightedSum):
    r"""The triple loss of DistilBERT (Sanh et al. 2019, section 3), with the weights of its published code.

    .. math::
        \ell = w_{kd}\,\tau^2\,\mathrm{KL}(p_t^\tau \,\|\, p_s^\tau) + w_{ce}\,\mathrm{CE}
        + w_{cos}\,\frac{1}{B}\sum_b \frac{1}{n_b}\sum_{i \le n_b} \big(1 - \cos(h^s_{bi}, h^t_{bi})\big)

    with :math:`h` the last layer's hidden state of each of an example's :math:`n_b` tokens. Padding counts nowhere.

    Args:
        temperature: :math:`\tau` > 0.
        kd_weight, ce_weight, cos_weight: >= 0, not all 0. The code's are 5, 2 and 1, the second of masked language
            modelling, which the labels' cross-entropy stands for.
        label_smoothing: in [0, 1), of the hard labels.
        problem: "classification", or "regression": of one output the first two terms are squared errors, from the
            teacher's and from the label.

    Its parts are "kd", "ce" and "cos". It takes the column "attention_mask" ``[B, S]``, 0 for padding, and both models'
    hidden states of all tokens: stored ones, which have the first alone, are refused. The code takes the mean over all
    tokens of a batch at once; here it is the mean over examples, so that micro-batches add up to the batch.

    Raises ValueError or TypeError for arguments out of their range, and for hidden sizes that differ.
    """

    def __init__(
        self,
        temperature: float = 2.0,
        kd_weight: float = 5.0,
        ce_weight: float = 2.0,
        cos_weight: float = 1.0,
        *,
        label_smoothing: float = 0.0,
        problem: OneLabel = "classification",
    ) -> None:
        check_choice("problem", problem, get_args(OneLabel))
        soft = LogitsKD(temperature, ce_weight=0.0) if problem == "classification" else MSE(label_weight=0.0)
        super().__init__(
            {
                "kd": (kd_weight, soft),
                "ce": (ce_weight, TaskLoss(label_smoothing)),
                "cos": (cos_weight, CosineStates()),
            }
        )


@dataclass(frozen=True)
class CosineStates(Objective):
    """The term "cos" of `DistilBERT`."""

    on_host = None

    @property
    def needs(self) -> Needs:
        return Needs(hidden_states=True, columns=(ATTENTION_MASK,), labels=False)

    def parts(
        self, student: Any, teacher: Any, labels: Tensor | None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        check_teacher(self, teacher)
        ours, theirs = hidden_states("student", student)[-1], hidden_states("teacher", teacher)[-1]
        real = real_tokens(ours, theirs, attention_mask)
        if ours.shape != theirs.shape:
            raise ValueError(
                f"the student's hidden size is {ours.shape[-1]} and the teacher's {theirs.shape[-1]}; expected the "
                "same, between which there is an angle"
            )
        dtype = torch.promote_types(torch.promote_types(ours.dtype, theirs.dtype), torch.float32)
        s, t = (states.to(dtype).masked_fill(~real[..., None], 0) for states in (ours, theirs))
        return mean_of(1 - F.cosine_similarity(s, t, dim=-1), real).mean(), {}
