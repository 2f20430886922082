"""TinyBERT's objective: attention maps, hidden states and embeddings, and the prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastdistill.objectives.base import ATTENTION_MASK, Needs, Objective, WeightedSum, check_teacher
from fastdistill.objectives.distilbert import OneLabel
from fastdistill.objectives.logits import LogitsKD, TaskLoss
from fastdistill.objectives.pkd import check_pairs, hidden_states, layer_pairs, projections
from fastdistill.objectives.tokens import mean_of, real_tokens
from fastdistill.ops.checks import check_choice

Pairs = Literal["all"] | Sequence[tuple[int, int]]


class TinyBERT(WeightedSum):
    r"""The losses of TinyBERT (Jiao et al. 2020, equations 7 to 10), added up as in its equation 6.

    .. math::
        \ell = w_a \sum_{m \ge 1} \frac{1}{B} \sum_b \frac{\|A^s_{m,b} - A^t_{g(m),b}\|^2}{H n_b^2}
        + w_h \sum_{m \ge 0} \frac{1}{B} \sum_b \frac{\|H^s_{m,b} W - H^t_{g(m),b}\|^2}{n_b d}
        - w_p\,\frac{1}{B} \sum_b \sum_c p^\tau_{t,bc} \log p^\tau_{s,bc}

    with :math:`A` the scores of H heads before the softmax and :math:`H` the hidden states of an example's
    :math:`n_b` tokens, layer 0 the embeddings; a student's layer m learns from the teacher's :math:`g(m)`. Padding
    counts nowhere.

    Args:
        temperature: :math:`\tau` > 0 of the prediction, 1 in the paper; no factor :math:`\tau^2` stands before it.
        attention_weight, hidden_weight, prediction_weight: >= 0, not all 0; all 1 in the paper.
        pairs: (m, g(m)), counted from 1, with 0 for the embeddings. "all" is the paper's uniform map: the embeddings,
            and each of a student's k layers with every (L/k)-th of a teacher's L.
        widths: where the student's and the teacher's hidden sizes differ, those two numbers: W is then a learned linear
            map, in `module`, one for all layers as in the published code. Without, there is none.
        problem: "classification", or "regression", where, as in the code, the prediction's term is the squared error
            from the label.

    Its parts are "attention", "hidden" and "prediction". It takes the column "attention_mask" ``[B, S]``, 0 for
    padding. `DistillationTrainer` runs both models with attention of plain operations, which gives their scores; in a
    plain loop ``attentions`` of both outputs must be those, as `fastdistill.models.attention_scores.call` gives them,
    or both probabilities. Stored teachers have none, and are refused.

    The code first trains by the first two terms alone and then, anew, by the third; that is two trainings with weights
    of 0. It counts padding, as zeros, and has the mean of the third over classes, too.

    Raises ValueError or TypeError for arguments out of their range, for layers that a model does not have, for other
    hidden sizes than `widths`, and for layers of different numbers of heads.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        attention_weight: float = 1.0,
        hidden_weight: float = 1.0,
        prediction_weight: float = 1.0,
        *,
        pairs: Pairs = "all",
        widths: tuple[int, int] | None = None,
        problem: OneLabel = "classification",
    ) -> None:
        check_choice("problem", problem, get_args(OneLabel))
        soft = LogitsKD(temperature, ce_weight=0.0, divergence="soft_ce", scale_by_temperature=False)
        super().__init__(
            {
                "attention": (attention_weight, AttentionMSE(pairs)),
                "hidden": (hidden_weight, HiddenMSE(pairs, widths)),
                "prediction": (prediction_weight, soft if problem == "classification" else TaskLoss()),
            }
        )


@dataclass(frozen=True)
class AttentionMSE(Objective):
    """The term "attention" of `TinyBERT`, of which pairs with the embeddings have none."""

    pairs: Pairs = "all"

    def __post_init__(self) -> None:
        check_pairs(self.pairs, ("all",))
        if not isinstance(self.pairs, str) and any(j == 0 for i, j in self.pairs if i):
            raise ValueError(f"pairs is {self.pairs!r}; expected layers with layers: embeddings have no attention")

    on_host = None

    @property
    def needs(self) -> Needs:
        return Needs(attentions=True, all_tokens=True, columns=(ATTENTION_MASK,), labels=False)

    def parts(
        self, student: Any, teacher: Any, labels: Tensor | None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        check_teacher(self, teacher)
        ours, theirs = _attentions("student", student), _attentions("teacher", teacher)
        real = real_tokens(ours[0][:, 0], theirs[0][:, 0], attention_mask, "attentions")
        counted = real[:, :, None] & real[:, None, :]
        total = torch.zeros((), dtype=_dtype(ours[0]), device=real.device)
        for i, j in layer_pairs(self.pairs, len(ours), len(theirs)):
            if i:
                s, t = ours[i - 1].to(total.dtype), theirs[j - 1].to(total.dtype)
                if s.shape != t.shape:
                    raise ValueError(
                        f"the student's layer {i} has {s.shape[1]} heads and the teacher's layer {j} {t.shape[1]}; "
                        "expected as many, or attention_weight=0"
                    )
                squares = (s - t).masked_fill(~counted[:, None], 0).square().mean(1)  # what is masked may be infinite
                total = total + mean_of(squares.flatten(1), counted.flatten(1)).mean()
        return total, {}


@dataclass(eq=False)
class HiddenMSE(Objective):
    """The term "hidden" of `TinyBERT`."""

    pairs: Pairs = "all"
    widths: tuple[int, int] | None = None
    module: nn.ModuleList | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_pairs(self.pairs, ("all",))
        self.module = None if self.widths is None else projections(self.widths, 1)

    on_host = None

    @property
    def needs(self) -> Needs:
        return Needs(hidden_states=True, columns=(ATTENTION_MASK,), labels=False)

    def parts(
        self, student: Any, teacher: Any, labels: Tensor | None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        check_teacher(self, teacher)
        ours, theirs = hidden_states("student", student), hidden_states("teacher", teacher)
        real = real_tokens(ours[0], theirs[0], attention_mask)
        given, wanted = (ours[0].shape[-1], theirs[0].shape[-1]), self.widths
        if given != wanted and (wanted is not None or given[0] != given[1]):
            raise ValueError(
                f"the student's hidden size is {given[0]} and the teacher's {given[1]}, but widths is {wanted}; "
                f"expected widths={given if given[0] != given[1] else None}"
            )
        total = torch.zeros((), dtype=_dtype(ours[0]), device=real.device)
        for i, j in layer_pairs(self.pairs, len(ours) - 1, len(theirs) - 1):
            states = ours[i] if self.module is None else self.module[0](ours[i])
            difference = states.to(total.dtype) - theirs[j].to(total.dtype)
            total = total + mean_of(difference.square().mean(-1), real).mean()
        return total, {}


def _attentions(name: str, outputs: Any) -> Sequence[Tensor]:
    """Of every layer, ``[B, H, S, S]``; ValueError if the model did not give them."""
    maps: Sequence[Tensor] | None = getattr(outputs, "attentions", None)
    if not maps:
        raise ValueError(
            f"{name} has no attentions, which stored outputs never have; call the model by "
            "fastdistill.models.attention_scores.call, with output_attentions=True"
        )
    return maps


def _dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
