"""One model's training, as a recipe asks for it and a stage does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel, TrainerCallback

from fastdistill.objectives.base import Objective

Teacher = PreTrainedModel | Mapping[str, PreTrainedModel] | None

STORED_STATES = 2_000_000_000
"""Bytes of a teacher's hidden states that are stored without being asked for."""


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
            before; None where all are at most `STORED_STATES` bytes. (Logits always are, where it looks at nothing
            else.) No teacher runs then in the student's steps.
        best: the epoch that counts is that of the highest "metric" on the examples that select, or the lowest "loss".
        runs: how many such trainings there are, of which the best counts.
        run: which of them, from 0: each has other batches.
        callbacks: the trainer's; what they change must be told by the objective's repr.
    """

    name: str
    model: PreTrainedModel
    objective: Objective
    teacher: Teacher = None
    epochs: float
    learning_rate: float
    batch_size: int
    store_hidden_states: bool | None = None
    best: Literal["metric", "loss"] = "metric"
    runs: int = 1
    run: int = 0
    callbacks: tuple[TrainerCallback, ...] = ()


@dataclass(frozen=True)
class Trained:
    """A stage's model, what was measured, and what was logged while it was trained.

    The result has of the examples that are reported the task's "metric" by its name, "loss", and "metrics", all that
    papers tell of the task; "selection", the metric on the examples that select, and "epoch", the one that counts;
    parameters, examples_per_second of forward passes, trained_examples_per_second, peak_memory in bytes (of the GPU's
    tensors, or the process) and seconds; and in "stage" its folder, where predictions.parquet is, too."""

    model: PreTrainedModel
    result: dict[str, Any]
    log: list[dict[str, float]]
