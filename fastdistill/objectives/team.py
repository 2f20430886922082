"""Objectives of several teachers: their mean, their sum weighted by how well each knows the label, one at random.

All take the teachers by name, as `fastdistill.DistillationTrainer` gives them (models, or the columns that
`fastdistill.TeacherTeam.store` makes); in a plain loop ``teacher`` is {name: outputs}. Where there are labels,
examples with the label -100 count neither in the loss nor in the mean over the examples, as in `kd_ce_loss`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastdistill.objectives.base import Needs, Objective, counting
from fastdistill.ops import kd_ce_loss
from fastdistill.ops.checks import check_number
from fastdistill.ops.kd_ce_loss import Reduction
from fastdistill.teachers.outputs import DRAWN, LOGITS, check_name, run


@dataclass(frozen=True)
class _OfTeam(Objective):
    names: tuple[str, ...]
    temperature: float = 1.0
    _labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.names, tuple) or not all(isinstance(name, str) for name in self.names):
            raise TypeError(f"names is {self.names!r}; expected a tuple of the teachers' names")
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"names is {self.names!r}; expected one or more different names")
        for name in self.names:
            check_name("names has", name)
        check_number("temperature", self.temperature, above=0)

    on_host = None

    @property
    def needs(self) -> Needs:
        return Needs(teachers=self.names, only="logits", problem="classification", labels=self._labels)

    def _team(self, teacher: Any) -> list[Tensor]:
        if teacher is None or any(name not in teacher for name in self.names):
            given = "None" if teacher is None else f"of {', '.join(teacher)}"
            raise ValueError(f"teacher is {given}; expected a dictionary of the outputs of {', '.join(self.names)}")
        return [teacher[name].logits for name in self.names]

    def _soft_ce(
        self, student: Any, teacher_logits: Tensor, labels: Tensor | None, reduction: Reduction = "mean"
    ) -> Tensor:
        return kd_ce_loss(
            student.logits,
            teacher_logits,
            counting(student, labels),
            temperature=self.temperature,
            divergence="soft_ce",
            ce_weight=0.0,
            reduction=reduction,
        )

    def _mixture(self, team: list[Tensor], log_weights: Tensor | None = None) -> Tensor:
        """Logits whose softmax at this temperature is the mean of the teachers', weighted by ``[n, ...]``."""
        logits = torch.stack(team)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_p = torch.log_softmax(logits / self.temperature, -1)
        return self.temperature * (log_p if log_weights is None else log_p + log_weights.unsqueeze(-1)).logsumexp(0)


@dataclass(frozen=True)
class AvgKD(_OfTeam):
    r"""The mean of the teachers' soft targets as one target (Hinton et al. 2015, section 3, as AutoSKDBERT's AvgKD):

    .. math::
        \tau^2\,\mathrm{CE}\Big(\frac1n \sum_i p_{t_i}^\tau,\; p_s^\tau\Big)

    which is the mean of the teachers' soft cross-entropies. Labels only say which examples (-100) do not count.
    With one name it is plain distillation.

    Args:
        names: the teachers'; one or more.
        temperature: tau > 0, on both sides.

    Raises TypeError or ValueError for wrong arguments, and where a teacher's outputs are missing.
    """

    _labels: ClassVar[bool] = False

    def parts(self, student: Any, teacher: Any, labels: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        return self._soft_ce(student, self._mixture(self._team(teacher)), labels), {}


@dataclass(frozen=True)
class MTBERT(_OfTeam):
    r"""Teachers weighted, example by example, by how well each knows the label (MT-BERT, Wu et al. 2021; the
    distillation term alone, as in AutoSKDBERT, appendix H):

    .. math::
        \sum_i \frac{\tau^2\,\mathrm{CE}(p_{t_i}^\tau, p_s^\tau)}{1 + \mathrm{CE}(y, p_{t_i})}

    averaged over the examples whose label is not -100; the weight is at temperature 1 and a constant.

    Args:
        names: the teachers'; one or more.
        temperature: tau > 0, on both sides.

    Raises TypeError or ValueError for wrong arguments, and where labels or a teacher's outputs are missing.
    """

    def parts(self, student: Any, teacher: Any, labels: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        if labels is None:
            raise ValueError(f"labels is None; {self} needs them")
        team = self._team(teacher)
        with torch.no_grad():
            weights = torch.stack([1 / (1 + _cross_entropy(logits, labels)) for logits in team])
        # Soft cross-entropy is linear in the target: one call for the weighted mean of targets, times their sum.
        target = self._mixture(team, (weights / weights.sum(0)).log())
        losses = weights.sum(0) * self._soft_ce(student, target, labels, reduction="none")
        return losses.sum() / labels.ne(-100).sum(), {}


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return kd_ce_loss(logits, None, labels, kd_weight=0.0, reduction="none")


@dataclass(frozen=True)
class SampledTeacher(Objective):
    r"""Each call samples one teacher :math:`i \sim \mathrm{Cat}(\theta)` and distils its logits as they are
    (AutoSKDBERT, equation 1 and section 3.3): :math:`\tau^2\,\mathrm{CE}(p_{t_i}^\tau, p_s^\tau)`.

    A teacher that is a model runs only when it is sampled. The generator is the objective's own: draws depend on `seed`
    and on how often it was called, and its state is saved in checkpoints, so that a resumed run goes on with the same
    teachers. All processes draw the same. With accumulated gradients each micro-batch draws anew. Examples with the
    label -100 do not count.

    Args:
        theta: name -> probability, >= 0; they sum to 1 (within 1e-4, and are divided by their sum).
        temperature: tau > 0, on both sides.
        seed: of the draws.

    An instance is for one training. Raises TypeError or ValueError for a theta that is no distribution, and where a
    teacher's outputs are missing.
    """

    theta: Mapping[str, float]
    temperature: float = 1.0
    seed: int = 0
    module: Draws = field(init=False, repr=False, compare=False)
    on_host = None

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, above=0)
        if not isinstance(self.theta, Mapping) or not self.theta:
            raise TypeError(f"theta is {self.theta!r}; expected a dictionary of names and probabilities")
        for name, probability in self.theta.items():
            check_name("theta has the name", name)
            check_number(f"theta[{name!r}]", probability, minimum=0)
        if abs(sum(self.theta.values()) - 1) > 1e-4:
            raise ValueError(f"theta sums to {sum(self.theta.values())!r}; expected 1")
        object.__setattr__(self, "module", Draws(self.seed))

    @property
    def needs(self) -> Needs:
        return Needs(teachers=tuple(self.theta), only="logits", lazily=True, problem="classification", labels=True)

    def decided(self, inputs: Mapping[str, Any]) -> tuple[Objective, Mapping[str, Any]]:
        """What is left is to learn from the teacher that it draws: of those that are columns under one name."""
        drawn = self._draw()
        if drawn + LOGITS not in inputs:
            return AvgKD((drawn,), self.temperature), inputs
        stored = {name + LOGITS for name in self.theta}
        others = {name: column for name, column in inputs.items() if name not in stored}
        return AvgKD((DRAWN,), self.temperature), {**others, DRAWN + LOGITS: inputs[drawn + LOGITS]}

    def parts(self, student: Any, teacher: Any, labels: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        drawn = self._draw()
        theirs = teacher and {name: run(one) if name == drawn else one for name, one in teacher.items()}
        return AvgKD((drawn,), self.temperature).parts(student, theirs, labels)

    def _draw(self) -> str:
        return tuple(self.theta)[self.module.draw(torch.tensor(list(self.theta.values()), dtype=torch.float64))]


class Draws(nn.Module):
    """A generator whose state is saved and loaded with a module's."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, theta: Tensor) -> int:
        """A place in theta, ``[n]`` on the CPU, with its probability."""
        return int(torch.multinomial(theta, 1, generator=self.generator))

    def get_extra_state(self) -> Tensor:
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state.cpu())
