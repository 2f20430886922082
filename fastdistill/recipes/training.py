"""One model's training, as a recipe asks for it and a stage does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from fastdistill.objectives.base import Objective

Teacher = PreTrainedModel | Mapping[str, PreTrainedModel] | None


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained, and how.

    Attributes:
        name: the stage's, and its folder's.
        model: where it begins; a copy is trained.
        objective, teacher: what it learns by, and from whom.
        epochs: 0 to evaluate the model as it is.
        learning_rate: the peak.
        batch_size: examples, of all processes together: they must divide it.
        store_hidden_states: where the objective looks at no token's hidden states but the first's, store the teacher's
            before. (Logits always are, where it looks at nothing else.) No teacher runs then in the student's steps.
        callbacks: the trainer's; what they change must be told by the objective's repr.
    """

    name: str
    model: PreTrainedModel
    objective: Objective
    teacher: Teacher = None
    epochs: float
    learning_rate: float
    batch_size: int
    store_hidden_states: bool = False
    callbacks: tuple[TrainerCallback, ...] = ()


@dataclass(frozen=True)
class Trained:
    """A stage's model, what was measured (the task's metric, loss, parameters, examples_per_second, seconds), and
    what was logged while it was trained."""

    model: PreTrainedModel
    result: dict[str, Any]
    log: list[dict[str, float]]
