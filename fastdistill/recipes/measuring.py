"""What is measured of a stage's model, and of a teacher's heads, neurons or weights."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import send_to_device  # type: ignore[import-untyped]
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from fastdistill.cuda_graphs import graphs_on
from fastdistill.digest import model_digest
from fastdistill.models.scores import Scores
from fastdistill.objectives.base import Objective
from fastdistill.sensitivity.importance import importance
from fastdistill.sensitivity.units import Sensitivities, score
from fastdistill.sensitivity.weights import WeightScores, WeightSensitivities, score_weights
from fastdistill.teachers.store import Collate
from fastdistill.training.padding import Padded, can_pad

if TYPE_CHECKING:
    from datasets import Dataset

MOMENT = 0.1
"""Seconds for which a model's speed is measured: a search has many, and six passes of each were a fifth of it."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """The sensitivities of a teacher's heads and neurons, or of its weights, as a recipe asks for them.

    Attributes:
        name: the stage's, and its folder's.
        student, objective: None for the teacher's own loss alone.
        reduce: as of `fastdistill.score`.
        on: the examples.
        of_weights: of the weights.
        dynabert: DynaBERT's importance in the place of sensitivities.
    """

    name: str
    teacher: PreTrainedModel
    student: PreTrainedModel | None = None
    objective: Objective | None = None
    reduce: Literal["example", "batch"] = "example"
    on: Literal["train", "validation"] = "train"
    of_weights: bool = False
    dynabert: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("expressiveness",) if self.student is None else ("expressiveness", "friendliness")

    def came_from(self) -> dict[str, Any]:
        own = {"dynabert": True} if self.dynabert else {}
        return own | {
            "objective": "None" if self.objective is None else self.objective.fingerprint,
            "reduce": self.reduce,
            "on": self.on,
            "of_weights": self.of_weights,
            "teacher": model_digest(self.teacher),
            "student": None if self.student is None else model_digest(self.student),
        }

    def find(
        self,
        data: Dataset,
        collate: Collate,
        batch_size: int,
        checkpoint: Path,
        *,
        cuda_graphs: bool = False,
        bf16: bool = False,
    ) -> Sensitivities | WeightSensitivities:
        processes = PartialState()
        if self.reduce == "example" and not self.of_weights:  # any batches will do: those with the least padding
            data = data.select(np.argsort(data["length"][:], kind="stable"))
        # whole batches to each process: they are those that one process would have
        number = processes.num_processes
        if self.reduce == "example" and self.of_weights:
            batch_size = 1  # a batch's gradient is then an example's
        data = data.select([row for row in range(len(data)) if row // batch_size % number == processes.process_index])
        models = [model for model in (self.teacher, self.student) if model is not None]
        if cuda_graphs and graphs_on(processes.device) and all(map(can_pad, models)):
            collate = Padded(collate, models)
        loader = DataLoader(data.remove_columns("length"), batch_size, collate_fn=collate)
        options: dict[str, Any] = {"progress": processes.is_main_process, "cuda_graphs": cuda_graphs}
        # weights do not change, but are cast anew for each batch: a cast that is kept has the first batch's graph
        autocast = torch.autocast(processes.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)
        with _moved(processes.device, self.teacher, self.student), autocast:
            if self.dynabert:
                return Sensitivities(importance(self.teacher, loader, **options), None)
            options["objective"] = self.objective
            if self.of_weights:
                return score_weights(self.teacher, loader, self.student, **options)
            options |= {"reduce": self.reduce, "checkpoint": checkpoint}
            return score(self.teacher, loader, self.student, **options)

    def load(self, folder: Path) -> Sensitivities | WeightSensitivities:
        kind = WeightScores if self.of_weights else Scores
        values: Any = (*(kind.load(folder / f"{name}.safetensors") for name in self.kinds), None)[:2]
        return (WeightSensitivities if self.of_weights else Sensitivities)(*values)


@torch.inference_mode()
def examples_per_second(
    model: PreTrainedModel, data: Dataset, collate: Collate, batch_size: int, *, bf16: bool = False
) -> float:
    """Of forward passes alone, on a batch of middling length; the median of the few that fit into a moment."""
    size = min(len(data), max(32, batch_size))
    start = (len(data) - size) // 2
    rows = data.select(range(start, start + size))
    rows = rows.select_columns([name for name in rows.column_names if name not in ("length", "labels")])
    batch = send_to_device(dict(collate(list(rows))), model.device)
    model.eval()  # type: ignore[no-untyped-call]
    least = 1 if model.device.type == "cpu" else 2  # elsewhere the first may load kernels
    seconds: list[float] = []
    while len(seconds) < least or (len(seconds) < 6 and sum(seconds) < MOMENT):
        began = time.perf_counter()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            model(**batch).logits.cpu()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return size / statistics.median(seconds[1:] or seconds)


@contextlib.contextmanager
def _moved(device: torch.device, *models: PreTrainedModel | None) -> Iterator[None]:
    """Within it the models are there; then where they were."""
    homes = [(model, model.device) for model in models if model is not None]
    try:
        for model, _ in homes:
            model.to(device)  # type: ignore[arg-type]
        yield
    finally:
        for model, home in homes:
            model.to(home)  # type: ignore[arg-type]
