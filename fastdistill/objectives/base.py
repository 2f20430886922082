"""What a student minimises: small composable losses over (student outputs, teacher outputs, labels).

In a plain loop an objective is called like a function, ``loss = objective(student, teacher, labels)``; inside
`DistillationTrainer` its parts are logged too. Outputs are transformers' ModelOutputs: ``logits`` ``[...,
C]`` and, for an objective that needs them, ``hidden_states``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastdistill.models.heads import Problem
from fastdistill.ops.checks import check_number
from fastdistill.teachers.outputs import run

# What the trainer logs under names of its own; a part may not take them.
RESERVED_NAMES = ("loss", "grad_norm", "learning_rate", "epoch", "step", "num_input_tokens_seen")

ATTENTION_MASK = "attention_mask"
"""A column that an objective may need although the models see it too: 1 for tokens, 0 for padding."""


@dataclass(frozen=True)
class Needs:
    """What an objective uses, beside the student's outputs and the labels.

    Attributes:
        teacher: a teacher's outputs; where not, ``teacher`` may be None.
        teachers: where there are several teachers their names, of which the first gives the hidden states: ``teacher``
            is then a dictionary of their outputs. Empty for one teacher, whose outputs ``teacher`` is.
        only: "logits" where nothing of the teacher's outputs is used but its logits; "probabilities" where, beside
            labels, nothing is used but the probabilities of both: the loss then stays the same when all logits of an
            example change alike.
        hidden_states: the models must be called with ``output_hidden_states=True``.
        attentions: outputs must have each layer's attention scores, as `fastdistill.models.attention_scores.call` gives
            them.
        all_tokens: other tokens than the first matter; by default where hidden states or attention are used.
        lazily: ``teacher`` is to be `fastdistill.TeacherOutputs`, which the objective runs itself, on the rows or for
            the teachers that it asks for; where not, it is the outputs of the whole batch.
        columns: the dataset's, beside the labels, that `Objective.parts` takes by name. The models see none of them but
            `ATTENTION_MASK`.
        problem: the only kind of problem that it fits, or None.
        labels: False where the loss is whole without them, so that it can be told of data that has none; True where it
            is not. None where nothing is known: labels are then handed on unseen, whatever they are.
        vocab: "common" where the teacher's logits may be of more or fewer tokens than the student's.
        per_example: logits must be ``[B, C]``, and not of tokens.
    """

    teacher: bool = True
    teachers: tuple[str, ...] = ()
    only: Literal["logits", "probabilities"] | None = None
    hidden_states: bool = False
    attentions: bool = False
    all_tokens: bool | None = None
    lazily: bool = False
    columns: tuple[str, ...] = ()
    problem: Problem | None = None
    labels: bool | None = None
    vocab: Literal["same", "common"] = "same"
    per_example: bool = False

    def __post_init__(self) -> None:
        if self.all_tokens is None:
            object.__setattr__(self, "all_tokens", self.hidden_states or self.attentions)

    @property
    def asked(self) -> dict[str, bool]:
        """What models are called with, beside a batch."""
        return {f"output_{name}": True for name in ("hidden_states", "attentions") if getattr(self, name)}


class Objective(ABC):
    """A loss of a student's outputs against a teacher's outputs, labels, or both: the mean over the examples.

    In `DistillationTrainer` the labels are those of each row of logits, for causal models too, -100 for padding, and
    start and end of an answer are rows ``[B, 2, S]`` of ``logits``. In a plain loop `fastdistill.models.heads.head_of`
    has them: ``head.labels(batch)`` and ``head.aligned(outputs, batch)``.

    Gradients reach the student and, where its outputs require one, the teacher.
    """

    @property
    def needs(self) -> Needs:
        """What it uses; by default a teacher's outputs, of which nothing is known."""
        return Needs()

    @property
    def fingerprint(self) -> str:
        """A text that is the same for objectives that compute the same, in any process: the name of a dataclass, and
        its arguments. Others must have one of their own."""
        if not is_dataclass(self):
            raise TypeError(f"objective is a {type(self).__name__}; expected a dataclass, or a fingerprint of its own")
        arguments = (f"{field.name}={getattr(self, field.name)!r}" for field in fields(self) if field.init)
        return f"{type(self).__name__}({', '.join(arguments)})"

    module: nn.Module | None = None
    """What the objective itself learns or remembers: trained, moved and saved in checkpoints with the student."""

    def decided(self, inputs: Mapping[str, Any]) -> tuple[Objective, Mapping[str, Any]]:
        """For one step: the objective once the host has decided what it has to, and what it then takes of a batch that
        holds the teachers' outputs as columns, or does not. By default both as they are."""
        return self, inputs

    @property
    def on_host(self) -> str | None:
        """What of each step the host decides, beside `decided`, so that no CUDA graph can replay it. None where nothing
        but the values of tensors that `parts` is given, and of weights, changes from step to step, and no device is
        asked for one."""
        return "is not known to be a function of tensors alone (its on_host is not None)"

    @abstractmethod
    def parts(self, student: Any, teacher: Any, labels: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and what it is made of: detached, unweighted scalars by name, left on their device; the trainer's
        logs have their means, and of integers, which count something, the sums.

        An empty dictionary where the loss is all there is to say."""

    def summands(self, student: Any, teacher: Any, labels: Tensor | None, **columns: Tensor) -> dict[str, Tensor]:
        """What the loss is the sum of: its terms by name, weighted, with gradients; by default "loss" alone."""
        return {"loss": self.parts(student, teacher, labels, **columns)[0]}

    def __call__(self, student: Any, teacher: Any = None, labels: Tensor | None = None, **columns: Tensor) -> Tensor:
        return self.parts(student, as_needed(self, teacher), labels, **columns)[0]


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
        self._needs = _joint_needs({name: objective.needs for name, (_, objective) in self.terms.items()})
        modules = [o.module for _, o in self.terms.values() if o.module is not None]
        self.module = nn.ModuleList(modules) if modules else None

    def __repr__(self) -> str:
        return f"WeightedSum({self.terms})"

    @property
    def needs(self) -> Needs:
        return self._needs

    @property
    def on_host(self) -> str | None:
        for _, term in self.terms.values():
            decides = type(term).decided is not Objective.decided
            reason = "decides something for each step by itself" if decides else term.on_host
            if reason is not None:
                return f"has {term}, which {reason}"
        return None

    @property
    def fingerprint(self) -> str:
        terms = (f"{name!r}: ({weight!r}, {term.fingerprint})" for name, (weight, term) in self.terms.items())
        return f"WeightedSum({{{', '.join(terms)}}})"

    def parts(
        self, student: Any, teacher: Any, labels: Tensor | None, **columns: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        terms = {}
        for name, (weight, term) in self.terms.items():
            own = {column: columns[column] for column in term.needs.columns}
            terms[name] = weight, term(student, teacher, labels, **own)
        return weighted_sum(terms)

    def summands(self, student: Any, teacher: Any, labels: Tensor | None, **columns: Tensor) -> dict[str, Tensor]:
        """Those of each objective, as "name/term" where it has several."""
        found = {}
        for name, (weight, objective) in self.terms.items():
            own = {column: columns[column] for column in objective.needs.columns}
            terms = objective.summands(student, as_needed(objective, teacher), labels, **own)
            for term, value in terms.items():
                found[name if len(terms) == 1 else f"{name}/{term}"] = weight * value
        return found


def as_needed(objective: Objective, teacher: Any) -> Any:
    """The teachers' outputs as the objective takes them: run, unless it does that itself."""
    return teacher if objective.needs.lazily or not objective.needs.teacher else run(teacher)


def _joint_needs(terms: Mapping[str, Needs]) -> Needs:
    """Those of a sum of terms. Raises ValueError where they do not go together."""
    problems = {name: needs.problem for name, needs in terms.items() if needs.problem is not None}
    if len(set(problems.values())) > 1:
        raise ValueError(f"terms mixes kinds of problem: {problems}; expected one kind")
    taught = {name: needs for name, needs in terms.items() if needs.teacher}
    teachers = {name: needs.teachers for name, needs in taught.items()}
    if len(set(teachers.values())) > 1:
        raise ValueError(f"terms mixes teachers: {teachers}; expected the same ones, or one teacher, in all")
    only = {needs.only for needs in taught.values()}
    return Needs(
        teacher=bool(taught),
        teachers=next(iter(teachers.values()), ()),
        only=None if None in only else "logits" if "logits" in only else "probabilities",
        hidden_states=any(needs.hidden_states for needs in terms.values()),
        attentions=any(needs.attentions for needs in terms.values()),
        all_tokens=any(needs.all_tokens for needs in terms.values()),
        lazily=any(needs.lazily for needs in taught.values()),
        columns=tuple({column: None for needs in terms.values() for column in needs.columns}),
        problem=next(iter(problems.values()), None),
        labels=_joint_labels([needs.labels for needs in terms.values()]),
        per_example=any(needs.per_example for needs in terms.values()),
        vocab="common" if any(needs.vocab == "common" for needs in taught.values()) else "same",
    )


def _joint_labels(labels: Collection[bool | None]) -> bool | None:
    return None if None in labels else any(labels)


LossFunction = Callable[[Any, Any, Tensor | None], Tensor]


@dataclass(frozen=True)
class _Function(Objective):
    function: LossFunction
    names: tuple[str, ...]

    @property
    def needs(self) -> Needs:
        return Needs(teachers=self.names, all_tokens=True)  # for all that is known

    @property
    def fingerprint(self) -> str:
        """Of this very function in this very process: what it computes is not known."""
        return repr(self)

    def parts(self, student: Any, teacher: Any, labels: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.function(student, teacher, labels)
        name = getattr(self.function, "__name__", repr(self.function))
        if not isinstance(loss, Tensor):
            raise TypeError(f"objective {name} returned a {type(loss).__name__}; expected a Tensor, the loss")
        if loss.dim():
            raise ValueError(f"objective {name} returned {tuple(loss.shape)}; expected a scalar, a mean over examples")
        return loss, {}


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


def check_teacher(objective: Objective, teacher: object) -> None:
    if teacher is None:
        raise ValueError(f"teacher is None; {objective} needs its outputs")


def counting(student: Any, labels: Tensor | None) -> Tensor | None:
    """Labels that say which rows of the student's logits count, with -100 for those that do not: the labels, or where
    there are none what the trainer knows of padding; None where all count."""
    return labels if labels is not None else getattr(student, "counted", None)


def weighted_sum(terms: Mapping[str, tuple[float, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of weight * loss, and the losses by name, detached."""
    total = torch.stack([weight * loss for weight, loss in terms.values()]).sum()
    return total, {name: loss.detach() for name, (_, loss) in terms.items()}
