"""Pea-KD: a student whose layers are applied twice (SPS), and who first learns how its teacher does (PTP)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from fastdistill.data.tasks import Task
from fastdistill.models.students import first_layers, shuffled_sharing
from fastdistill.objectives.base import Objective, WeightedSum
from fastdistill.objectives.logits import LogitsKD, TaskLoss
from fastdistill.objectives.pkd import PKD
from fastdistill.recipes.baselines import baselines
from fastdistill.recipes.begin import Beginning, begin
from fastdistill.recipes.comparison import Comparison, chain_of, compare
from fastdistill.recipes.methods.ptp import (
    PTP_LABELS,
    THRESHOLDS,
    count_ptp_labels,
    ptp_labels,
    ptp_student,
    with_body_of,
)
from fastdistill.recipes.output import of_one_run
from fastdistill.recipes.report import Report, summary
from fastdistill.recipes.settings import PeaKDSettings
from fastdistill.recipes.settings.peakd import Part
from fastdistill.recipes.stages import Stages
from fastdistill.recipes.training import Trained, Training
from fastdistill.teachers.outputs import LOGITS

PARTS: tuple[Part, ...] = ("sps", "swap", "ptp")
"""In the order in which names have them."""


@of_one_run
def peakd(settings: PeaKDSettings) -> Report:
    """Do the recipe and write results.json.

    1. The teacher is fine-tuned on the task, unless it is a classifier of it already.
    2. SPS: the student is the pretrained encoder's first layers, or the teacher's, which are applied again with query
       and key swapped.
    3. PTP: each example is labelled by whether the teacher has it right, and is confident. The student learns these
       labels to the lowest loss on the examples that select, and has then its first output layer again.
    4. It learns from labels, logits and hidden states; and so do the variants and baselines that are asked for, each
       with every seed.
    """
    beginning = begin(settings)
    task = beginning.task
    if task.is_regression:
        raise ValueError(f"{task.name} is regression: there are no classes for the teacher to be confident of")
    _check_layers(settings, first_layers(beginning.pretrained, settings.student_layers), beginning.depth)
    chain = chain_of(settings, beginning.depth)
    objective = _objective(settings)
    threshold = settings.threshold if settings.threshold else THRESHOLDS.get(task.name, (0.8,))
    ptp_epochs = settings.ptp_epochs or settings.epochs
    _check_folds(settings, beginning)
    comparison = compare(beginning)

    teacher = comparison.teach(beginning.teacher())
    student = first_layers(comparison.source, settings.student_layers)
    others = {
        name: comparison.baseline(name, student, learner) for name, learner in baselines(comparison, chain).items()
    }
    if "kd" in others:  # as long as the student learns in all
        others["kd-longer"] = replace(others["kd"], name="kd-longer", epochs=settings.epochs + ptp_epochs)
    comparison.students(others.values())

    labels = _labels(settings, beginning, comparison.stages, teacher.model, threshold)
    counts = {on: count_ptp_labels(of) for on, of in labels.items()}
    if missing := [name for name, number in counts["train"].items() if not number]:
        comparison.stages.console.print(
            f"PTP: on no training example is the teacher {' or '.join(missing)}; --threshold sets from where it counts "
            "as confident",
            highlight=False,
            soft_wrap=True,
        )
    runs = [_Run(settings, comparison, stages, teacher.model, student, labels) for stages in comparison.seeded]
    variants = _variants(settings)
    trained = comparison.train(
        (run.stages, run.training(name, without, objective)) for name, without in variants.items() for run in runs
    )
    for name, without in variants.items():
        comparison.summarize(name, [next(trained).result for _ in runs])
        comparison.results[name]["layers"] = runs[0].shared(without).config.num_hidden_layers

    pretrained = {
        name: summary("accuracy", [run.pretrained[name].result for run in runs]) for name in runs[0].pretrained
    }
    record = beginning.record() | {
        "objective": repr(objective),
        "threshold": threshold,
        "ptp_epochs": ptp_epochs,
    }
    return comparison.finish(record, _table(task, counts), ptp={"labels": counts, "students": pretrained})


class _Run:
    """The method with one seed."""

    def __init__(
        self,
        settings: PeaKDSettings,
        comparison: Comparison,
        stages: Stages,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        labels: Mapping[str, Tensor],
    ) -> None:
        self.settings, self.comparison, self.stages = settings, comparison, stages
        self.teacher, self.student = teacher, student
        self.ptp = stages.relabelled(_ptp_task(stages.task), labels["train"], labels["validation"])
        self.pretrained: dict[str, Trained] = {}

    def shared(self, without: tuple[Part, ...]) -> PreTrainedModel:
        """The student, its layers applied twice."""
        if "sps" in without:
            return self.student
        return shuffled_sharing(self.student, self.settings.shared_layers, swap="swap" not in without)

    def training(self, name: str, without: tuple[Part, ...], objective: Objective) -> Training:
        """The student's without some parts, once it is pretrained."""
        student = self.shared(without)
        if "ptp" not in without:
            student = self._pretrain(_name("ptp", without), student)
        return self.comparison.training(
            name, student, (objective, self.teacher), store_hidden_states=self.settings.store_hidden_states
        )

    def _pretrain(self, name: str, student: PreTrainedModel) -> PreTrainedModel:
        training = self.comparison.training(name, ptp_student(student, seed=self.stages.seed), (TaskLoss(), None))
        epochs = self.settings.ptp_epochs or self.settings.epochs
        self.pretrained[name] = self.ptp.train(
            self.comparison.measured(self.ptp, replace(training, epochs=epochs, best="loss"))
        )
        return with_body_of(student, self.pretrained[name].model)


def _name(of: str, without: tuple[str, ...]) -> str:
    return "-".join((of, "without", *without)) if without else of


def _variants(settings: PeaKDSettings) -> dict[str, tuple[Part, ...]]:
    """What is to be trained: names, and the parts that are left out."""
    ordered = [tuple(part for part in PARTS if part in parts) for parts in ((), *settings.without)]
    return {_name("peakd", parts): parts for parts in ordered}


def _check_layers(settings: PeaKDSettings, student: PreTrainedModel, depth: int) -> None:
    """Before anything is trained, that layers can be shared, and paired with the teacher's."""
    applied = shuffled_sharing(student, settings.shared_layers).config.num_hidden_layers
    if settings.beta and applied > depth:
        raise ValueError(
            f"with --student-layers {settings.student_layers} the student applies {applied} layers, but the teacher "
            f"has {depth} to pair them with; expected fewer of --student-layers or --shared-layers, or --beta 0"
        )


def _objective(settings: PeaKDSettings) -> Objective:
    """(1 - alpha) CE + alpha tau^2 KL + beta PKD. The factor tau^2 is the published code's; without it a temperature
    of 10 would leave nearly nothing of the teacher's term. PKD is a mean over pairs of layers, where the paper prints a
    sum, and over the hidden size, as in that code, to which beta belongs."""
    return WeightedSum(
        {
            "ce": (1 - settings.alpha, TaskLoss(settings.smoothing)),
            "kd": (settings.alpha, LogitsKD(temperature=settings.temperature, ce_weight=0.0)),
            "pkd": (settings.beta, PKD(over=settings.pkd_over)),
        }
    )


def _labels(
    settings: PeaKDSettings,
    beginning: Beginning,
    stages: Stages,
    teacher: PreTrainedModel,
    threshold: tuple[float, ...],
) -> dict[str, Tensor]:
    """By split. Those of the training examples are by the teacher, which has learned them, or out of fold."""
    outputs = stages.outputs_of(teacher, "validation").with_format("torch")[:]
    labels = {"validation": ptp_labels(outputs["teacher" + LOGITS], outputs["labels"], threshold)}
    number = len(stages.examples.train)
    found = torch.empty(number, dtype=torch.int64)
    for fold in range(settings.ptp_folds):
        rows, model, others = torch.arange(fold, number, settings.ptp_folds), teacher, stages
        if settings.ptp_folds > 1:
            rest = torch.tensor([row for row in range(number) if row % settings.ptp_folds != fold])
            training = replace(beginning.teacher(), name=f"teacher-fold-{fold + 1}")
            model = stages.on_training(rest).train(training).model
            others = stages.on_training(rows)
        outputs = others.outputs_of(model).with_format("torch")[:]
        found[rows] = ptp_labels(outputs["teacher" + LOGITS], outputs["labels"], threshold)
    return {"train": found, **labels}


def _check_folds(settings: PeaKDSettings, beginning: Beginning) -> None:
    number = len(beginning.data.train)
    if settings.ptp_folds > number:
        raise ValueError(f"--ptp-folds is {settings.ptp_folds}; expected at most the {number} training examples")
    if settings.ptp_folds > 1 and not beginning.teacher_epochs:
        raise ValueError(
            f"--ptp-folds is {settings.ptp_folds}, but the teacher is taken as it is; expected one that is fine-tuned "
            "here, or 1"
        )


def _ptp_task(task: Task) -> Task:
    return replace(task, name=f"{task.name}-ptp", label_names=PTP_LABELS, metric="accuracy", hub=None)


def _table(task: Task, counts: Mapping[str, Mapping[str, int]]) -> Table:
    """How many examples of each class there are."""
    table = Table("the teacher is", title=f"PTP labels: {task.name}")
    for on in counts:
        table.add_column(on, justify="right")
    for name in next(iter(counts.values())):
        table.add_row(name, *(f"{of[name]:,}" if of[name] else "none" for of in counts.values()))
    return table
