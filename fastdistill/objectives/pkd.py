"""Hidden states of a student brought to those of a teacher: patient distillation, and the choice of layers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdistill.objectives.base import Needs, Objective, check_teacher
from fastdistill.ops import hidden_entropy
from fastdistill.ops.checks import check_choice

Pairs = Literal["skip", "last"] | Sequence[tuple[int, int]]

Over = Literal["mean", "sum"]
OVER = ("mean", "sum")


@dataclass(eq=False)
class PKD(Objective):
    r"""Patient distillation of the [CLS] token's hidden states (Sun et al. 2019, equation 7).

    .. math::
        \ell = \frac{1}{|I|\,B\,d} \sum_{(i,j) \in I} \sum_b
        \left\| \frac{h^s_{i,b}}{\|h^s_{i,b}\|} - \frac{h^t_{j,b}}{\|h^t_{j,b}\|} \right\|^2

    It says nothing of logits or labels: add it to others by `WeightedSum`.

    Args:
        over: of the hidden size d the "mean", as in the published code of PKD and Pea-KD, to which their weights
            (beta = 100, up to 500) belong; or the "sum", as their papers print it: d times as much.
        pairs: :math:`I`, (student layer, teacher layer), counted from 1, with 0 for the embeddings. "skip" pairs
            the k layers of a student with every (L/k)-th of a teacher's L, and "last" with its last k; both, as in
            the paper, leave the last layer of each out, where each has more than one.
        widths: where the student's and the teacher's hidden sizes differ, those two numbers: each pair then has a
            learned linear map from the student's size to the teacher's, `module`, which is trained with the
            student. It needs pairs as numbers.

    Raises ValueError for layers that a model does not have, and for widths that are not the models'.
    """

    pairs: Pairs = "skip"
    widths: tuple[int, int] | None = None
    over: Over = "mean"
    module: nn.ModuleList | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_pairs(self.pairs, ("skip", "last"))
        check_choice("over", self.over, OVER)
        if self.widths is not None and isinstance(self.pairs, str):
            raise ValueError(f"widths is {self.widths} but pairs is {self.pairs!r}; expected the pairs as numbers")
        self.module = None if self.widths is None else projections(self.widths, len(self.pairs))

    on_host = None

    @property
    def needs(self) -> Needs:
        return Needs(hidden_states=True, all_tokens=False, labels=False)

    def parts(self, student: Any, teacher: Any, labels: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        check_teacher(self, teacher)
        student_states, teacher_states = hidden_states("student", student), hidden_states("teacher", teacher)
        ours, theirs = zip(*layer_pairs(self.pairs, len(student_states) - 1, len(teacher_states) - 1), strict=True)
        distances = align(
            [student_states[i][:, 0] for i in ours], [teacher_states[j][:, 0] for j in theirs], self.module
        )
        width = teacher_states[0].shape[-1] if self.over == "mean" else 1
        return distances.mean() / width, {}


def check_pairs(pairs: object, rules: Collection[str]) -> None:
    """One of the `rules`, or (student layer, teacher layer), one pair or more."""
    if isinstance(pairs, str):
        check_choice("pairs", pairs, rules)
    elif not isinstance(pairs, Sequence) or not pairs or not all(_is_pair(pair) for pair in pairs):
        raise ValueError(f"pairs is {pairs!r}; expected (student layer, teacher layer), one pair or more")


def layer_pairs(pairs: Pairs | Literal["all"], student_layers: int, teacher_layers: int) -> Sequence[tuple[int, int]]:
    """The pairs that a rule means for two models, or those given; ValueError where the models do not fit them.

    "skip" and "last" are `PKD`'s; "all" is every layer of the student, the embeddings too, with the teacher's layer
    at the same share of its depth.
    """
    if not isinstance(pairs, str):
        for i, j in pairs:
            if i > student_layers or j > teacher_layers:
                raise ValueError(
                    f"pairs has ({i}, {j}), but the student has {student_layers} layers and the teacher "
                    f"{teacher_layers}"
                )
        return pairs
    if student_layers > teacher_layers:
        raise ValueError(
            f"pairs is {pairs!r} but the student has {student_layers} layers and the teacher "
            f"{teacher_layers}; expected the pairs as numbers"
        )
    if pairs == "all":
        return [(i, i * teacher_layers // student_layers) for i in range(student_layers + 1)]
    if student_layers == 1:
        return [(1, teacher_layers)]
    if pairs == "last":
        return [(i, teacher_layers - student_layers + i) for i in range(1, student_layers)]
    return [(i, i * teacher_layers // student_layers) for i in range(1, student_layers)]


def _is_pair(pair: object) -> bool:
    numbers = isinstance(pair, tuple) and len(pair) == 2
    return numbers and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in pair)  # type: ignore[attr-defined]


def align(
    student_states: Sequence[Tensor] | Tensor, teacher_states: Sequence[Tensor] | Tensor, module: nn.ModuleList | None
) -> Tensor:
    """For each pair the mean over examples of the squared distance between states of length 1, ``[pairs]``; states are
    ``[B, d]`` a layer.

    The student's are first mapped by the pair's own projection, if there is a `module` of them. Raises
    ValueError where the sizes still differ.
    """
    width, wanted = student_states[0].shape[-1], teacher_states[0].shape[-1]
    given = (width, wanted) if module is None else (module[0].in_features, module[0].out_features)
    if given != (width, wanted) or (module is None and width != wanted):
        raise ValueError(
            f"the student's hidden size is {width} and the teacher's {wanted}, but widths is "
            f"{None if module is None else given}; expected widths=({width}, {wanted})"
        )
    if module is not None:
        student_states = [project(states) for project, states in zip(module, student_states, strict=True)]
    ours, theirs = _of_length_one(student_states), _of_length_one(teacher_states)
    return (ours - theirs).square().sum(-1).mean(-1)


def _of_length_one(states: Sequence[Tensor] | Tensor) -> Tensor:
    stacked = states if isinstance(states, Tensor) else torch.stack(list(states))
    return F.normalize(stacked.to(torch.promote_types(stacked.dtype, torch.float32)), dim=-1)


def informative_layers(states: Tensor, number: int) -> Tensor:
    r"""The `number` layers whose states have the highest entropy, in the order of their depth; int64, from 0.

    states: ``[L, B, d]``. A layer's entropy is the mean over examples of that of
    :math:`\mathrm{softmax}(h)` over the hidden size (DeKD, equation 8; its division by :math:`\log|Y|` changes no
    order). Ties go to the lower layer. Nothing waits for the device.
    """
    if not 1 <= number <= len(states):
        raise ValueError(f"number is {number!r}; expected from 1 to {len(states)}, the teacher's layers")
    return hidden_entropy(states).argsort(descending=True, stable=True)[:number].sort().values


def projections(widths: tuple[int, int], number: int) -> nn.ModuleList:
    """A linear map for each of `number` pairs of layers, from the first width to the second."""
    if not _is_pair(widths) or 0 in widths:
        raise ValueError(f"widths is {widths!r}; expected the hidden sizes of student and teacher, positive integers")
    return nn.ModuleList([nn.Linear(*widths) for _ in range(number)])


def hidden_states(name: str, outputs: Any) -> Sequence[Tensor]:
    """Of the embeddings and every layer, each ``[B, tokens, d]``; ValueError if the model did not give them."""
    states: Sequence[Tensor] | None = getattr(outputs, "hidden_states", None)
    if states is None:
        raise ValueError(f"{name} has no hidden_states; call the model with output_hidden_states=True")
    return states
