"""What a student minimises: small composable losses over (student outputs, teacher outputs, labels).

In a plain loop an objective is called like a function, ``loss = objective(student, teacher, labels)``; inside
`DistillationTrainer` its parts are logged too. Outputs are transformers' ModelOutputs: ``logits`` ``[...,
C]`` and, for an objective that needs them, ``hidden_states``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastdistill.ops.checks import check_number

Problem = Literal["classification", "regression"]
# What the trainer logs under names of its own; a part may not take them.
RESERVED_NAMES = ("loss", "grad_norm", "learning_rate", "epoch", "step", "num_input_tokens_seen")

ATTENTION_MASK = "attention_mask"
"""A column that an objective may need although the models see it too: 1 for tokens, 0 for padding."""


class Objective(ABC):
    """A loss of a student's outputs against a teacher's outputs, labels, or both: the mean over the examples.

    Gradients reach the student and, where its outputs require one, the teacher.
    """

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's outputs are used; where not, ``teacher`` may be None."""
        return True

    @property
    def needs_hidden_states(self) -> bool:
        """Whether the models must be called with ``output_hidden_states=True``."""
        return False

    @property
    def needs_all_tokens(self) -> bool:
        """Whether of hidden states other tokens are used than the first."""
        return self.needs_hidden_states

    @property
    def of_logits(self) -> bool:
        """Whether nothing of the teacher's outputs is used but its logits."""
        return False

    @property
    def of_softmax(self) -> bool:
        """Whether, beside labels, it uses nothing but the probabilities of both: then it stays the same when all logits
        of an example change alike."""
        return False

    @property
    def problem(self) -> Problem | None:
        """The only kind of problem that this objective fits, or None."""
        return None

    @property
    def teachers(self) -> tuple[str, ...]:
        """Where there are several teachers their names, of which the first gives the hidden states: ``teacher`` is
        then a dictionary of their outputs. Empty for one teacher, whose outputs ``teacher`` is."""
        return ()

    @property
    def needs_columns(self) -> tuple[str, ...]:
        """The dataset's columns, beside the labels, that `parts` takes by name. The models see none of them but
        `ATTENTION_MASK`."""
        return ()

    module: nn.Module | None = None
    """What the objective itself learns or remembers: trained, moved and saved in checkpoints with the student."""

    @abstractmethod
    def parts(self, student: Any, teacher: Any, labels: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and what it is made of: detached, unweighted scalars by name, left on their device; the trainer's
        logs have their means, and of integers, which count something, the sums.

        An empty dictionary where the loss is all there is to say."""

    def __call__(self, student: Any, teacher: Any = None, labels: Tensor | None = None, **columns: Tensor) -> Tensor:
        return self.parts(student, teacher, labels, **columns)[0]


class WeightedSum(Objective):
    """A weighted sum of objectives, each logged by its name: ``WeightedSum({"kd": (0.7, LogitsKD()), ...})``.

    Args:
        terms: name -> (weight, objective). A weight is >= 0 and one of them positive; a term with weight 0 is
            neither computed nor logged. An objective may be any function of (student, teacher, labels).

    Raises ValueError or TypeError for bad names, weights or objectives, and where one objective is for
    classification and another for regression, or for other teachers than another.
    """

    def __init__(self, terms: Mapping[str, tuple[float, Objective | LossFunction]]) -> None:
        self.terms: dict[str, tuple[float, Objective]] = {}
        for name, (weight, objective) in terms.items():
            if not isinstance(name, str) or not name or name in RESERVED_NAMES:
                raise ValueError(f"terms has the name {name!r}; expected a text, not {', '.join(RESERVED_NAMES)}")
            check_number(f"the weight of terms[{name!r}]", weight, minimum=0)
            if weight:
                self.terms[name] = weight, as_objective(objective)
        if not self.terms:
            raise ValueError("terms has no positive weight; expected at least one")
        problems = {name: o.problem for name, (_, o) in self.terms.items() if o.problem is not None}
        if len(set(problems.values())) > 1:
            raise ValueError(f"terms mixes kinds of problem: {problems}; expected one kind")
        self._problem = next(iter(problems.values()), None)
        teachers = {name: o.teachers for name, (_, o) in self.terms.items() if o.needs_teacher}
        if len(set(teachers.values())) > 1:
            raise ValueError(f"terms mixes teachers: {teachers}; expected the same ones, or one teacher, in all")
        self._teachers = next(iter(teachers.values()), ())
        modules = [o.module for _, o in self.terms.values() if o.module is not None]
        self.module = nn.ModuleList(modules) if modules else None

    def __repr__(self) -> str:
        return f"WeightedSum({self.terms})"

    @property
    def needs_teacher(self) -> bool:
        return any(objective.needs_teacher for _, objective in self.terms.values())

    @property
    def needs_hidden_states(self) -> bool:
        return any(objective.needs_hidden_states for _, objective in self.terms.values())

    @property
    def needs_all_tokens(self) -> bool:
        return any(objective.needs_all_tokens for _, objective in self.terms.values())

    @property
    def of_logits(self) -> bool:
        return all(objective.of_logits for _, objective in self.terms.values() if objective.needs_teacher)

    @property
    def of_softmax(self) -> bool:
        return all(objective.of_softmax for _, objective in self.terms.values() if objective.needs_teacher)

    @property
    def problem(self) -> Problem | None:
        return self._problem

    @property
    def teachers(self) -> tuple[str, ...]:
        return self._teachers

    @property
    def needs_columns(self) -> tuple[str, ...]:
        return tuple({column: None for _, objective in self.terms.values() for column in objective.needs_columns})

    def parts(
        self, student: Any, teacher: Any, labels: Tensor | None, **columns: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return weighted_sum(
            {
                name: (weight, term(student, teacher, labels, **{c: columns[c] for c in term.needs_columns}))
                for name, (weight, term) in self.terms.items()
            }
        )


LossFunction = Callable[[Any, Any, Tensor | None], Tensor]


@dataclass(frozen=True)
class _Function(Objective):
    function: LossFunction
    names: tuple[str, ...]

    @property
    def needs_all_tokens(self) -> bool:
        return True  # for all that is known

    @property
    def teachers(self) -> tuple[str, ...]:
        return self.names

    def parts(self, student: Any, teacher: Any, labels: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        return self.function(student, teacher, labels), {}


def as_objective(objective: Objective | LossFunction, teachers: tuple[str, ...] = ()) -> Objective:
    """An objective as it is; any other function of (student, teacher, labels) as one that needs a teacher, or these
    `teachers`."""
    if isinstance(objective, Objective):
        return objective
    if isinstance(objective, type) or not callable(objective):
        raise TypeError(
            f"objective is {objective!r}; expected an Objective, or a function of (student, teacher, labels)"
        )
    return _Function(objective, teachers)


def weighted_sum(terms: Mapping[str, tuple[float, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of weight * loss, and the losses by name, detached."""
    total = torch.stack([weight * loss for weight, loss in terms.values()]).sum()
    return total, {name: loss.detach() for name, (_, loss) in terms.items()}
