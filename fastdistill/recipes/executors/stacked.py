"""Trainings of one shape side by side, in this process: each step computes a batch of every student at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from rich.console import Console
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel

from fastdistill.cuda_graphs import Graphs, replaying
from fastdistill.models.first_token import first_token_only
from fastdistill.models.fused_residuals import fused_residuals
from fastdistill.models.heads import IGNORED, head_of, label_faults
from fastdistill.models.inputs import taken_by
from fastdistill.models.short_attention import short_attention
from fastdistill.models.stacking import Stack, obstacle_to_stacking
from fastdistill.objectives.base import Objective
from fastdistill.recipes.executors.local import Local, Trial
from fastdistill.recipes.stages import Stages, Waiting
from fastdistill.recipes.training import Trained
from fastdistill.teachers.outputs import LOGITS
from fastdistill.training.checks import TEACHER
from fastdistill.training.optimizers import step_together
from fastdistill.training.padding import MULTIPLE, can_pad
from fastdistill.training.stepped import SteppedTrainer, Steps

if TYPE_CHECKING:
    from datasets import Dataset

TOGETHER = 16
"""Students side by side at most; more take turns."""

SHARE = 9
"""Of a GPU's free memory a student is given so many times its weights: these, their gradients, in CUDA graphs and out
of them, and moments, a stack's copy of them while it is made, and almost as much again for what the backward pass
needs."""

NAME = "training side by side"


class Stacked(Local):
    """Trains students of one shape side by side, as one batched model (`fastdistill.models.stacking.Stack`).

    Each has its own teacher's stored logits, objective, learning rate, seed, order of examples, early stopping, best
    epoch, log and checkpoints, and becomes what `Local` makes of it, within rounding, but for dropout: its numbers are
    each student's own, and the same whenever the same students are trained together, but others than `Local` draws.
    What was cut off goes on from each student's last checkpoint, under this executor or another. Seconds and memory in
    a student's result are those of all beside it, its examples a second those that were its own. On CUDA the passes of
    all are replayed as CUDA graphs, as one student's are (`fastdistill.DistillationConfig`).

    Side by side are students of one architecture, with the same examples, batch size and number of epochs. One alone,
    or that cannot be stacked, is trained by itself; a line says why. Those are: models that are not in
    `fastdistill.models.stacking.STACKABLE`, images, and objectives that look at hidden states, choose among the
    examples, learn something themselves, or ask a teacher for more than what can be stored.

    Raises ValueError in one of several processes (torchrun).
    """

    def __init__(self) -> None:
        if (number := PartialState().num_processes) > 1:
            raise ValueError(f"--executor stacked was started in {number} processes; expected one")

    def in_turn(self, trials: Iterable[Trial]) -> Iterator[Trained]:
        """As `Local` has it, but all are trained before the first is given."""
        places, groups = [], dict[object, list[_Begun]]()
        for trial in trials:
            stages, training = trial.stages, trial.training
            places.append((stages, training.name))
            waiting = stages.prepare(training)
            if waiting is None:
                continue
            if reason := _obstacle(waiting, stages):
                _train_alone(_Begun(stages, waiting), reason)
            else:
                groups.setdefault(_shape(waiting, stages), []).append(_Begun(stages, waiting))
        for group in groups.values():
            turns = ceil(len(group) / _room(group[0].waiting.training.model))
            for turn in range(turns):
                _train(group[turn::turns])
        for stages, name in places:
            yield stages.load(name)


@dataclass(frozen=True)
class _Begun:
    stages: Stages
    waiting: Waiting


def _train_alone(one: _Begun, reason: str) -> None:
    _tell(f"{one.waiting.training.name}: trained by itself: {reason}")
    for prepared in one.stages.begin(one.waiting):
        prepared.train()


def _train(group: Sequence[_Begun]) -> None:
    if len(group) == 1:
        return _train_alone(group[0], "no other is of its shape")
    _tell(f"{len(group)} side by side: {', '.join(one.waiting.training.name for one in group)}")
    plain, table = group[0].waiting.training.model, _Table(group[0])
    running: list[_Student] = []
    with ExitStack() as leave:
        for one in group:
            student = _Student(one, shows_progress=not running)
            leave.callback(student.stage.close)
            if student.begin():
                running.append(student)
        while running:
            running = _together(plain, running, table)


def _together(plain: PreTrainedModel, students: list[_Student], table: _Table) -> list[_Student]:
    """Train until one of them or more is done; returns the others."""
    stack = Stack(plain, [student.model for student in students])
    graphs = _graphs(students)
    passes, multiple = replaying(_Passes(stack, students), graphs, NAME), 1 if graphs is None else MULTIPLE
    with short_attention(stack.model), fused_residuals(stack.model), first_token_only(stack.model):
        while True:
            features, rows = table.batch([student.rows for student in students], multiple)
            columns = [student.decide(own) for student, own in zip(students, rows, strict=True)]
            found = passes(features, columns, state=tuple(repr(student.objective) for student in students))
            step_together([student.trainer.optimizer for student in students], stack.by_weight(found.gradients))
            told = zip(students, found.losses.unbind(), found.norms.unbind(), found.parts, strict=True)
            del found  # with the gradients
            left = [student for student, loss, norm, parts in told if student.go_on(loss, norm, parts)]
            if len(left) < len(students):
                return left


class _Found(NamedTuple):
    """Each student's loss and norm, ``[N]``, and parts; and all gradients, as `Stack` has them."""

    losses: Tensor
    norms: Tensor
    parts: tuple[dict[str, Tensor], ...]
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class _Passes:
    """The passes of a step: a function of tensors alone, where objectives are."""

    stack: Stack
    students: Sequence[_Student]

    def __call__(self, features: dict[str, Tensor], columns: list[dict[str, Tensor]]) -> _Found:
        """Of a batch of all students the inputs, and of each one's part what there is to learn."""
        stack, students, trainer = self.stack, self.students, self.students[0].trainer
        with trainer.accelerator.autocast():
            logits = stack(**features).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).unflatten(0, (len(students), -1))
        told = [s.loss(*one) for s, *one in zip(students, logits.unbind(), columns, strict=True)]
        losses = torch.stack([loss for loss, _ in told])
        gradients, norms = stack.gradients(losses.sum(), trainer.args.max_grad_norm)
        return _Found(losses.detach(), norms, tuple(parts for _, parts in told), gradients)


def _graphs(students: Sequence[_Student]) -> Graphs | None:
    """What captures their steps, if it is asked for, and all can be."""
    first, *others = [student.trainer.graphs(NAME) for student in students]
    return None if None in others else first


class _Student:
    """One of those side by side: its trainer, the batch it is at, and what there is to learn of each example."""

    rows: list[int]
    objective: Objective

    def __init__(self, begun: _Begun, shows_progress: bool) -> None:
        waiting = begun.waiting
        self.stage = begun.stages.begin(waiting, SteppedTrainer)
        prepared = next(self.stage)
        if not shows_progress:
            prepared.hide_progress()
        self.model, self.trainer = prepared.student, cast("SteppedTrainer", prepared.trainer)
        self.steps: Steps | None = prepared.train()
        columns = _read(waiting.data, ("labels", *_stored(waiting.training.objective)))
        self.columns = {name: column.to(self.trainer.args.device) for name, column in columns.items()}

    def begin(self) -> bool:
        """As `go_on`, to its first batch."""
        return self._send(None)

    def go_on(self, loss: Tensor, norm: Tensor, parts: dict[str, Tensor]) -> bool:
        """To the next batch, with what was found on the last; at the end it is evaluated and saved, and False."""
        self.trainer.count(parts)
        return self._send((loss, norm))

    def _send(self, found: tuple[Tensor, Tensor] | None) -> bool:
        try:
            if self.steps is not None:
                self.rows = self.steps.send(found)  # type: ignore[arg-type]
                return True
        except StopIteration:
            pass
        next(self.stage, None)
        return False

    def decide(self, rows: Tensor) -> dict[str, Tensor]:
        """What there is to learn of these examples in the next step, of which the host decides what it has to."""
        columns = {name: column[rows] for name, column in self.columns.items()}
        self.objective, decided = self.trainer.objective.decided(columns)
        return dict(decided)

    def loss(self, logits: Tensor, columns: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """And its parts, of the first of so many logits."""
        return self.trainer.loss_of(self.objective, logits[: len(columns["labels"])], columns)


class _Table:
    """The inputs of all examples, on the device: their tokens one after another, so that none is padded here."""

    def __init__(self, begun: _Begun) -> None:
        data, tokenizer = begun.waiting.data, cast("DataCollatorWithPadding", begun.stages.examples.collate).tokenizer
        taken = (taken_by(begun.waiting.training.model) or frozenset()).intersection(data.column_names)
        names = [name for name in tokenizer.model_input_names if name in taken]
        self.device = PartialState().device
        lists = data.with_format("arrow").select_columns(names)[:]
        self.lengths = pc.list_value_length(lists["input_ids"]).to_numpy()
        ends = np.cumsum(self.lengths, dtype=np.int64)
        self.starts, self.ends = (torch.from_numpy(at).to(self.device) for at in (ends - self.lengths, ends))
        self.tokens = {name: _values(lists[name]).long().to(self.device) for name in names}
        fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        self.padding = {name: fill.get(name, 0) for name in names}
        model = begun.waiting.training.model
        self.room = model.config.max_position_embeddings if "attention_mask" in names and can_pad(model) else 0

    def batch(self, batches: Sequence[Sequence[int]], multiple: int) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The inputs of several students' batches, ``[N·B, S]``, and the rows of each. A smaller batch is filled up
        with its first example, and S is such a multiple, if there may be as many tokens."""
        size = max(map(len, batches))
        filled = np.array([[*rows, *[rows[0]] * (size - len(rows))] for rows in batches])
        longest = int(self.lengths[filled].max())
        longest = min(-(-longest // multiple) * multiple, max(longest, self.room))
        host = torch.from_numpy(filled)
        rows = (host.pin_memory() if self.device.type == "cuda" else host).to(self.device, non_blocking=True)
        places = self.starts[rows.flatten(), None] + torch.arange(longest, device=self.device)
        is_token = places < self.ends[rows.flatten(), None]
        places = torch.where(is_token, places, 0)
        inputs = {name: torch.where(is_token, of[places], self.padding[name]) for name, of in self.tokens.items()}
        return inputs, [own[: len(batch)] for own, batch in zip(rows.unbind(), batches, strict=True)]


def _read(data: Dataset, names: Iterable[str]) -> dict[str, Tensor]:
    """Columns of numbers, or of lists of one size, as a collator makes them."""
    rows = data.with_format("arrow").select_columns(list(names))[:]
    found = {name: _values(rows[name]) for name in rows.column_names}
    found = {name: values.float() if values.is_floating_point() else values.long() for name, values in found.items()}
    return {name: values.view(len(rows), -1) if _is_list(rows[name]) else values for name, values in found.items()}


def _values(column: Any) -> Tensor:
    """Of Arrow's numbers, or lists of them one after another."""
    return torch.tensor((pc.list_flatten(column) if _is_list(column) else column).to_numpy())


def _is_list(column: Any) -> bool:
    return hasattr(column.type, "value_type")


def _stored(objective: Objective) -> list[str]:
    """The columns that hold what its teachers say."""
    needs = objective.needs
    return [name + LOGITS for name in needs.teachers or (TEACHER,)] if needs.teacher else []


def _obstacle(waiting: Waiting, stages: Stages) -> str | None:
    """Why a training cannot be one of several side by side."""
    training, examples = waiting.training, stages.examples
    objective, needs = training.objective, training.objective.needs
    if not training.epochs:
        return "it is evaluated only"
    if needs.hidden_states or needs.all_tokens:
        return f"objective {objective} is not of logits alone"
    if needs.columns:
        return f"objective {objective} is of more than logits and labels ({', '.join(needs.columns)})"
    if objective.module is not None and next(objective.module.parameters(), None) is not None:
        return f"objective {objective} learns something itself"
    if not set(_stored(objective)) <= set(waiting.data.column_names):
        return f"what its teacher says to objective {objective} is not stored"
    if not isinstance(examples.collate, DataCollatorWithPadding) or examples.collate.tokenizer.padding_side != "right":
        return "its examples are not texts that are padded on the right"
    labels = _read(waiting.data, ("labels",))
    if any((one.isnan() if one.is_floating_point() else one == IGNORED).any() for one in labels.values()):
        return "some of its labels do not count"
    return obstacle_to_stacking(training.model) or next(label_faults(head_of(training.model), labels), None)


def _shape(waiting: Waiting, stages: Stages) -> object:
    """The same for those that can be side by side."""
    training, model = waiting.training, waiting.training.model
    weights = tuple((name, one.shape, one.dtype, one.requires_grad) for name, one in model.named_parameters())
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    described = type(model), json.dumps(config, sort_keys=True, default=str), weights
    return stages.data, stages.bf16, training.batch_size, training.epochs, described


def _room(model: PreTrainedModel) -> int:
    """How many there may be side by side."""
    device = PartialState().device
    if device.type != "cuda":
        return TOGETHER
    free, _ = torch.cuda.mem_get_info(device)
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return min(TOGETHER, max(1, free // (SHARE * size)))


def _tell(text: str) -> None:
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)
