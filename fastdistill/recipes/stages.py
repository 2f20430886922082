"""Stages: the models that a recipe trains one after another, each kept on disk with a hash of all it came from.

A stage that is done is never done twice, one that was cut off goes on from its last checkpoint, and one whose
settings, data or input models changed begins anew.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from rich.console import Console
from transformers import EvalPrediction, PreTrainedModel

from fastdistill.data.metrics import compute_metrics
from fastdistill.digest import digest, model_digest
from fastdistill.models.drawing import drawn_anew
from fastdistill.models.first_token import first_token_only
from fastdistill.models.frozen import frozen
from fastdistill.recipes import memory
from fastdistill.recipes.examples import Examples
from fastdistill.recipes.fitting import Prepared, check_processes, config_of, fit
from fastdistill.recipes.folder import UNFINISHED, Folder
from fastdistill.recipes.measuring import Scoring, examples_per_second
from fastdistill.recipes.optimization import Optimization
from fastdistill.recipes.predictions import PREDICTIONS, save_predictions
from fastdistill.recipes.report import versions
from fastdistill.recipes.training import STORED_STATES, Teacher, Trained, Training
from fastdistill.sensitivity.units import Sensitivities
from fastdistill.sensitivity.weights import WeightSensitivities
from fastdistill.teachers.store import store
from fastdistill.teachers.team import TeacherTeam
from fastdistill.training.checks import TEACHER
from fastdistill.training.trainer import DistillationTrainer

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from fastdistill.data.tasks import Task


@dataclass(frozen=True)
class Waiting:
    """A stage that is not done: its folder, what it comes from, the training data with what the teachers say, and these
    where they say more; and the seconds that were spent on it."""

    training: Training
    folder: Folder
    came_from: Mapping[str, Any]
    data: Dataset
    teacher: Teacher
    seconds: float


@dataclass(frozen=True, eq=False)
class Stages:
    """Keeps what is trained and scored for one task, each in a folder of its own under `output`.

    Args:
        output: folder of the run; made if it does not exist.
        examples: the task's.
        batch_size: examples in a batch, of all processes together, where a training does not say it.
        seed: of dropout and of the order of examples; stages of equal length see the same batches.
        bf16: mixed precision.
        cuda_graphs: on CUDA, steps are replayed as CUDA graphs where they can be; what is found is the same, within
            rounding and but for dropout's numbers, and a stage goes on with or without.
        checkpoints: how often a stage saves its state on its way; None for 3 times, but not within half a minute of
            the last one or of its beginning.
        tensorboard: whether to write TensorBoard logs.
        patience: epochs without a better one after which a training ends; None for none.
        optimization: how weights are moved.
        stored: where teachers' outputs are kept; by default "stored" in `output`.
        data: a digest of the examples; by default it is computed.
    """

    output: Path
    examples: Examples
    batch_size: int = 32
    seed: int = 0
    bf16: bool = False
    cuda_graphs: bool = True
    checkpoints: int | None = None
    tensorboard: bool = False
    patience: int | None = None
    optimization: Optimization = Optimization()
    stored: Path | None = None
    data: str = ""

    def __post_init__(self) -> None:
        output = self.output.absolute()
        output.mkdir(parents=True, exist_ok=True)
        object.__setattr__(self, "output", output)
        object.__setattr__(self, "stored", self.stored or output / "stored")
        object.__setattr__(self, "data", self.data or self._data_digest())

    def _data_digest(self) -> str:
        splits = (self.examples.train, self.examples.validation, self.examples.report, self.examples.mismatched)
        return _digest_of(*(split for split in splits if split is not None))

    @property
    def task(self) -> Task:
        return self.examples.task

    @property
    def console(self) -> Console:
        return Console(stderr=True, quiet=not PartialState().is_main_process)

    def seeded(self, seed: int) -> Stages:
        """The same with another seed, in the folder "seed-N"."""
        return replace(self, output=self.output / f"seed-{seed}", seed=seed)

    def with_team(self, team: TeacherTeam, shown: Mapping[str, Examples] | None = None) -> Stages:
        """The same with a team's logits as columns of the training data: no stage then runs these teachers. `shown` are
        by teacher the same examples in another form, as by its own tokenizer."""
        own, shown = self.examples, shown or {}
        train = team.store(
            own.train,
            collate={name: shown.get(name, own).collate for name in team},
            inputs={name: one.train for name, one in shown.items() if one is not own},
            folder=self.stored,
            device=PartialState().device,
            bf16=self.bf16,
        )
        return self._on(replace(own, train=train))

    def relabelled(self, task: Task, train: Tensor, validation: Tensor) -> Stages:
        """The same examples with other labels, those of another task, in the same folder; what selects is reported."""
        splits = ((self.examples.train, train), (self.examples.validation, validation))
        changed = [data.remove_columns("labels").add_column("labels", of.cpu().numpy()) for data, of in splits]
        own, others = changed
        return self._on(replace(self.examples, task=task, train=own, validation=others, report=others, mismatched=None))

    def on_training(self, rows: Tensor) -> Stages:
        """With some of the training examples alone, in the same folder."""
        return self._on(replace(self.examples, train=self.examples.train.select(rows.tolist())))

    def _on(self, examples: Examples) -> Stages:
        return replace(self, examples=examples, data="")

    def keep(self, name: str, came_from: Mapping[str, Any], make: Callable[[Path], Callable[[], None]]) -> Path:
        """The folder `name` with what `make` makes for it, or with what is there if it came from all the same.

        `make` may keep `UNFINISHED` work in the folder that it is given; what it returns saves the result there."""
        came_from = {**self._shared(), **came_from}
        folder = Folder(self.output / name)
        if "result" in folder.open(came_from):
            self.console.print(f"{name}: done earlier, kept in {folder.path}")
        else:
            folder.close(came_from, {}, [], make(folder.path))
        return folder.path

    def train(self, training: Training) -> Trained:
        """Train in the folder of that name, or take what is there if it came from all the same; see `fit`.

        Raises ValueError where the folder is not a stage's, and where the processes cannot share a batch evenly.
        """
        waiting = self.prepare(training)
        for prepared in self.begin(waiting) if waiting else ():
            prepared.train()
        return self.load(training.name)

    def prepare(self, training: Training) -> Waiting | None:
        """What several stages' `train` would do at the same time if each ran in a process of its own: store what their
        teachers say. Returns what is left to do, or None where the stage is done already."""
        check_processes(training.batch_size)
        started = time.perf_counter()
        folder, came_from, done = self._open(training)
        if done:
            return None
        data, teacher = self._taught(training)
        return Waiting(training, folder, came_from, data, teacher, time.perf_counter() - started)

    def begin(self, waiting: Waiting, kind: type[DistillationTrainer] | None = None) -> Generator[Prepared, None, None]:
        """The rest of `train`, which stops where it gives what is to be trained, if anything is, by a trainer of that
        kind: whoever goes on has trained it."""
        training, folder = waiting.training, waiting.folder
        started = time.perf_counter() - waiting.seconds
        checkpoint = folder.last_checkpoint()
        if checkpoint:
            self.console.print(f"{training.name}: going on from {checkpoint}")
        memory.reset_peak()
        config = config_of(
            training,
            folder.path,
            self.optimization,
            seed=self.seed,
            bf16=self.bf16,
            cuda_graphs=self.cuda_graphs,
            checkpoints=self.checkpoints,
            tensorboard=self.tensorboard,
        )
        examples, metric = self.examples, self.task.metric
        data, teacher = waiting.data, waiting.teacher
        fitted = yield from fit(training, examples, data, teacher, config, checkpoint, self.patience, kind)
        narrowed = None if training.objective.needs.all_tokens else fitted.model
        with first_token_only(narrowed), frozen(fitted.model, autocast=torch.bfloat16 if self.bf16 else None):
            speed = examples_per_second(
                fitted.model, examples.report, examples.collate, self.batch_size, bf16=self.bf16
            )
        reached = compute_metrics(self.task)(EvalPrediction(fitted.outputs, fitted.labels))
        result = {
            metric: reached[metric],
            "loss": fitted.loss,
            "metrics": reached | fitted.mismatched,
            "selection": fitted.selection,
            "epoch": fitted.epoch,
            "parameters": fitted.model.num_parameters(),
            "examples_per_second": speed,
            "trained_examples_per_second": fitted.speed,
            "peak_memory": memory.peak(),
            "seconds": round(time.perf_counter() - started, 2),
            "resumed": checkpoint is not None,
        }

        def save() -> None:
            fitted.model.save_pretrained(folder.path)
            save_predictions(folder.path / PREDICTIONS, fitted.labels, fitted.outputs)
            if examples.tokenizer is not None:
                examples.tokenizer.save_pretrained(folder.path)

        folder.close(waiting.came_from, result, fitted.log, save)

    def load(self, name: str) -> Trained:
        """A stage that is done. Raises ValueError if it is not."""
        folder = Folder(self.output / name)
        found = folder.read()
        if "result" not in found:
            raise ValueError(f"{folder.path} holds no stage that is done")
        assert self.stored is not None
        stage = os.path.relpath(folder.path, self.stored.parent)
        return Trained(folder.load(), {**found["result"], "stage": stage}, found["log"])

    def log(self, name: str) -> list[dict[str, float]]:
        """Of a stage that was trained."""
        log: list[dict[str, float]] = Folder(self.output / name).read()["log"]
        return log

    def score(self, scoring: Scoring) -> Sensitivities | WeightSensitivities:
        """What is found, kept in the folder of that name."""

        def make(folder: Path) -> Callable[[], None]:
            data = self.examples.train if scoring.on == "train" else self.examples.validation
            collate, unfinished = self.examples.collate, folder / UNFINISHED
            found = scoring.find(
                data, collate, self.batch_size, unfinished, cuda_graphs=self.cuda_graphs, bf16=self.bf16
            )

            def save() -> None:
                for kind in scoring.kinds:
                    getattr(found, kind).save(folder / f"{kind}.safetensors")

            return save

        return scoring.load(self.keep(scoring.name, scoring.came_from(), make))

    def outputs_of(
        self,
        teacher: PreTrainedModel | Mapping[str, PreTrainedModel],
        on: Literal["train", "validation"] = "train",
        *,
        states_of: str | None = None,
    ) -> Dataset:
        """The examples with what teachers say to them, of the one of that name hidden states too: each runs once for
        all stages."""
        assert self.stored is not None
        data = self.examples.train if on == "train" else self.examples.validation
        for name, model in (teacher if isinstance(teacher, Mapping) else {TEACHER: teacher}).items():
            data = store(
                data,
                model,
                name=name,
                collate=self.examples.collate,
                hidden_states=name == states_of,
                cache_file=self.stored / "teacher.arrow",
                device=PartialState().device,
                bf16=self.bf16,
            )
        return data

    def _shared(self) -> dict[str, Any]:
        """What all stages come from."""
        return {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "bf16": self.bf16,
            "processes": PartialState().num_processes,
            "data": self.data,
            "versions": versions(),
        }

    def _open(self, training: Training) -> tuple[Folder, dict[str, Any], bool]:
        """The stage's folder, what it comes from, and whether it is done."""
        came_from = {
            **self._shared(),
            "epochs": training.epochs,
            "learning_rate": training.learning_rate,
            "batch_size": training.batch_size,
            "best": training.best,
            "run": training.run,
            "patience": self.patience,
            "optimization": asdict(self.optimization),
            "augmented": self.examples.augment is not None,
            "objective": training.objective.fingerprint,
            "model": model_digest(training.model),
            "drawn": list(drawn_anew(training.model)),
            "teacher": _digests(training.teacher),
        }
        folder = Folder(self.output / training.name)
        found = folder.open(came_from)
        if "result" in found:
            self.console.print(f"{training.name}: done earlier, kept in {folder.path}")
        if changed := found.get("changed"):
            self.console.print(f"{training.name}: begun anew, for a change of {', '.join(changed)}")
        return folder, came_from, "result" in found

    def _taught(self, training: Training) -> tuple[Dataset, Teacher]:
        """The training data with what the teachers say, and no teacher, if the objective looks at nothing else, and the
        examples are the same in each epoch."""
        objective, teacher = training.objective, training.teacher
        if not training.epochs or teacher is None or self.examples.augment:
            return self.examples.train, teacher
        first, *_ = objective.needs.teachers or (TEACHER,)
        states = self._stores_states(training, teacher[first] if isinstance(teacher, Mapping) else teacher)
        if not (objective.needs.only or states):
            return self.examples.train, teacher
        return self.outputs_of(teacher, states_of=first if states else None), None

    def _stores_states(self, training: Training, teacher: PreTrainedModel) -> bool:
        needs = training.objective.needs
        if not needs.hidden_states or needs.all_tokens:
            return False
        if training.store_hidden_states is not None:
            return training.store_hidden_states
        numbers: int = (teacher.config.num_hidden_layers + 1) * teacher.config.hidden_size
        return 4 * numbers * len(self.examples.train) <= STORED_STATES


def _digest_of(*splits: Dataset) -> str:
    return digest(json.dumps(batch, default=bytes.hex) for split in splits for batch in split.iter(1000))


def _digests(teacher: Teacher) -> str | dict[str, str] | None:
    if isinstance(teacher, Mapping):
        return {name: model_digest(model) for name, model in teacher.items()}
    return None if teacher is None else model_digest(teacher)
