"""Stages: the models that a recipe trains one after another, each kept on disk with a hash of all it came from.

A stage that is done is never done twice, one that was cut off goes on from its last checkpoint, and one whose
settings, data or input models changed begins anew.
"""

from __future__ import annotations

import contextlib
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import send_to_device  # type: ignore[import-untyped]
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations.fsdp import is_fsdp_enabled
from transformers.trainer_callback import ProgressCallback

from fastdistill.data.metrics import compute_metrics
from fastdistill.digest import digest, model_digest
from fastdistill.models.first_token import first_token_only
from fastdistill.models.scores import Scores
from fastdistill.objectives.base import Objective
from fastdistill.objectives.selection import EXAMPLE
from fastdistill.recipes.examples import Examples
from fastdistill.recipes.folder import UNFINISHED, Folder
from fastdistill.recipes.report import versions
from fastdistill.sensitivity.units import Sensitivities, score
from fastdistill.sensitivity.weights import WeightScores, WeightSensitivities, score_weights
from fastdistill.teachers.store import store
from fastdistill.teachers.team import TeacherTeam
from fastdistill.training.checks import TEACHER
from fastdistill.training.trainer import DistillationConfig, DistillationTrainer

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from fastdistill.data.tasks import Task

Teacher = PreTrainedModel | Mapping[str, PreTrainedModel] | None


@dataclass(frozen=True)
class Trained:
    """A stage's model, what was measured (the task's metric, loss, parameters, examples_per_second, seconds), and
    what was logged while it was trained."""

    model: PreTrainedModel
    result: dict[str, Any]
    log: list[dict[str, float]]


class Stages:
    """Trains and evaluates classifiers of one task, each in a folder of its own under `output`.

    Args:
        output: folder of the run; made if it does not exist.
        examples: the task's.
        batch_size: examples in a training batch, of all processes together: they must divide it.
        seed: of dropout and of the order of examples; stages of equal length see the same batches.
        bf16: mixed precision.
        checkpoints: how often a stage saves its state on its way.
        tensorboard: whether to write TensorBoard logs.
    """

    def __init__(
        self,
        output: Path,
        examples: Examples,
        *,
        batch_size: int = 32,
        seed: int = 0,
        bf16: bool = False,
        checkpoints: int = 3,
        tensorboard: bool = False,
    ) -> None:
        self.output, self.task, self.tokenizer = output.absolute(), examples.task, examples.tokenizer
        self.stored = self.output / "stored"
        self.collate, self.train_data, self.eval_data = examples.collate, examples.train, examples.validation
        self.checkpoints, self.tensorboard = checkpoints, tensorboard
        self.batch_size, self.seed, self.bf16 = batch_size, seed, bf16
        self.shared = {
            "batch_size": batch_size,
            "seed": seed,
            "bf16": bf16,
            "processes": PartialState().num_processes,
            "data": _data_digest(self.train_data, self.eval_data),
            "versions": versions(),
        }
        output.mkdir(parents=True, exist_ok=True)

    @property
    def console(self) -> Console:
        return Console(stderr=True, quiet=not PartialState().is_main_process)

    def seeded(self, seed: int) -> Stages:
        """The same with another seed, in the folder "seed-N"."""
        other = copy.copy(self)
        other.output, other.seed, other.shared = self.output / f"seed-{seed}", seed, {**self.shared, "seed": seed}
        other.output.mkdir(exist_ok=True)
        return other

    def with_team(self, team: TeacherTeam) -> Stages:
        """The same with a team's logits as columns of the training data: no stage then runs these teachers."""
        other, processes = copy.copy(self), PartialState()
        other.train_data = team.store(
            self.train_data, collate=self.collate, folder=self.stored, device=processes.device, bf16=self.bf16
        )
        other.shared = {**self.shared, "data": _data_digest(other.train_data, self.eval_data)}
        return other

    def keep(self, name: str, came_from: Mapping[str, Any], make: Callable[[Path], Callable[[], None]]) -> Path:
        """The folder `name` with what `make` makes for it, or with what is there if it came from all the same.

        `make` may keep `UNFINISHED` work in the folder that it is given; what it returns saves the result there."""
        came_from = {**self.shared, **came_from}
        folder = Folder(self.output / name)
        if "result" in folder.open(came_from):
            self.console.print(f"{name}: done earlier, kept in {folder.path}")
        else:
            folder.close(came_from, {}, [], make(folder.path))
        return folder.path

    def train(
        self,
        name: str,
        model: PreTrainedModel,
        objective: Objective,
        *,
        teacher: Teacher = None,
        callbacks: Sequence[TrainerCallback] = (),
        epochs: float,
        learning_rate: float,
        batch_size: int | None = None,
        store_hidden_states: bool = False,
    ) -> Trained:
        """Train a copy of `model` in the folder `name`, or take what is there if it came from all the same.

        Where the objective looks at nothing but its teachers' logits, those are stored before, once for all stages; and
        with `store_hidden_states` also the first token's hidden states, where it looks at no other token. No teacher
        runs then in the student's steps.
        With `epochs` 0 the model is evaluated as it is. What `callbacks` change must be told by the objective's repr.
        Processes (torchrun, accelerate launch) share each batch, and find what one alone would, within rounding, but
        for dropout, whose numbers are each process's own, and for objectives that choose among a batch's examples
        (`DeKD`): each process chooses among its share. FSDP's parameters are gathered to be saved.
        Raises ValueError where the folder is not a stage's, and where the processes cannot share a batch evenly.
        """
        _check_processes(batch_size or self.batch_size)
        folder, came_from, done = self._open(name, model, objective, teacher, epochs, learning_rate, batch_size)
        if done:
            return self.load(name)
        checkpoint = folder.last_checkpoint()
        if checkpoint:
            self.console.print(f"{name}: going on from {checkpoint}")
        started = time.perf_counter()
        student = copy.deepcopy(model)
        train_data, teacher = self._taught(objective, teacher, epochs, store_hidden_states)
        if EXAMPLE in objective.needs_columns:
            train_data = train_data.add_column(EXAMPLE, np.arange(len(train_data)))
        trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            objective=objective,
            args=self._config(folder.path, epochs, learning_rate, batch_size or self.batch_size),
            train_dataset=train_data,
            eval_dataset=self.eval_data,
            processing_class=self.tokenizer,
            data_collator=self.collate,
            compute_metrics=compute_metrics(self.task),
            callbacks=list(callbacks),
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_ProgressBar(name))
        teachers = teacher.values() if isinstance(teacher, Mapping) else (teacher,)
        with first_token_only(*(() if objective.needs_all_tokens else (student, *teachers))):
            if epochs:
                trainer.train(resume_from_checkpoint=checkpoint)
            measured = trainer.evaluate()
        student = _whole(trainer, model)
        with first_token_only(None if objective.needs_all_tokens else student):
            speed = self._speed(student)
        result = {
            self.task.metric: measured[f"eval_{self.task.metric}"],
            "loss": measured["eval_loss"],
            "parameters": student.num_parameters(),
            "examples_per_second": speed,
            "seconds": round(time.perf_counter() - started, 2),
            "resumed": checkpoint is not None,
        }
        log = trainer.state.log_history

        def save() -> None:
            student.save_pretrained(folder.path)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder.path)

        folder.close(came_from, result, log, save)
        return Trained(folder.load(), result, log)

    def prepare(
        self,
        name: str,
        model: PreTrainedModel,
        objective: Objective,
        *,
        teacher: Teacher = None,
        epochs: float,
        learning_rate: float,
        batch_size: int | None = None,
        store_hidden_states: bool = False,
    ) -> bool:
        """What several stages' `train` would do at the same time if each ran in a process of its own: store what their
        teachers say. Returns whether the stage is done already."""
        _, _, done = self._open(name, model, objective, teacher, epochs, learning_rate, batch_size)
        if not done:
            self._taught(objective, teacher, epochs, store_hidden_states)
        return done

    def load(self, name: str) -> Trained:
        """A stage that is done. Raises ValueError if it is not."""
        folder = Folder(self.output / name)
        found = folder.read()
        if "result" not in found:
            raise ValueError(f"{folder.path} holds no stage that is done")
        return Trained(folder.load(), found["result"], found["log"])

    def _open(
        self,
        name: str,
        model: PreTrainedModel,
        objective: Objective,
        teacher: Teacher,
        epochs: float,
        learning_rate: float,
        batch_size: int | None,
    ) -> tuple[Folder, dict[str, Any], bool]:
        """The stage's folder, what it comes from, and whether it is done."""
        came_from = {
            **self.shared,
            "epochs": epochs,
            "learning_rate": learning_rate,
            "batch_size": batch_size or self.batch_size,
            "objective": repr(objective),
            "model": model_digest(model),
            "teacher": _digests(teacher),
        }
        folder = Folder(self.output / name)
        found = folder.open(came_from)
        if "result" in found:
            self.console.print(f"{name}: done earlier, kept in {folder.path}")
        if changed := found.get("changed"):
            self.console.print(f"{name}: begun anew, for a change of {', '.join(changed)}")
        return folder, came_from, "result" in found

    def _taught(
        self, objective: Objective, teacher: Teacher, epochs: float, store_hidden_states: bool
    ) -> tuple[Dataset, Teacher]:
        """The training data with what the teachers say, and no teacher, if the objective looks at nothing else."""
        states = store_hidden_states and objective.needs_hidden_states and not objective.needs_all_tokens
        if not epochs or teacher is None or not (objective.of_logits or states):
            return self.train_data, teacher
        first, *_ = objective.teachers or (TEACHER,)
        return self.outputs_of(teacher, states_of=first if states else None), None

    def score(
        self,
        name: str,
        teacher: PreTrainedModel,
        student: PreTrainedModel | None,
        *,
        objective: Objective | None,
        reduce: Literal["example", "batch"] = "example",
        on: Literal["train", "validation"] = "train",
        of_weights: bool = False,
    ) -> Sensitivities | WeightSensitivities:
        """The sensitivities of a teacher's heads and neurons, or of its weights, kept in the folder `name`."""
        kinds = ("expressiveness",) if student is None else ("expressiveness", "friendliness")

        def make(folder: Path) -> Callable[[], None]:
            processes = PartialState()
            data = self.train_data if on == "train" else self.eval_data
            if reduce == "example" and not of_weights:  # any batches will do: those with the least padding
                data = data.select(np.argsort(data["length"][:], kind="stable"))
            # whole batches to each process: they are those that one process would have
            size, number = self.batch_size, processes.num_processes
            data = data.select([row for row in range(len(data)) if row // size % number == processes.process_index])
            loader = DataLoader(data.remove_columns("length"), self.batch_size, collate_fn=self.collate)
            options: dict[str, Any] = {"objective": objective, "progress": processes.is_main_process}
            found: Sensitivities | WeightSensitivities
            with _moved(processes.device, teacher, student):
                if of_weights:
                    found = score_weights(teacher, loader, student, **options)
                else:
                    found = score(teacher, loader, student, reduce=reduce, checkpoint=folder / UNFINISHED, **options)

            def save() -> None:
                for kind in kinds:
                    getattr(found, kind).save(folder / f"{kind}.safetensors")

            return save

        came_from = {
            "objective": repr(objective),
            "reduce": reduce,
            "on": on,
            "of_weights": of_weights,
            "teacher": model_digest(teacher),
            "student": None if student is None else model_digest(student),
        }
        folder = self.keep(name, came_from, make)
        loaded = [(WeightScores if of_weights else Scores).load(folder / f"{kind}.safetensors") for kind in kinds]
        values: Any = (*loaded, None)[:2]
        return (WeightSensitivities if of_weights else Sensitivities)(*values)

    @torch.inference_mode()
    def _speed(self, model: PreTrainedModel) -> float:
        """Examples a second of forward passes alone, on a batch of middling length; the median of some, once warm."""
        size = min(len(self.eval_data), max(64, self.batch_size))
        start = (len(self.eval_data) - size) // 2
        rows = self.eval_data.select(range(start, start + size))
        rows = rows.select_columns([name for name in rows.column_names if name not in ("length", "labels")])
        batch = send_to_device(dict(self.collate(list(rows))), model.device)
        model.eval()  # type: ignore[no-untyped-call]
        seconds = []
        for _ in range(6):
            began = time.perf_counter()
            model(**batch).logits.cpu()  # waits for the device
            seconds.append(time.perf_counter() - began)
        return size / statistics.median(seconds[1:])

    def relabelled(self, task: Task, train: Tensor, validation: Tensor) -> Stages:
        """The same examples with other labels, those of another task, in the same folder."""
        other = copy.copy(self)
        other.task = task
        other.train_data, other.eval_data = (
            data.remove_columns("labels").add_column("labels", labels.cpu().numpy())
            for data, labels in ((self.train_data, train), (self.eval_data, validation))
        )
        other.shared = {**self.shared, "data": _data_digest(other.train_data, other.eval_data)}
        return other

    def outputs_of(
        self,
        teacher: PreTrainedModel | Mapping[str, PreTrainedModel],
        on: Literal["train", "validation"] = "train",
        *,
        states_of: str | None = None,
    ) -> Dataset:
        """The examples with what teachers say to them, of the one of that name hidden states too: each runs once for
        all stages."""
        data = self.train_data if on == "train" else self.eval_data
        for name, model in (teacher if isinstance(teacher, Mapping) else {TEACHER: teacher}).items():
            data = store(
                data,
                model,
                name=name,
                collate=self.collate,
                hidden_states=name == states_of,
                cache_file=self.stored / "teacher.arrow",
                device=PartialState().device,
                bf16=self.bf16,
            )
        return data

    def _config(self, folder: Path, epochs: float, learning_rate: float, batch_size: int) -> DistillationConfig:
        return DistillationConfig(
            output_dir=str(folder),
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size // PartialState().num_processes,
            per_device_eval_batch_size=max(64, batch_size),
            weight_decay=0.01,
            warmup_steps=0.1,
            seed=self.seed,
            bf16=self.bf16,
            use_cpu=not torch.accelerator.is_available(),
            logging_steps=0.05,
            save_strategy="steps" if self.checkpoints else "no",
            save_steps=1 / (self.checkpoints + 1),
            save_total_limit=2,  # the one before, should the last be damaged
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="tensorboard" if self.tensorboard else "none",
            log_level="error",
            disable_tqdm=False,
        )


class _ProgressBar(ProgressCallback):
    """Trainer's progress bar with the stage's name before and the loss behind, in place of a printed line a log."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in logs:
            hidden = ("grad_norm", "learning_rate", "epoch")  # and details, "entropy/0"
            shown = {k: f"{v:.3g}" for k, v in logs.items() if k not in hidden and "/" not in k}
            self.training_bar.set_postfix(shown)


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


def _check_processes(batch_size: int) -> None:
    processes = PartialState().num_processes
    if batch_size % processes:
        raise ValueError(
            f"--batch-size is {batch_size}, but {processes} processes share a batch; expected a multiple of {processes}"
        )
    if is_fsdp_enabled():
        raise ValueError(
            "accelerate's --fsdp_cpu_ram_efficient_loading is true, which gives all processes but the first models "
            "without weights; expected false"
        )


def _whole(trainer: DistillationTrainer, like: PreTrainedModel) -> PreTrainedModel:
    """The trained student; of a sharded one (FSDP) a copy, which has its weights in the main process only."""
    if not trainer.is_fsdp_enabled:
        student: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.model)
        return student
    state = trainer.accelerator.get_state_dict(trainer.model)  # all processes send their shards
    student = copy.deepcopy(like).to(trainer.args.device)  # type: ignore[arg-type]
    if state:
        student.load_state_dict(state)
    return student


def _data_digest(*splits: Dataset) -> str:
    return digest(json.dumps(batch, default=bytes.hex) for split in splits for batch in split.iter(1000))


def _digests(teacher: Teacher) -> str | dict[str, str] | None:
    if isinstance(teacher, Mapping):
        return {name: model_digest(model) for name, model in teacher.items()}
    return None if teacher is None else model_digest(teacher)
