"""Data-efficient distillation (DeKD): a student that asks a teacher or its assistant about what it is unsure of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from accelerate import PartialState  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from fastdistill.models.students import first_layers
from fastdistill.objectives.dekd import DeKD
from fastdistill.recipes import plots
from fastdistill.recipes.baselines import baselines
from fastdistill.recipes.begin import begin
from fastdistill.recipes.comparison import Comparison, Learner, chain_of, compare
from fastdistill.recipes.output import of_one_run
from fastdistill.recipes.report import Report
from fastdistill.recipes.settings import DeKDSettings
from fastdistill.recipes.settings.dekd import Part
from fastdistill.recipes.training import Training
from fastdistill.training.each_epoch import SelectEachEpoch

PARTS: tuple[Part, ...] = ("ds", "ta", "doa")
"""In the order in which names have them."""

WITHOUT: dict[Part, dict[str, Any]] = {
    "ds": {"ratio": 1.0},
    "ta": {"assistant": False},
    "doa": {"da_weight": 0.0, "layers": None, "over_layers": "sum"},
}
"""What leaves a part out. Without the assistant the teacher has its examples, with the same weight."""


@of_one_run
def dekd(settings: DeKDSettings) -> Report:
    """Do the recipe, and write results.json and the plots.

    1. The teacher is fine-tuned on the task, unless it is a classifier of it already.
    2. The assistant, first layers of the teacher or of the pretrained encoder, learns from the teacher by plain
       distillation, unless there is to be none.
    3. The student, the very first layers, learns from both by `DeKD`; and so do, from the same beginning, the
       variants and baselines that are asked for, each with every seed. Teacher and assistant are the same for all.
    """
    if not settings.no_plots:
        plots.require_matplotlib()
    beginning = begin(settings)
    task = beginning.task
    if task.is_regression:
        raise ValueError(f"{task.name} is regression: there are no classes to be uncertain of")
    variants = variants_of(settings)
    assistant_layers = _assistant_layers(settings, beginning.depth, variants)
    chain = chain_of(settings, beginning.depth)
    _refuse_without_effect(settings, distils=bool(assistant_layers) or settings.distils)
    comparison = compare(beginning)

    teacher = comparison.teach(beginning.teacher())
    teachers = {"teacher": teacher.model}
    if assistant_layers:
        teachers["assistant"] = comparison.assistant(assistant_layers)
    student = first_layers(comparison.source, settings.student_layers)
    own: dict[str, Learner] = {
        name: (one, teachers if one.needs.teachers else teacher.model) for name, one in variants.items()
    }
    comparison.students(
        [
            *(comparison.baseline(name, student, learner) for name, learner in baselines(comparison, chain).items()),
            *(_training(comparison, name, student, one, settings.store_hidden_states) for name, one in own.items()),
        ]
    )

    record = beginning.record() | {"objectives": {name: repr(objective) for name, objective in variants.items()}}
    drawn = [] if settings.no_plots else _plot(settings, beginning.depth, comparison, variants)
    return comparison.finish(record, plots=drawn)


def _training(
    comparison: Comparison, name: str, student: PreTrainedModel, learner: Learner, store_hidden_states: bool | None
) -> Training:
    training = comparison.training(name, student, learner, store_hidden_states=store_hidden_states)
    if isinstance(training.objective, DeKD) and training.objective.select_per == "epoch":
        return replace(training, callbacks=(SelectEachEpoch(training.objective),))
    return training


def variants_of(settings: DeKDSettings) -> dict[str, DeKD]:
    """What is to be trained: each strategy with each ratio, and of the first of those what lacks some parts."""
    first = DeKD(
        ratio=settings.ratio[0],
        strategy=settings.strategy[0],
        select_per=settings.select_per,
        ce_on=settings.ce_on,
        ce_weight=settings.ce_weight,
        ta_weight=settings.ta_weight,
        da_weight=settings.da_weight,
        temperature=settings.temperature,
        scale_by_temperature=not settings.unscaled,
        over_layers=settings.over_layers,
        layers=settings.align_layers,
        assistant=settings.assistant_layers != 0,
        label_smoothing=settings.smoothing if settings.ce_weight else 0.0,  # baselines learn labels too
        log_selection=True,
    )
    variants: dict[str, DeKD] = {}
    for strategy, ratio in product(settings.strategy, settings.ratio):
        variants.setdefault(variant_name(settings, strategy, ratio), replace(first, strategy=strategy, ratio=ratio))
    has = {"ds": first.ratio < 1, "ta": bool(first.needs.teachers), "doa": first.da_weight > 0}
    for given in settings.without:
        parts = [part for part in PARTS if part in given]
        name = "-".join(("dekd", "without", *parts))
        if name in variants:
            raise ValueError(f"--without {','.join(given)} is given twice")
        if missing := [part for part in parts if not has[part]]:
            raise ValueError(f"--without {missing[0]} changes nothing: its part is left out already")
        changes = {field: value for part in parts for field, value in WITHOUT[part].items()}
        variants[name] = replace(first, **changes)
    return variants


def variant_name(settings: DeKDSettings, strategy: str, ratio: float) -> str:
    """With a ratio of 1 all strategies are one."""
    if len(settings.strategy) == len(settings.ratio) == 1:
        return "dekd"
    return "dekd-1" if ratio == 1 else f"dekd-{strategy}-{ratio}"


def _assistant_layers(settings: DeKDSettings, depth: int, variants: Mapping[str, DeKD]) -> int | None:
    """None where no variant has an assistant. Raises ValueError if there can be none."""
    low = settings.student_layers
    if low > depth:
        raise ValueError(f"--student-layers is {low}; the teacher has {depth}")
    if not any(objective.needs.teachers for objective in variants.values()):
        if settings.assistant_layers is not None and not settings.ta_weight:
            raise ValueError("--assistant-layers is given, but --ta-weight is 0: there is no assistant")
        return None
    layers = (low + depth) // 2 if settings.assistant_layers is None else settings.assistant_layers
    if not low < layers < depth:
        raise ValueError(
            f"an assistant has more layers than the student's {low} and fewer than the teacher's {depth}, not {layers}"
            "; --assistant-layers 0 is for no assistant"
        )
    return int(layers)


def _refuse_without_effect(settings: DeKDSettings, *, distils: bool) -> None:
    """Beside what `DeKD` refuses. `distils`: whether any model learns by plain distillation."""
    if settings.kd_temperature is not None and not distils:
        raise ValueError(
            f"--kd-temperature is {settings.kd_temperature:g}, but no model learns by plain distillation: there is no "
            "assistant, and neither --baselines nor --chain"
        )
    if settings.label_smoothing and not settings.ce_weight and not distils and not settings.baselines:
        raise ValueError(f"--label-smoothing is {settings.label_smoothing:g}, but no student learns labels")


def _plot(settings: DeKDSettings, depth: int, comparison: Comparison, variants: Mapping[str, DeKD]) -> list[Path]:
    """ratios.svg where several were tried; entropy.svg and layers.svg are of the first seed's first student."""
    if not PartialState().is_main_process:
        return []
    drawn, output, metric, results = [], settings.folder, comparison.metric, comparison.results
    if len(settings.ratio) > 1:
        curves: dict[str, dict[float, plots.Levels]] = {
            strategy: {
                ratio: comparison.interval(results[name])
                for ratio in settings.ratio
                for name in (variant_name(settings, strategy, ratio),)
            }
            for strategy in settings.strategy
        }
        lines: dict[str, plots.Levels] = {
            name: comparison.interval(results[name]) for name in ("finetuned", "kd", "takd") if name in results
        }
        asked = "share of the examples that query a teacher"
        drawn.append(plots.metric_by_share(output / "ratios.svg", asked, metric, curves, lines, str(comparison.told)))
    first, objective = next(iter(variants.items()))
    log = comparison.seeded[0].log(first)
    bins = [f"{i / 10:g} to {(i + 1) / 10:g}" for i in range(10)]
    of = "entropy of the examples that query"
    told = f"{first}: {len(comparison.stages.examples.train):,} training examples, {comparison.told.first_seed}"
    drawn.append(plots.shares_over_time(output / "entropy.svg", log, "entropy", of, bins, told))
    if objective.da_weight:
        numbers = [str(layer) for layer in range(1, depth + 1)]
        of, layers = "teacher's layer aligned", objective.layers or settings.student_layers
        drawn.append(plots.shares_over_time(output / "layers.svg", log, "layer", of, numbers, told, at_once=layers))
    return drawn
