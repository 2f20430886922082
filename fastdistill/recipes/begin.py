"""How every recipe begins: the task's data, a pretrained model, and of it a teacher fine-tuned on the task."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from fastdistill.data.load import load_task
from fastdistill.data.tasks import Task
from fastdistill.models.loading import check_tokenizer, describe_head, label_names, load_classifier, load_tokenizer
from fastdistill.objectives.logits import TaskLoss
from fastdistill.processes import join, rank_and_number
from fastdistill.recipes.examples import Examples, of_text
from fastdistill.recipes.optimization import optimization_of
from fastdistill.recipes.settings import RecipeSettings
from fastdistill.recipes.splits import Splits, splits_of
from fastdistill.recipes.stages import Stages
from fastdistill.recipes.training import Training

RATES = ("learning_rate", "teacher_learning_rate")
TEACHER_EPOCHS = 2.0
TEACHER_RATE, STUDENT_RATE, WIDTH = 1e-4, 3e-4, 384
"""Peak learning rates for encoders of this hidden width or less; the wider need less, as its inverse square."""


@dataclass(frozen=True)
class Beginning:
    """What there is before anything is trained, and what the settings leave open."""

    settings: RecipeSettings
    data: Splits
    pretrained: PreTrainedModel
    student_from: str
    teacher_epochs: float
    learning_rate: float
    teacher_learning_rate: float

    @property
    def task(self) -> Task:
        return self.data.task

    @property
    def depth(self) -> int:
        return int(self.pretrained.config.num_hidden_layers)

    def record(self) -> dict[str, Any]:
        """The settings for results.json, with what they left open."""
        filled = {name: getattr(self, name) for name in ("teacher_epochs", "student_from", *RATES)}
        return self.settings.record() | filled | asdict(optimization_of(self.settings)) | self.data.names

    def stages(self) -> Stages:
        assert self.settings.teacher is not None
        tokenizer = load_tokenizer(self.settings.teacher)
        check_tokenizer(self.settings.teacher, tokenizer, self.pretrained)
        return stages_of(self.settings, of_text(self.data, tokenizer, self.settings.max_length))

    def teacher(self) -> Training:
        """The stage "teacher": fine-tuned on the task, unless it is a classifier of it already."""
        return Training(
            name="teacher",
            model=self.pretrained,
            objective=TaskLoss(),
            epochs=self.teacher_epochs,
            learning_rate=self.teacher_learning_rate,
            batch_size=self.settings.batch_size,
        )


def load(settings: RecipeSettings, *, aspects: bool = False) -> Splits:
    """The data that is asked for."""
    join()
    data = load_task(
        settings.task,
        max_train_examples=settings.max_train_examples,
        max_eval_examples=settings.max_eval_examples,
        seed=settings.seed,
        aspects=aspects,
    )
    return splits_of(settings, data)


def stages_of(settings: RecipeSettings, examples: Examples) -> Stages:
    return Stages(
        settings.folder,
        examples,
        batch_size=settings.batch_size,
        seed=settings.seed,
        bf16=settings.bf16,
        cuda_graphs=not settings.no_cuda_graphs,
        checkpoints=settings.checkpoints,
        tensorboard=settings.tensorboard,
        patience=settings.early_stopping,
        optimization=optimization_of(settings, is_of_images=examples.task.is_of_images),
    )


def begin(settings: RecipeSettings, data: Splits | None = None) -> Beginning:
    """Load what is asked for; nothing is written. Raises ValueError for a task of images."""
    data = load(settings) if data is None else data
    if data.task.is_of_images:
        raise ValueError(f"--task {settings.task} is of images; expected one of text")
    if data.task.multi_label:
        raise ValueError(
            f"--task {settings.task} has several labels an example, which no recipe takes; expected one label, or "
            "fastdistill.DistillationTrainer, which does"
        )
    if settings.teacher is None:
        raise ValueError(f"--teacher is None; expected a model for {data.task.name}")
    if data.task.is_regression:
        _tell(f"{data.task.name}: its labels are numbers with decimals: a regression")
    optimization_of(settings)  # if it cannot be, say so before anything is loaded
    teacher_epochs = _teacher_epochs(settings.teacher, settings.teacher_epochs, data.task)
    pretrained = load_classifier(settings.teacher, data.task, seed=settings.seed)
    narrow = min(1.0, WIDTH / pretrained.config.hidden_size) ** 2
    return Beginning(
        settings,
        data,
        pretrained,
        _student_from(settings, teacher_epochs),
        teacher_epochs,
        settings.learning_rate or STUDENT_RATE * narrow,
        settings.teacher_learning_rate or TEACHER_RATE * narrow,
    )


def _tell(text: str) -> None:
    if rank_and_number()[0] == 0:
        print(text)


def _student_from(settings: RecipeSettings, teacher_epochs: float) -> str:
    if teacher_epochs:
        return settings.student_from or settings.begins_as
    if settings.student_from == "pretrained":
        raise ValueError(
            f"--student-from is pretrained, but {settings.teacher} is a classifier already; expected teacher, or a "
            "--teacher that is fine-tuned here"
        )
    return "teacher"


def _teacher_epochs(teacher: str, asked: float | None, task: Task) -> float:
    """As asked or, if nothing is asked, none where the teacher's config says that it is a classifier of the task."""
    head, names = describe_head(teacher, task), label_names(teacher)
    wanted = "a number" if task.label_names is None else ", ".join(task.label_names)
    if asked == 0 and head not in ("task", "unnamed"):
        theirs = "no classifier" if names is None else f"a classifier of {', '.join(names)}"
        raise ValueError(
            f"--teacher-epochs is 0 but {teacher} is {theirs}; expected one of {task.name}'s labels, {wanted}, in this "
            "order, or epochs in which it is fine-tuned"
        )
    if asked is not None:
        return float(asked)
    if head == "task":
        _tell(f"teacher: {teacher} is a classifier of {task.name} already; taken as it is")
        return 0.0
    if names is not None:
        as_it_is = "; --teacher-epochs 0 takes it as it is" if head == "unnamed" else ""
        _tell(
            f"teacher: {teacher} is a classifier of {', '.join(names)}, and {task.name}'s labels are {wanted}: it is "
            f"fine-tuned on them for {TEACHER_EPOCHS:g} epochs{as_it_is}"
        )
    return TEACHER_EPOCHS
