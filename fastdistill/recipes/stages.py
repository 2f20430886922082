"""Stages: the models that a recipe trains one after another, each kept on disk with a hash of all it came from.

A stage that is done is never done twice, one that was cut off goes on from its last checkpoint, and one whose
settings, data or input models changed begins anew.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from rich.console import Console
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from fastdistill.data import TaskData, tokenize
from fastdistill.metrics import compute_metrics
from fastdistill.objectives import Objective
from fastdistill.report import versions, write_json
from fastdistill.selection import EXAMPLE
from fastdistill.trainer import DistillationConfig, DistillationTrainer

if TYPE_CHECKING:
    from datasets import Dataset

MARKER = "stage.json"


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
        data, tokenizer, max_length: the task's examples, tokenized here.
        batch_size: examples in a training batch, on each device.
        seed: of dropout and of the order of examples; stages of equal length see the same batches.
        bf16: mixed precision.
        checkpoints: how often a stage saves its state on its way.
        tensorboard: whether to write TensorBoard logs.
    """

    def __init__(
        self,
        output: Path,
        data: TaskData,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        batch_size: int = 32,
        seed: int = 0,
        bf16: bool = False,
        checkpoints: int = 3,
        tensorboard: bool = False,
    ) -> None:
        self.output, self.task, self.tokenizer = output, data.task, tokenizer
        self.checkpoints, self.tensorboard = checkpoints, tensorboard
        self.console = Console(stderr=True, quiet=not PartialState().is_main_process)
        self.train_data = tokenize(data.train, tokenizer, data.task, max_length)
        validation = tokenize(data.validation, tokenizer, data.task, max_length)
        self.eval_data = validation.select(np.argsort(validation["length"][:], kind="stable"))  # less padding
        self.batch_size, self.seed, self.bf16 = batch_size, seed, bf16
        self.shared = {
            "batch_size": batch_size,
            "seed": seed,
            "bf16": bf16,
            "processes": PartialState().num_processes,
            "data": _digest(json.dumps(batch) for d in (self.train_data, self.eval_data) for batch in d.iter(1000)),
            "versions": versions(),
        }
        output.mkdir(parents=True, exist_ok=True)

    def seeded(self, seed: int) -> Stages:
        """The same with another seed, in the folder "seed-N"."""
        other = copy.copy(self)
        other.output, other.seed, other.shared = self.output / f"seed-{seed}", seed, {**self.shared, "seed": seed}
        other.output.mkdir(exist_ok=True)
        return other

    def train(
        self,
        name: str,
        model: PreTrainedModel,
        objective: Objective,
        *,
        teacher: PreTrainedModel | Mapping[str, PreTrainedModel] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        epochs: float,
        learning_rate: float,
    ) -> Trained:
        """Train a copy of `model` in the folder `name`, or take what is there if it came from all the same.

        With `epochs` 0 the model is evaluated as it is. What `callbacks` change must be told by the objective's
        repr. Raises ValueError where the folder is not a stage's.
        """
        came_from = {
            **self.shared,
            "epochs": epochs,
            "learning_rate": learning_rate,
            "objective": repr(objective),
            "model": _model_digest(model),
            "teacher": _digests(teacher),
        }
        folder = _Folder(self.output / name)
        found = folder.open(came_from)
        if "result" in found:
            self.console.print(f"{name}: done earlier, kept in {folder.path}")
            return Trained(folder.load(), found["result"], found["log"])
        if changed := found.get("changed"):
            self.console.print(f"{name}: begun anew, for a change of {', '.join(changed)}")

        checkpoint = folder.last_checkpoint()
        if checkpoint:
            self.console.print(f"{name}: going on from {checkpoint}")
        started = time.perf_counter()
        student = copy.deepcopy(model)
        trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            objective=objective,
            args=self._config(folder.path, epochs, learning_rate),
            train_dataset=self._numbered() if EXAMPLE in objective.needs_columns else self.train_data,
            eval_dataset=self.eval_data,
            processing_class=self.tokenizer,
            compute_metrics=compute_metrics(self.task),
            callbacks=list(callbacks),
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_ProgressBar(name))
        if epochs:
            trainer.train(resume_from_checkpoint=checkpoint)
        measured = trainer.evaluate()
        result = {
            self.task.metric: measured[f"eval_{self.task.metric}"],
            "loss": measured["eval_loss"],
            "parameters": student.num_parameters(),
            "examples_per_second": measured["eval_samples_per_second"],
            "seconds": round(time.perf_counter() - started, 2),
            "resumed": checkpoint is not None,
        }
        log = trainer.state.log_history
        folder.close(came_from, result, log, student, self.tokenizer)
        return Trained(folder.load(), result, log)

    def _numbered(self) -> Dataset:
        return self.train_data.add_column(EXAMPLE, np.arange(len(self.train_data)))

    def _config(self, folder: Path, epochs: float, learning_rate: float) -> DistillationConfig:
        return DistillationConfig(
            output_dir=str(folder),
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=max(64, self.batch_size),
            weight_decay=0.01,
            warmup_steps=0.1,
            seed=self.seed,
            bf16=self.bf16,
            use_cpu=not torch.accelerator.is_available(),
            logging_steps=0.05,
            save_strategy="steps" if self.checkpoints else "no",
            save_steps=1 / (self.checkpoints + 1),
            save_total_limit=1,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="tensorboard" if self.tensorboard else "none",
            log_level="error",
            disable_tqdm=False,
        )


class _Folder:
    """A stage's folder: the model, the marker, and while it trains the checkpoints. Only the main process writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.marker = path / MARKER
        self.removed = path.with_name(f".{path.name}.removed")

    def open(self, came_from: Mapping[str, Any]) -> dict[str, Any]:
        """Make the folder ready for this stage: {"result": ...} if it is done, {"changed": [...]} if what was there
        came from something else, and is removed."""
        found = self._read()
        before = found.pop("came_from", None)
        if before is not None and before != came_from:
            found = {"changed": [key for key in came_from if before.get(key) != came_from[key]]}
        PartialState().wait_for_everyone()  # all have read before one writes
        if PartialState().is_main_process:
            if "result" in found:
                self._remove_checkpoints()  # if it was done but cut off here
            else:
                shutil.rmtree(self.removed, ignore_errors=True)
                if "changed" in found:  # at once, as a later run would see it: half a stage is none
                    self.path.rename(self.removed)
                    shutil.rmtree(self.removed)
                self.path.mkdir(exist_ok=True)
                write_json(self.marker, {"came_from": came_from})
        PartialState().wait_for_everyone()
        return found

    def _read(self) -> dict[str, Any]:
        if not self.marker.is_file():
            unfinished = f".{MARKER}."  # a marker whose writing was cut off
            if self.path.is_file() or any(not p.name.startswith(unfinished) for p in self.path.glob("*")):
                raise ValueError(f"{self.path} holds something that is no stage of a run; give another output folder")
            return {}
        try:
            return dict(json.loads(self.marker.read_text()))
        except ValueError as error:
            raise ValueError(f"{self.marker} is damaged ({error}); remove its folder to do the stage again") from None

    def close(
        self,
        came_from: Mapping[str, Any],
        result: Mapping[str, Any],
        log: Sequence[Mapping[str, float]],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Save the model, and then say that the stage is done."""
        if PartialState().is_main_process:
            model.save_pretrained(self.path)
            tokenizer.save_pretrained(self.path)
            write_json(self.marker, {"came_from": came_from, "result": result, "log": log})
            self._remove_checkpoints()
        PartialState().wait_for_everyone()

    def _remove_checkpoints(self) -> None:
        for checkpoint in self.path.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    def load(self) -> PreTrainedModel:
        """The stage's model, always as the disk has it: later stages then start from the same in every run."""
        try:
            model = AutoModelForSequenceClassification.from_pretrained(self.path, use_safetensors=True)
        except Exception as error:
            raise ValueError(f"{self.path} is damaged ({error}); remove it to do the stage again") from error
        return model  # type: ignore[no-any-return]

    def last_checkpoint(self) -> str | None:
        """The latest checkpoint that was written to its end; Trainer writes trainer_state.json last."""
        for checkpoint in sorted(self.path.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
            with contextlib.suppress(FileNotFoundError, ValueError):
                json.loads((checkpoint / "trainer_state.json").read_text())
                return str(checkpoint)
        return None


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


def _digest(pieces: Iterable[str | bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.encode() if isinstance(piece, str) else piece)
    return digest.hexdigest()


def _digests(teacher: PreTrainedModel | Mapping[str, PreTrainedModel] | None) -> str | dict[str, str] | None:
    if isinstance(teacher, Mapping):
        return {name: _model_digest(model) for name, model in teacher.items()}
    return None if teacher is None else _model_digest(teacher)


def _model_digest(model: PreTrainedModel) -> str:
    """Of the model's weights and of what its config says beside where and by what it was written."""
    config = model.config.to_dict()
    for key in ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"):
        config.pop(key, None)

    def pieces() -> Iterable[str | memoryview]:
        yield json.dumps([type(model).__name__, config], sort_keys=True, default=str)
        for name, tensor in sorted(model.state_dict().items()):
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}"
            yield tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data

    return _digest(pieces())
