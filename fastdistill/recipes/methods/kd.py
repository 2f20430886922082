"""Plain knowledge distillation: a fine-tuned teacher and, made of its first layers, a student with and without it."""

from __future__ import annotations

from fastdistill.data.tasks import Task
from fastdistill.models.students import first_layers
from fastdistill.objectives.base import Objective
from fastdistill.objectives.logits import MSE, LogitsKD, TaskLoss
from fastdistill.ops.kd_ce_loss import Divergence
from fastdistill.recipes.baselines import baselines
from fastdistill.recipes.begin import begin
from fastdistill.recipes.comparison import Learner, chain_of, compare
from fastdistill.recipes.output import of_one_run
from fastdistill.recipes.report import Report
from fastdistill.recipes.settings import KDSettings, StarkSettings


@of_one_run
def kd(settings: KDSettings) -> Report:
    """Do the recipe and write results.json.

    1. The teacher is fine-tuned on the task, unless it is a classifier of it already.
    2. The student is the teacher's first layers, embeddings and head, or the pretrained encoder's. Two copies see the
       same batches: "finetuned" learns from the labels alone, "distilled" from the labels and the teacher.
    """
    beginning = begin(settings)
    objective = logits_objective(settings, beginning.task)
    first_layers(beginning.pretrained, settings.student_layers)  # if it cannot be, say so before anything is trained
    chain = chain_of(settings, beginning.depth)
    comparison = compare(beginning, in_place=True)

    teacher = comparison.teach(beginning.teacher())
    student = first_layers(comparison.source, settings.student_layers)
    learners: dict[str, Learner] = {"finetuned": (TaskLoss(settings.smoothing), None)}
    learners |= baselines(comparison, chain)
    learners["distilled"] = (objective, teacher.model)
    if objective == comparison.kd:
        learners.pop("kd", None)  # it is the method itself
    comparison.students(comparison.baseline(name, student, learner) for name, learner in learners.items())
    if settings.compares_with("kd") and "kd" not in learners:
        comparison.name_too("distilled", "kd")

    record = beginning.record() | {"objective": repr(objective)}
    return comparison.finish(record)


def logits_objective(
    settings: KDSettings | StarkSettings,
    task: Task,
    *,
    divergence: Divergence = "forward_kl",
    has_labels: bool = True,
) -> Objective:
    """By `DistillationSettings`, of which `divergence` is the default; or the part that is of the teacher alone."""
    label_weight = settings.ce_weight if has_labels else 0.0
    if task.is_regression:
        for option in ("temperature", "divergence", "label_smoothing", "form"):
            if (value := getattr(settings, option)) is not None:
                name = option.replace("_", "-")
                raise ValueError(f"--{name} is {value}, but {task.name} is regression: there are no classes")
        return MSE(kd_weight=settings.kd_weight, label_weight=label_weight)
    half = 0.5 if settings.form == "released" else 1.0
    return LogitsKD(
        temperature=settings.temperature or 2.0,
        kd_weight=half * settings.kd_weight,
        ce_weight=half * label_weight,
        divergence=settings.divergence or divergence,
        scale_by_temperature=settings.form != "paper",
        label_smoothing=settings.smoothing if has_labels else 0.0,
    )
