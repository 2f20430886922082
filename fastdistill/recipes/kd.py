"""Plain knowledge distillation: a fine-tuned teacher and, made of its first layers, a student with and without it."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from fastdistill.recipes import options as shared

if TYPE_CHECKING:
    from fastdistill.data.tasks import Task
    from fastdistill.objectives.base import Objective
    from fastdistill.ops.kd_ce_loss import Divergence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_run(parser)
    shared.add_training(parser)
    shared.add_distillation(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Do the recipe, print its table and write results.json; returns what that holds.

    1. The teacher is fine-tuned on the task, unless it is a classifier of it already.
    2. The student is the teacher's first layers, embeddings and head. Two copies see the same batches:
       "finetuned" learns from the labels alone, "distilled" from the labels and the teacher.
    """
    from fastdistill.models.students import first_layers
    from fastdistill.objectives.logits import TaskLoss
    from fastdistill.recipes.begin import begin
    from fastdistill.recipes.report import finish

    started = time.perf_counter()
    beginning = begin(options)
    task = beginning.data.task
    objective = logits_objective(options, task)
    first_layers(beginning.pretrained, options.student_layers)  # if it cannot be, say so before the teacher is trained
    stages = beginning.stages()

    teacher = beginning.teacher(stages)
    student = first_layers(teacher.model, options.student_layers)
    training = {"epochs": options.epochs, "learning_rate": options.learning_rate}
    finetuned = stages.train("finetuned", student, TaskLoss(options.label_smoothing or 0.0), **training)
    distilled = stages.train("distilled", student, objective, teacher=teacher.model, **training)

    results = {"teacher": teacher.result, "finetuned": finetuned.result, "distilled": distilled.result}
    settings = {**beginning.settings, "objective": repr(objective)}
    return finish(options.output, settings, task, results, time.perf_counter() - started)


def logits_objective(
    options: argparse.Namespace, task: Task, *, divergence: Divergence = "forward_kl", has_labels: bool = True
) -> Objective:
    """By the options of `fastdistill.recipes.options.add_distillation`, of which `divergence` is the default; or the
    part of it that is of the teacher alone."""
    from fastdistill.objectives.logits import MSE, LogitsKD

    label_weight = options.ce_weight if has_labels else 0.0
    if task.is_regression:
        for option in ("temperature", "divergence", "label_smoothing"):
            if (value := getattr(options, option)) is not None:
                name = option.replace("_", "-")
                raise ValueError(f"--{name} is {value}, but {task.name} is regression: there are no classes")
        return MSE(kd_weight=options.kd_weight, label_weight=label_weight)
    return LogitsKD(
        temperature=options.temperature or 2.0,
        kd_weight=options.kd_weight,
        ce_weight=label_weight,
        divergence=options.divergence or divergence,
        label_smoothing=options.label_smoothing or 0.0 if has_labels else 0.0,
    )
