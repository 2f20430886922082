"""How every recipe begins: the task's data, a pretrained model, and of it a teacher fine-tuned on the task."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from transformers import PreTrainedModel

from fastdistill.data.load import TaskData, load_task
from fastdistill.data.tasks import Task
from fastdistill.models.loading import describe_head, load_classifier, load_tokenizer
from fastdistill.objectives.logits import TaskLoss
from fastdistill.processes import join
from fastdistill.recipes.examples import Examples, of_text
from fastdistill.recipes.stages import Stages, Trained

TEACHER_EPOCHS = 2.0
TEACHER_RATE, STUDENT_RATE, WIDTH = 1e-4, 3e-4, 384
"""Peak learning rates for encoders of this hidden width or less; the wider need less, as its inverse square."""


@dataclass(frozen=True)
class Beginning:
    """What there is before anything is trained; `settings` are for the report."""

    options: argparse.Namespace
    data: TaskData
    pretrained: PreTrainedModel
    teacher_epochs: float

    @property
    def settings(self) -> dict[str, object]:
        return {**vars(self.options), "teacher_epochs": self.teacher_epochs}

    def stages(self) -> Stages:
        options = self.options
        return stages_of(options, of_text(self.data, load_tokenizer(options.teacher), options.max_length))

    def teacher(self, stages: Stages) -> Trained:
        """The stage "teacher": fine-tuned on the task, unless it is a classifier of it already."""
        rate = self.options.teacher_learning_rate
        return stages.train("teacher", self.pretrained, TaskLoss(), epochs=self.teacher_epochs, learning_rate=rate)


def load(options: argparse.Namespace) -> TaskData:
    """The data that the options of `fastdistill.recipes.options.add_run` name."""
    join()
    return load_task(
        options.task,
        max_train_examples=options.max_train_examples,
        max_eval_examples=options.max_eval_examples,
        seed=options.seed,
    )


def stages_of(options: argparse.Namespace, examples: Examples) -> Stages:
    return Stages(
        options.output,
        examples,
        batch_size=options.batch_size,
        seed=options.seed,
        bf16=options.bf16,
        checkpoints=options.checkpoints,
        tensorboard=options.tensorboard,
    )


def begin(options: argparse.Namespace, data: TaskData | None = None) -> Beginning:
    """Load what the options of `fastdistill.recipes.options.add_run` and `add_training` name; nothing is written.

    Learning rates that were left open are filled in. Raises ValueError for a task of images.
    """
    data = load(options) if data is None else data
    if data.task.is_of_images:
        raise ValueError(f"--task {options.task} is of images; expected one of text")
    teacher_epochs = _teacher_epochs(options, data.task)
    pretrained = load_classifier(options.teacher, data.task, seed=options.seed)
    narrow = min(1.0, WIDTH / pretrained.config.hidden_size) ** 2
    options.learning_rate = options.learning_rate or STUDENT_RATE * narrow
    options.teacher_learning_rate = options.teacher_learning_rate or TEACHER_RATE * narrow
    return Beginning(options, data, pretrained, teacher_epochs)


def _teacher_epochs(options: argparse.Namespace, task: Task) -> float:
    """As asked or, if nothing is asked, none where the teacher's config says that it is a classifier of the task."""
    head = describe_head(options.teacher, task)
    if options.teacher_epochs == 0 and head not in ("task", "unnamed"):
        raise ValueError(
            f"--teacher-epochs is 0 but {options.teacher} is no classifier of {task.name} "
            f"({task.num_labels} labels); it must be fine-tuned"
        )
    if options.teacher_epochs is not None:
        return float(options.teacher_epochs)
    if head == "task":
        print(f"teacher: {options.teacher} is a classifier of {task.name} already; taken as it is")
        return 0.0
    return TEACHER_EPOCHS
