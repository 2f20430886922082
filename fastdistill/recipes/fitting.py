"""How a stage's model is trained: with transformers' Trainer, shared evenly by processes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from transformers import PreTrainedModel, TrainerState
from transformers.integrations.fsdp import is_fsdp_enabled
from transformers.trainer_callback import ProgressCallback

from fastdistill.data.images import Augmented
from fastdistill.data.metrics import compute_metrics
from fastdistill.models.cpu_kernels import cpu_kernels
from fastdistill.models.drawing import draw_anew
from fastdistill.models.first_token import first_token_only
from fastdistill.models.vocabulary import can_compact, compact_vocabulary
from fastdistill.objectives.metakd import MetaKD
from fastdistill.objectives.selection import EXAMPLE
from fastdistill.recipes.best import BestEpoch, Noted
from fastdistill.recipes.examples import Examples
from fastdistill.recipes.optimization import Optimization
from fastdistill.recipes.training import Teacher, Training
from fastdistill.training.config import DistillationConfig
from fastdistill.training.meta import MetaTrainer
from fastdistill.training.trainer import DistillationTrainer

if TYPE_CHECKING:
    from datasets import Dataset

RUNS_APART = 1_000_003
"""How far the seeds of repeated trainings lie from one another."""

CHECKPOINTS, CHECKPOINTS_APART = 3, 30.0
"""How often a training saves its state, and how many seconds lie between at least, where nothing is said."""


@dataclass(frozen=True)
class Fitted:
    """A trained model, what it reaches on the examples that select, in which epoch, what was logged, how many examples
    a second it was trained on, if any, and its outputs on those that are reported, with their labels and mean loss; and
    on the mismatched ones the metrics."""

    model: PreTrainedModel
    selection: float
    epoch: float
    log: list[dict[str, float]]
    speed: float | None
    outputs: np.ndarray[Any, np.dtype[Any]]
    labels: np.ndarray[Any, np.dtype[Any]]
    loss: float
    mismatched: dict[str, float]


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be trained: a copy of the training's, with the embeddings of its data alone."""

    training: Training
    trainer: DistillationTrainer
    best: BestEpoch
    checkpoint: str | None

    @property
    def student(self) -> PreTrainedModel:
        student: PreTrainedModel = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return student

    def hide_progress(self) -> None:
        """Show no bar of its own."""
        self.trainer.remove_callback(_ProgressBar)

    def train(self) -> Any:
        """To the end, or to where there has been no better epoch for too long; what the trainer's `train` returns, or
        None where that is reached already."""
        checkpoint, before = self.checkpoint, None
        if checkpoint is not None:
            before = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        if before is not None and not self.best.can_go_on(before):
            before = checkpoint = None  # the best so far is lost: it begins anew
        if before is not None and self.best.is_over(before.log_history):
            self.trainer.state = before
            self.trainer.state.global_step = -1  # the model has the weights of no step
            return None
        return self.trainer.train(resume_from_checkpoint=checkpoint)


def fit(
    training: Training,
    examples: Examples,
    train_data: Dataset,
    teacher: Teacher,
    config: DistillationConfig,
    checkpoint: str | None,
    patience: int | None = None,
    kind: type[DistillationTrainer] | None = None,
) -> Generator[Prepared, None, Fitted]:
    """Train a copy of the model, from its checkpoint on, evaluate it after each epoch, and take the best. What of it is
    not pretrained is drawn by the training's own seed.

    It stops where the copy is to be trained, and gives it: whoever goes on has trained it, with its trainer, which is
    of that `kind`, a plain one by default. With no epochs there is nothing to train, and it does not stop.

    `train_data` has what the teacher says as columns where `teacher` is None. Processes (torchrun, accelerate launch)
    share each batch, and find what one alone would, within rounding, but for dropout, whose numbers are each process's
    own, and for objectives that choose among a batch's examples (`DeKD`): each process chooses among its share. FSDP's
    parameters are gathered.
    """
    student = copy.deepcopy(training.model)
    draw_anew(student, config.seed)
    trainer = _trainer_of(training, student, examples, train_data, teacher, config, kind or DistillationTrainer)
    metric, objective = examples.task.metric, trainer.objective
    best = BestEpoch(trainer, Path(str(config.output_dir)), metric, training.best, patience)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_ProgressBar(training.name))
    trainer.add_callback(best)
    teachers = teacher.values() if isinstance(teacher, Mapping) else (teacher,)
    # what is a CPU's has no tangents, which MetaTrainer asks for
    others = () if isinstance(trainer, MetaTrainer) else (student, *teachers)
    with (
        _compact(student, examples, trainer),
        cpu_kernels(*others),
        first_token_only(*(() if objective.needs.all_tokens else (student, *teachers))),
    ):
        if training.epochs:
            yield Prepared(training, trainer, best, checkpoint)
        if not best.evaluations(trainer.state.log_history):  # there was nothing to train
            trainer.evaluate()
        log = trainer.state.log_history
        best.restore(log)
        chosen = best.best(log)
        reported: Any = best.said
        loss = chosen["eval_loss"]
        if reported is None or examples.report is not examples.validation:
            reported = trainer.predict(examples.report)
            loss = reported.metrics["test_loss"]
        mismatched: dict[str, float] = {}
        if examples.mismatched is not None:
            mismatched = trainer.predict(examples.mismatched, metric_key_prefix="mismatched").metrics or {}
    return Fitted(
        model=_whole(trainer, training.model),
        selection=chosen[f"eval_{metric}"],
        epoch=chosen.get("epoch", 0.0),
        log=log,
        speed=next((entry["train_samples_per_second"] for entry in log if "train_samples_per_second" in entry), None),
        outputs=reported.predictions.reshape(len(examples.report), -1),
        labels=reported.label_ids,
        loss=loss,
        mismatched={name: value for name, value in mismatched.items() if name == f"mismatched_{metric}"},
    )


def _trainer_of(
    training: Training,
    student: PreTrainedModel,
    examples: Examples,
    train_data: Dataset,
    teacher: Teacher,
    config: DistillationConfig,
    make: Callable[..., DistillationTrainer],
) -> DistillationTrainer:
    """With an objective and callbacks of its own, which may learn, or remember."""
    objective, callbacks = copy.deepcopy((training.objective, training.callbacks))
    if EXAMPLE in objective.needs.columns:
        train_data = train_data.add_column(EXAMPLE, np.arange(len(train_data)))
    if isinstance(objective, MetaKD):
        held_out = train_data.train_test_split(test_size=objective.quiz, seed=config.seed)
        train_data, make = held_out["train"], partial(MetaTrainer, quiz_dataset=held_out["test"])
    shown = train_data if examples.augment is None else examples.augment(train_data, seed=config.seed)
    trainer = make(
        model=student,
        teacher_model=teacher,
        objective=objective,
        args=config,
        train_dataset=shown,
        eval_dataset=examples.validation,
        processing_class=examples.tokenizer,
        data_collator=examples.collate,
        compute_metrics=Noted(compute_metrics(examples.task)),
        callbacks=list(callbacks),
    )
    if isinstance(shown, Augmented):
        shown.epoch = lambda: int(trainer.state.epoch or 0)
    return trainer


def _compact(
    student: PreTrainedModel, examples: Examples, trainer: DistillationTrainer
) -> AbstractContextManager[None]:
    """With the embeddings that the examples have, where that can be."""
    tokens = examples.tokens()
    if tokens is None or trainer.is_fsdp_enabled or not can_compact(student):
        return nullcontext()
    return compact_vocabulary(student, tokens)


def config_of(
    training: Training,
    folder: Path,
    optimization: Optimization,
    *,
    seed: int,
    bf16: bool,
    cuda_graphs: bool,
    checkpoints: int | None,
    tensorboard: bool,
) -> DistillationConfig:
    """Trainer's arguments; `checkpoints` are as of `Stages`."""
    number = CHECKPOINTS if checkpoints is None else checkpoints
    config = DistillationConfig(
        output_dir=str(folder),
        num_train_epochs=training.epochs,
        learning_rate=training.learning_rate,
        per_device_train_batch_size=training.batch_size // PartialState().num_processes,
        per_device_eval_batch_size=max(64, training.batch_size),
        **optimization.arguments(),
        seed=(seed + training.run * RUNS_APART) % 2**32,
        bf16=bf16,
        cuda_graphs=cuda_graphs,
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=0.05,
        save_strategy="steps" if number else "no",
        save_steps=1 / (number + 1),
        min_save_seconds=CHECKPOINTS_APART if checkpoints is None else 0.0,
        save_total_limit=2,  # the one before, should the last be damaged
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="tensorboard" if tensorboard else "none",
        log_level="error",
        disable_tqdm=False,
    )
    config._n_gpu = min(config.n_gpu, 1)  # torchrun is for several: DataParallel would have a batch of each
    return config


class _ProgressBar(ProgressCallback):
    """Trainer's progress bar with the stage's name before and the loss behind, in place of a printed line a log; none
    for evaluations, which come after each epoch."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        pass

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in logs:
            hidden = ("grad_norm", "learning_rate", "epoch")  # and details, "entropy/0"
            shown = {k: f"{v:.3g}" for k, v in logs.items() if k not in hidden and "/" not in k}
            self.training_bar.set_postfix(shown)


def check_processes(batch_size: int) -> None:
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
