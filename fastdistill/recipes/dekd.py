"""Data-efficient distillation (DeKD): a student that asks a teacher or its assistant about what it is unsure of."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

from fastdistill.ops.select_uncertain import STRATEGIES
from fastdistill.recipes import options as shared

if TYPE_CHECKING:
    from fastdistill.objectives.base import Objective
    from fastdistill.objectives.dekd import DeKD
    from fastdistill.recipes.report import Results
    from fastdistill.recipes.stages import Stages, Trained

PARTS = ("ds", "ta", "doa")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_run(parser)
    shared.add_training(parser)
    add = parser.add_argument_group("DeKD").add_argument
    number, weight = shared.number, shared.number(low=0)
    add(
        "--assistant-layers",
        type=shared.integer(0),
        metavar="K",
        help="the teacher's layers that the assistant has (default: midway between the student's and the teacher's); 0 "
        "for no assistant: the teacher teaches all examples that are kept",
    )
    add(
        "--ratio",
        type=shared.listed(number(above=0, most=1)),
        default=(0.5,),
        metavar="X[,X...]",
        help="share of the examples that query a teacher; of several each is tried (default: 0.5)",
    )
    add(
        "--strategy",
        type=shared.listed(shared.choice(*STRATEGIES)),
        default=("entropy",),
        metavar="S[,S...]",
        help=f"how they are chosen: {', '.join(STRATEGIES)}; of several each is tried (default: entropy)",
    )
    add(
        "--select-per",
        choices=("batch", "epoch"),
        default="batch",
        help="choose in each batch, or from all data before each epoch (default: %(default)s)",
    )
    add(
        "--ce-on",
        choices=("all", "selected"),
        default="all",
        help="examples whose labels are learned (default: %(default)s)",
    )
    for name, default, of in (("ce", 0.5, "labels"), ("ta", 0.3, "the teachers"), ("da", 0.2, "the aligned layers")):
        says = f"weight of the term of {of} (default: %(default)g)"
        add(f"--{name}-weight", type=weight, default=default, metavar="X", help=says)
    add(
        "--temperature",
        type=number(above=0),
        default=5.0,
        metavar="X",
        help="of the softmax on both sides (default: %(default)g)",
    )
    add(
        "--scale-by-temperature",
        action="store_true",
        help="multiply the teacher's and the assistant's terms by the temperature's square",
    )
    add(
        "--align-layers",
        type=shared.integer(1),
        metavar="M",
        help="layers of teacher and student that are aligned (default: as many as the student has)",
    )
    shared.add_storing(add)
    add = parser.add_argument_group("what else to train").add_argument
    add(
        "--without",
        type=shared.listed(shared.choice(*PARTS)),
        action="append",
        default=[],
        metavar="PART[,PART]",
        help="a student without data selection (ds), the assistant (ta) or the alignment of layers (doa), or "
        "several of these at once; may be repeated, for a student each",
    )
    shared.add_comparison(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Do the recipe, print its table, write results.json and the plots; returns what results.json holds.

    1. The teacher is fine-tuned on the task, unless it is a classifier of it already.
    2. The assistant, the teacher's first layers, learns from it by plain distillation, unless there is to be none.
    3. The student, its very first layers, learns from both by `DeKD`; and so do, from the same beginning, the
       variants and baselines that are asked for, each with every seed. Teacher and assistant are the same for all.
    """
    from fastdistill.models.students import first_layers
    from fastdistill.objectives.logits import LogitsKD, TaskLoss
    from fastdistill.recipes.assistants import Assistants, chain_of
    from fastdistill.recipes.begin import begin
    from fastdistill.recipes.plots import require_matplotlib
    from fastdistill.recipes.report import finish, summary

    started = time.perf_counter()
    if not options.no_plots:
        require_matplotlib()
    beginning = begin(options)
    task = beginning.data.task
    if task.is_regression:
        raise ValueError(f"{task.name} is regression: there are no classes to be uncertain of")
    depth = beginning.pretrained.config.num_hidden_layers
    variants = _variants(options)
    assistant_layers = _assistant_layers(options, depth, variants)
    chain = chain_of(options, depth)
    _refuse_without_effect(options, distils=bool(assistant_layers or chain or options.baselines))
    stages = beginning.stages()
    smoothing = options.label_smoothing or 0.0
    kd = LogitsKD(temperature=options.kd_temperature or 2.0, label_smoothing=smoothing)
    training = {"epochs": options.epochs, "learning_rate": options.learning_rate}
    storing = {**training, "store_hidden_states": options.store_hidden_states}

    teacher = beginning.teacher(stages)
    results: dict[str, Any] = {"teacher": teacher.result}
    assistant = Assistants(stages, teacher, kd, training, results)
    teachers = {"teacher": teacher.model}
    if assistant_layers:
        teachers["assistant"] = assistant(assistant_layers).model
    chained = assistant(*chain[:-1]).model if chain else None

    student = first_layers(teacher.model, options.student_layers)
    seeded = [stages.seeded(seed) for seed in options.seeds or (options.seed,)]

    def students(name: str, objective: Objective, teacher: Any = None) -> list[Trained]:
        trained = [_train(stages, name, student, objective, teacher, storing) for stages in seeded]
        results[name] = summary(task.metric, [one.result for one in trained])
        return trained

    if options.baselines:
        students("finetuned", TaskLoss(smoothing))
        students("kd", kd, teacher.model)
    if chained is not None:
        students("takd", kd, chained)
    logs = {
        name: students(name, objective, teachers if objective.teachers else teacher.model)[0].log
        for name, objective in variants.items()
    }

    settings = {**beginning.settings, "objectives": {name: repr(objective) for name, objective in variants.items()}}
    record = finish(options.output, settings, task, results, time.perf_counter() - started)
    if not options.no_plots:
        _plot(options, depth, task.metric, variants, results, logs)
    return record


def _train(
    stages: Stages, name: str, student: Any, objective: Objective, teacher: Any, training: Mapping[str, Any]
) -> Trained:
    from fastdistill.objectives.dekd import DeKD
    from fastdistill.training.each_epoch import SelectEachEpoch

    callbacks = []
    if isinstance(objective, DeKD):
        objective = replace(objective)  # a new one for each student: it may learn
        callbacks = [SelectEachEpoch(objective)] if objective.select_per == "epoch" else []
    return stages.train(name, student, objective, teacher=teacher, callbacks=callbacks, **training)


def _variants(options: argparse.Namespace) -> dict[str, DeKD]:
    """What is to be trained: each strategy with each ratio, and of the first of those what lacks some parts."""
    from fastdistill.objectives.dekd import DeKD

    first = DeKD(
        ratio=options.ratio[0],
        strategy=options.strategy[0],
        select_per=options.select_per,
        ce_on=options.ce_on,
        ce_weight=options.ce_weight,
        ta_weight=options.ta_weight,
        da_weight=options.da_weight,
        temperature=options.temperature,
        scale_by_temperature=options.scale_by_temperature,
        layers=options.align_layers,
        assistant=options.assistant_layers != 0,
        label_smoothing=(options.label_smoothing or 0.0) if options.ce_weight else 0.0,  # baselines learn labels too
        log_selection=True,
    )
    if first.layers is not None and first.layers > options.student_layers:
        raise ValueError(f"--align-layers is {first.layers}; the student has {options.student_layers}")
    variants: dict[str, DeKD] = {}
    for strategy, ratio in product(options.strategy, options.ratio):
        variants.setdefault(variant_name(options, strategy, ratio), replace(first, strategy=strategy, ratio=ratio))
    for given in options.without:
        parts = [part for part in PARTS if part in given]
        name = "-".join(("dekd", "without", *parts))
        if name in variants:
            raise ValueError(f"--without {','.join(given)} is given twice")
        changes: dict[str, Any] = {}
        for part in parts:
            without: dict[str, dict[str, Any]] = {
                "ds": {"ratio": 1.0},
                "ta": {"assistant": False},
                "doa": {"da_weight": 0.0, "layers": None},
            }
            has = {"ds": first.ratio < 1, "ta": bool(first.teachers), "doa": first.da_weight > 0}
            if not has[part]:
                raise ValueError(f"--without {part} changes nothing: its part is left out already")
            changes |= without[part]
        variants[name] = replace(first, **changes)
    return variants


def variant_name(options: argparse.Namespace, strategy: str, ratio: float) -> str:
    """With a ratio of 1 all strategies are one."""
    if len(options.strategy) == len(options.ratio) == 1:
        return "dekd"
    return "dekd-1" if ratio == 1 else f"dekd-{strategy}-{ratio}"


def _assistant_layers(options: argparse.Namespace, depth: int, variants: Mapping[str, DeKD]) -> int | None:
    """None where no variant has an assistant. Raises ValueError if there can be none."""
    low = options.student_layers
    if low > depth:
        raise ValueError(f"--student-layers is {low}; the teacher has {depth}")
    if not any(objective.teachers for objective in variants.values()):
        if options.assistant_layers is not None and not options.ta_weight:
            raise ValueError("--assistant-layers is given, but --ta-weight is 0: there is no assistant")
        return None
    layers = (low + depth) // 2 if options.assistant_layers is None else options.assistant_layers
    if not low < layers < depth:
        raise ValueError(
            f"an assistant has more layers than the student's {low} and fewer than the teacher's {depth}, not {layers}"
            "; --assistant-layers 0 is for no assistant"
        )
    return int(layers)


def _refuse_without_effect(options: argparse.Namespace, *, distils: bool) -> None:
    """Beside what `DeKD` refuses. `distils`: whether any model learns by plain distillation."""
    if options.store_hidden_states and not options.da_weight:
        raise ValueError("--store-hidden-states is given, but --da-weight is 0: no hidden states are used")
    if options.kd_temperature is not None and not distils:
        raise ValueError(
            f"--kd-temperature is {options.kd_temperature:g}, but no model learns by plain distillation: there is no "
            "assistant, and neither --baselines nor --chain"
        )
    if options.label_smoothing and not options.ce_weight and not distils:
        raise ValueError(f"--label-smoothing is {options.label_smoothing:g}, but no student learns labels")


def _plot(
    options: argparse.Namespace,
    depth: int,
    metric: str,
    variants: Mapping[str, DeKD],
    results: Results,
    logs: Mapping[str, Sequence[Mapping[str, float]]],
) -> None:
    """ratios.svg where several were tried; entropy.svg and layers.svg are of the first seed's first student."""
    from accelerate import PartialState  # type: ignore[import-untyped]

    from fastdistill.recipes import plots

    if not PartialState().is_main_process:
        return
    if len(options.ratio) > 1:
        curves = {
            strategy: {
                ratio: (results[name][metric], results[name].get("spread", 0.0))
                for ratio in options.ratio
                for name in (variant_name(options, strategy, ratio),)
            }
            for strategy in options.strategy
        }
        lines = {name: results[name][metric] for name in ("finetuned", "kd", "takd") if name in results}
        asked = "share of the examples that query a teacher"
        plots.metric_by_share(options.output / "ratios.svg", asked, metric, curves, lines)
    first, objective = next(iter(variants.items()))
    bins = [f"{i / 10:g} to {(i + 1) / 10:g}" for i in range(10)]
    plots.shares_over_time(
        options.output / "entropy.svg", logs[first], "entropy", "entropy of the examples that query", bins
    )
    if objective.da_weight:
        numbers = [str(layer) for layer in range(1, depth + 1)]
        aligned, layers = "teacher's layer aligned", objective.layers or options.student_layers
        plots.shares_over_time(options.output / "layers.svg", logs[first], "layer", aligned, numbers, at_once=layers)
