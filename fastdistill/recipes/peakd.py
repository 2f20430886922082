"""Pea-KD: a student whose layers are applied twice (SPS), and who first learns how its teacher does (PTP)."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastdistill.recipes import options as shared

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor
    from transformers import PreTrainedModel

    from fastdistill.data.tasks import Task
    from fastdistill.objectives.base import Objective
    from fastdistill.recipes.stages import Stages, Trained

PARTS = ("sps", "swap", "ptp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_run(parser)
    shared.add_training(parser)
    add = parser.add_argument_group("Pea-KD").add_argument
    add(
        "--shared-layers",
        type=shared.integer(1),
        metavar="K",
        help="the student's top layers that are applied again (default: all, of six layers three)",
    )
    add(
        "--threshold",
        type=shared.listed(shared.number(above=0.5, most=1), different=False),
        metavar="X[,X]",
        help="probability above which the teacher is confident; of two the first where it is right, the second where "
        "it is wrong (default: the published code's for mrpc, qnli, rte and sst2, else 0.8)",
    )
    add(
        "--ptp-epochs",
        type=shared.number(above=0),
        metavar="N",
        help="epochs of a student's pretraining with the teacher's predictions (default: --epochs)",
    )
    add(
        "--alpha",
        type=shared.number(low=0, most=1),
        default=0.7,
        metavar="X",
        help="weight of the teacher's term, and 1 less it that of the labels (default: %(default)g)",
    )
    add(
        "--beta",
        type=shared.number(low=0),
        default=100.0,
        metavar="X",
        help="weight of the hidden states' term (default: %(default)g)",
    )
    add(
        "--temperature",
        type=shared.number(above=0),
        default=10.0,
        metavar="X",
        help="of the softmax on both sides; the teacher's term is multiplied by its square (default: %(default)g)",
    )
    shared.add_storing(add)
    add = parser.add_argument_group("what else to train").add_argument
    add(
        "--without",
        type=shared.listed(shared.choice(*PARTS)),
        action="append",
        default=[],
        metavar="PART[,PART]",
        help="a student without shared layers (sps), whose shared layers do not swap query and key (swap: SPS-1), or "
        "without pretraining (ptp), or several of these at once; may be repeated, for a student each",
    )
    shared.add_comparison(parser, plots=False)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Do the recipe, print its tables and write results.json; returns what that holds.

    1. The teacher is fine-tuned on the task, unless it is a classifier of it already.
    2. SPS: the student is the teacher's first layers, which are applied again with query and key swapped.
    3. PTP: each example is labelled by whether the teacher has it right, and is confident. The student learns these
       labels, and has then its first head again.
    4. It learns from labels, logits and hidden states; and so do the variants and baselines that are asked for, each
       with every seed.
    """
    from fastdistill.models.students import first_layers
    from fastdistill.objectives.logits import LogitsKD, TaskLoss
    from fastdistill.recipes.assistants import Assistants, chain_of
    from fastdistill.recipes.begin import begin
    from fastdistill.recipes.ptp import THRESHOLDS, count_ptp_labels
    from fastdistill.recipes.report import finish, summary

    started = time.perf_counter()
    variants = _variants(options)
    beginning = begin(options)
    task = beginning.data.task
    if task.is_regression:
        raise ValueError(f"{task.name} is regression: there are no classes for the teacher to be confident of")
    options.threshold = options.threshold or THRESHOLDS.get(task.name, (0.8,))
    if len(options.threshold) > 2:
        raise ValueError(f"--threshold has {len(options.threshold)} numbers; expected one or two")
    if options.kd_temperature is not None and not (options.baselines or options.chain):
        raise ValueError("--kd-temperature would have no effect without --baselines or --chain; leave it out")
    if options.store_hidden_states and not options.beta:
        raise ValueError("--store-hidden-states would have no effect with --beta 0; leave it out")
    options.ptp_epochs = options.ptp_epochs or options.epochs
    depth = beginning.pretrained.config.num_hidden_layers
    _check_layers(options, first_layers(beginning.pretrained, options.student_layers), depth)
    chain = chain_of(options, depth)
    objective = _objective(options)
    stages = beginning.stages()
    kd = LogitsKD(temperature=options.kd_temperature or 2.0, label_smoothing=options.label_smoothing or 0.0)
    training = {"epochs": options.epochs, "learning_rate": options.learning_rate}

    teacher = beginning.teacher(stages)
    results: dict[str, Any] = {"teacher": teacher.result}
    source = Assistants(stages, teacher, kd, training, results)(*chain[:-1]).model if chain else None
    student = first_layers(teacher.model, options.student_layers)
    seeded = [stages.seeded(seed) for seed in options.seeds or (options.seed,)]

    def students(name: str, objective: Objective, teacher: PreTrainedModel | None = None) -> None:
        found = [one.train(name, student, objective, teacher=teacher, **training).result for one in seeded]
        results[name] = summary(task.metric, found)

    if options.baselines:
        students("finetuned", TaskLoss(options.label_smoothing or 0.0))
        students("kd", kd, teacher.model)
    if source is not None:
        students("takd", kd, source)

    labels = {on: _labels(options, stages, teacher.model, on) for on in ("train", "validation")}
    runs = [_Run(options, one, teacher.model, student, objective, labels) for one in seeded]
    for name, parts in variants.items():
        found = [run.train(name, parts) for run in runs]
        layers = found[0].model.config.num_hidden_layers
        results[name] = {**summary(task.metric, [one.result for one in found]), "layers": layers}

    counts = {on: count_ptp_labels(of) for on, of in labels.items()}
    pretrained = {
        name: summary("accuracy", [run.pretrained[name].result for run in runs]) for name in runs[0].pretrained
    }
    settings = {**beginning.settings, "objective": repr(objective)}
    seconds = time.perf_counter() - started
    table = _table(task, counts)
    return finish(
        options.output, settings, task, results, seconds, table, ptp={"labels": counts, "students": pretrained}
    )


class _Run:
    """The method with one seed."""

    def __init__(
        self,
        options: argparse.Namespace,
        stages: Stages,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        objective: Objective,
        labels: Mapping[str, Tensor],
    ) -> None:
        self.options, self.stages, self.teacher = options, stages, teacher
        self.student, self.objective = student, objective
        self.ptp = stages.relabelled(_ptp_task(stages.task), labels["train"], labels["validation"])
        self.pretrained: dict[str, Trained] = {}

    def train(self, name: str, without: tuple[str, ...]) -> Trained:
        """The student without some parts."""
        from fastdistill.models.students import shuffled_sharing

        options, student = self.options, self.student
        if "sps" not in without:
            student = shuffled_sharing(student, options.shared_layers, swap="swap" not in without)
        if "ptp" not in without:
            student = self._pretrain(_name("ptp", tuple(part for part in without if part != "ptp")), student)
        return self.stages.train(
            name,
            student,
            self.objective,
            teacher=self.teacher,
            epochs=options.epochs,
            learning_rate=options.learning_rate,
            store_hidden_states=options.store_hidden_states,
        )

    def _pretrain(self, name: str, student: PreTrainedModel) -> PreTrainedModel:
        from fastdistill.objectives.logits import TaskLoss
        from fastdistill.recipes.ptp import ptp_student, with_encoder_of

        options = self.options
        self.pretrained[name] = self.ptp.train(
            name,
            ptp_student(student, seed=self.stages.seed),
            TaskLoss(),
            epochs=options.ptp_epochs,
            learning_rate=options.learning_rate,
        )
        return with_encoder_of(student, self.pretrained[name].model)


def _name(of: str, without: tuple[str, ...]) -> str:
    return "-".join((of, "without", *without)) if without else of


def _variants(options: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """What is to be trained: names, and the parts that are left out."""
    variants: dict[str, tuple[str, ...]] = {"peakd": ()}
    for parts in options.without:
        if {"sps", "swap"} <= set(parts):
            raise ValueError(f"--without {','.join(parts)}: swap changes nothing without sps")
        ordered = tuple(part for part in PARTS if part in parts)
        variants[_name("peakd", ordered)] = ordered
    return variants


def _check_layers(options: argparse.Namespace, student: PreTrainedModel, depth: int) -> None:
    """Before anything is trained, that layers can be shared, and paired with the teacher's."""
    from fastdistill.models.students import shuffled_sharing

    if (options.shared_layers or 0) > options.student_layers:
        raise ValueError(f"--shared-layers is {options.shared_layers}; the student has {options.student_layers}")
    applied = shuffled_sharing(student, options.shared_layers).config.num_hidden_layers
    if options.beta and applied > depth:
        raise ValueError(
            f"with --student-layers {options.student_layers} the student applies {applied} layers, but the teacher has "
            f"{depth} to pair them with; expected fewer of --student-layers or --shared-layers, or --beta 0"
        )


def _objective(options: argparse.Namespace) -> Objective:
    """(1 - alpha) CE + alpha tau^2 KL + beta PKD. The factor tau^2 is the published code's; without it a temperature
    of 10 would leave nearly nothing of the teacher's term. PKD is a mean over pairs of layers; the paper's is a sum."""
    from fastdistill.objectives.base import WeightedSum
    from fastdistill.objectives.logits import LogitsKD, TaskLoss
    from fastdistill.objectives.pkd import PKD

    return WeightedSum(
        {
            "ce": (1 - options.alpha, TaskLoss(options.label_smoothing or 0.0)),
            "kd": (options.alpha, LogitsKD(temperature=options.temperature, ce_weight=0.0)),
            "pkd": (options.beta, PKD()),
        }
    )


def _labels(options: argparse.Namespace, stages: Stages, teacher: PreTrainedModel, on: Any) -> Tensor:
    from fastdistill.recipes.ptp import ptp_labels
    from fastdistill.teachers.outputs import LOGITS

    said = stages.outputs_of(teacher, on).with_format("torch")[:]
    return ptp_labels(said["teacher" + LOGITS], said["labels"], options.threshold)


def _ptp_task(task: Task) -> Task:
    from dataclasses import replace

    from fastdistill.recipes.ptp import PTP_LABELS

    return replace(task, name=f"{task.name}-ptp", label_names=PTP_LABELS, metric="accuracy", hub=None)


def _table(task: Task, counts: Mapping[str, Mapping[str, int]]) -> Table:
    """How many examples of each class there are."""
    from rich.table import Table

    table = Table("the teacher is", title=f"PTP labels: {task.name}")
    for on in counts:
        table.add_column(on, justify="right")
    for name in next(iter(counts.values())):
        table.add_row(name, *(f"{of[name]:,}" if of[name] else "none" for of in counts.values()))
    return table
