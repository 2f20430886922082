"""Sparse teachers (STARK): a teacher without what a trial student finds unfriendly, and the student learns anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from rich.table import Table
from transformers import PreTrainedModel

from fastdistill.data.tasks import Task
from fastdistill.models.architectures import blocks
from fastdistill.models.budgets import parameters_without, within
from fastdistill.models.pruning import prune
from fastdistill.models.scores import UNITS, Scores, random_scores
from fastdistill.models.sharing import refuse_shared
from fastdistill.models.students import first_layers
from fastdistill.objectives.base import Objective, WeightedSum
from fastdistill.objectives.ckd import CKD
from fastdistill.objectives.logits import TaskLoss
from fastdistill.objectives.pkd import PKD
from fastdistill.ops.kd_ce_loss import Divergence
from fastdistill.recipes import plots
from fastdistill.recipes.baselines import baselines, without_the_least_expressive
from fastdistill.recipes.begin import begin
from fastdistill.recipes.comparison import Comparison, Learner, chain_of, compare
from fastdistill.recipes.measuring import Scoring
from fastdistill.recipes.methods.kd import logits_objective
from fastdistill.recipes.output import of_one_run
from fastdistill.recipes.report import Report, percent, summary
from fastdistill.recipes.settings import StarkSettings
from fastdistill.recipes.settings.stark import KNOWLEDGEABLE, Selection
from fastdistill.recipes.stages import Stages
from fastdistill.recipes.training import Trained, Training
from fastdistill.sensitivity.units import Sensitivities
from fastdistill.sensitivity.weights import WeightScores, WeightSensitivities, mask_weights, random_weight_scores

NAMES: dict[Selection, str] = {
    "knowledge": "stark",
    "random": "stark-rand",
    "auto": "stark-auto",
    "dynabert": "stark-dynabert",
}
"""What students are called, by how what is pruned is selected."""

DIVERGENCE: Divergence = "soft_ce"
"""The paper's. A student learns by it what it does by forward KL, but teachers' gradients, which score them, differ."""

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """A way to select what is pruned, and what its students are called."""

    name: str
    selection: Selection
    tradeoff: float


@of_one_run
def stark(settings: StarkSettings) -> Report:
    """Do the recipe, and write results.json and the plots.

    1. The teacher is fine-tuned on the task, unless it is a classifier of it already.
    2. Trial distillation: the student learns from the dense teacher.
    3. The teacher's heads and neurons are scored with that student.
    4. For each sparsity the lowest scores are removed, the student is rewound to where it began, and learns from the
       sparse teacher. The best on the examples that select counts; the trial student, of sparsity 0, is beside it.
    """
    if not settings.no_plots:
        plots.require_matplotlib()
    beginning = begin(settings)
    task = beginning.task
    objective, of_teacher = _objectives(settings, task)
    _check_depth(settings, beginning.pretrained)
    settings = _within_budget(settings, beginning.pretrained)
    chain = chain_of(settings, beginning.depth)
    comparison = compare(beginning, divergence=DIVERGENCE, candidates=settings.candidates)

    teacher = comparison.teach(beginning.teacher())
    student = _student(settings, comparison)
    others = baselines(comparison, chain)
    runs = [_Run(settings, comparison, stages, student, teacher, objective) for stages in comparison.seeded]
    _try(comparison, runs, others, of_teacher)
    variants = variants_of(settings)
    trained = comparison.train(trial for run in runs for trial in run.students_to_train(variants))
    for run in runs:
        for variant in variants:
            run.students[variant.name] = {key: next(trained).result for key in run.plan(variant)}
    sparsities = _summarize(comparison, runs, variants)

    record = beginning.record() | {"objective": repr(objective)}
    tables = [_table(task, name, found, teacher) for name, found in sparsities.items()]
    drawn = [] if settings.no_plots else _plot(settings, comparison, sparsities, runs[0])
    return comparison.finish(record, *tables, plots=drawn, sparsities=sparsities)


def variants_of(settings: StarkSettings) -> list[Variant]:
    """Each selection, and where there are several tradeoffs each of them, if it is by the scores that they weigh."""
    variants = []
    for selection in settings.selection:
        several = len(settings.tradeoff) > 1 and selection in KNOWLEDGEABLE
        for tradeoff in settings.tradeoff if several else settings.tradeoff[:1]:
            name = NAMES[selection] + (f"-tradeoff-{tradeoff:g}" if several else "")
            variants.append(Variant(name, selection, tradeoff))
    return variants


def _try(comparison: Comparison, runs: list[_Run], others: Mapping[str, Learner], of_teacher: Objective) -> None:
    """The baselines and, with them, trial distillation; what its students think of the teacher."""
    own, student = runs[0].learner, runs[0].student
    is_kd = own[0] == comparison.kd and comparison.runs == 1  # the trial is then the baseline
    trainings = [
        comparison.baseline(name, student, learner) for name, learner in others.items() if name != "kd" or not is_kd
    ]
    comparison.students(trainings)
    trained = comparison.train((run.stages, run.training("trial", own)) for run in runs)
    for run in runs:
        run.score(next(trained), of_teacher)
    comparison.summarize("trial", [run.trial for run in runs])
    if "kd" in others and is_kd:
        comparison.summarize("kd", [run.trial for run in runs])


def _summarize(
    comparison: Comparison, runs: list[_Run], variants: list[Variant]
) -> dict[str, dict[str, dict[str, Any]]]:
    """By variant and sparsity, the students and their teachers; the best students go into the results."""
    sparsities = {}
    for variant in variants:
        name = variant.name
        sparsities[name] = {
            key: {
                "student": summary(comparison.metric, [run.students[name][key] for run in runs]),
                "teacher": summary(comparison.metric, [run.teachers[name][key] for run in runs]),
                "sparsity": [run.plan(variant)[key] for run in runs],
            }
            for key in runs[0].students[name]
        }
        best = [run.best(variant) for run in runs]
        comparison.summarize(name, [one for _, one in best])
        comparison.results[name]["sparsity"] = [sparsity for sparsity, _ in best]
    return sparsities


class _Run:
    """The method with one seed."""

    trial: Result
    found: Sensitivities | WeightSensitivities | None

    def __init__(
        self,
        settings: StarkSettings,
        comparison: Comparison,
        stages: Stages,
        student: PreTrainedModel,
        teacher: Trained,
        objective: Objective,
    ) -> None:
        self.settings, self.comparison, self.stages = settings, comparison, stages
        self.student, self.teacher, self.learner = student, teacher, (objective, teacher.model)
        self.students: dict[str, dict[str, Result]] = {}
        self.teachers: dict[str, dict[str, Result]] = {}

    def training(self, name: str, learner: Learner) -> Training:
        return self.comparison.training(name, self.student, learner)

    def score(self, trial: Trained, of_teacher: Objective) -> None:
        """Nothing is scored where nothing that selects is of a student."""
        self.trial, settings = trial.result, self.settings
        with_trial = min(settings.tradeoff) < 1
        scoring = Scoring(
            name="scores",
            teacher=self.teacher.model,
            student=trial.model if with_trial else None,
            objective=of_teacher if with_trial else None,
            reduce=settings.reduce,
            on=settings.score_on,
            of_weights=settings.unstructured,
        )
        self.found = self.stages.score(scoring) if set(settings.selection) & KNOWLEDGEABLE else None

    def students_to_train(self, variants: list[Variant]) -> Iterator[tuple[Stages, Training]]:
        """The students of all sparse teachers, each of which is made when its turn comes."""
        for variant in variants:
            self.teachers[variant.name] = {}
            scores = self.scores(variant)
            for key, sparsity in self.plan(variant).items():
                name = f"{variant.name}-{key}" if key != "auto" else variant.name
                sparse = self.stages.train(
                    Training(
                        name=f"teacher-{name}",
                        model=self._sparse(scores, sparsity, uniform=variant.selection == "dynabert"),
                        objective=TaskLoss(),
                        epochs=0,
                        learning_rate=0,
                        batch_size=self.settings.batch_size,
                    )
                )
                self.teachers[variant.name][key] = sparse.result
                yield self.stages, self.training(name, (self.learner[0], sparse.model))

    def plan(self, variant: Variant) -> dict[str, float]:
        """The sparsities that are tried, by what they are called."""
        if variant.selection != "auto":
            return {f"{one:g}": one for one in self.settings.sparsities}
        scores = self.scores(variant)
        assert isinstance(scores, Scores)
        return {"auto": scores.auto_sparsity()}

    def best(self, variant: Variant) -> tuple[float, Result]:
        """The sparsity and the student that is best on the examples that select."""
        found = [(sparsity, self.students[variant.name][key]) for key, sparsity in self.plan(variant).items()]
        return max(found, key=lambda pair: pair[1]["selection"])

    def scores(self, variant: Variant) -> Scores | WeightScores:
        """Those by which to prune: knowledgeable ones, DynaBERT's importance, or at random."""
        if variant.selection == "dynabert":
            scoring = Scoring(
                name="importance",
                teacher=self.teacher.model,
                reduce="batch",
                on=self.settings.score_on,
                dynabert=True,
            )
            found = self.comparison.stages.score(scoring)
            assert isinstance(found, Sensitivities)
            return found.expressiveness
        if variant.selection == "random":
            generator = torch.Generator().manual_seed(self.stages.seed)
            draw: Any = random_weight_scores if self.settings.unstructured else random_scores
            return draw(self.teacher.model, generator)  # type: ignore[no-any-return]
        assert self.found is not None
        return self.found.knowledgeable(variant.tradeoff)

    def _sparse(self, scores: Scores | WeightScores, sparsity: float, *, uniform: bool) -> PreTrainedModel:
        if isinstance(scores, Scores):
            return prune(self.teacher.model, scores, sparsity, round_to=self.settings.round_to or 1, uniform=uniform)
        return mask_weights(self.teacher.model, scores, sparsity)


def _check_depth(settings: StarkSettings, teacher: PreTrainedModel) -> None:
    """What could not be is said before the teacher is trained."""
    refuse_shared(teacher)
    layers, wanted = len(blocks(teacher)), settings.student_layers
    if wanted is not None and wanted > layers:
        raise ValueError(f"--student-layers is {wanted}; the teacher has {layers}")


def _within_budget(settings: StarkSettings, teacher: PreTrainedModel) -> StarkSettings:
    """With sparsities in place of --budget: all heads of a teacher, and all its neurons, are of one size."""
    if settings.budget is None:
        return settings
    scores = random_scores(teacher, torch.Generator().manual_seed(0))
    found, cost = [], partial(parameters_without, teacher)
    for budget in settings.budget:
        found.append(within("--budget", budget, cost, partial(scores.kept, round_to=settings.round_to or 1), 10_000))
        if not 0 < found[-1] < 1:
            raise ValueError(f"--budget is {budget:g}; expected less than the teacher's {teacher.num_parameters()}")
    return replace(settings, budget=None, sparsity=tuple(found))


def _objectives(settings: StarkSettings, task: Task) -> tuple[Objective, Objective]:
    """What the student learns by, and that part of it, differentiated with respect to the teacher, that scores it."""
    logits = logits_objective(settings, task, divergence=DIVERGENCE)
    of_teacher = logits_objective(settings, task, divergence=DIVERGENCE, has_labels=False)
    if settings.objective == "kd":
        return logits, of_teacher
    weight = settings.hidden_weight or {"pkd": 100.0, "ckd": 1.0}[settings.objective]
    hidden: dict[str, tuple[float, Objective]] = {
        settings.objective: (weight, PKD(over=settings.pkd_over) if settings.objective == "pkd" else CKD())
    }
    return WeightedSum({"logits": (1.0, logits), **hidden}), WeightedSum({"logits": (1.0, of_teacher), **hidden})


def _student(settings: StarkSettings, comparison: Comparison) -> PreTrainedModel:
    """Where every student begins."""
    if settings.student_layers is not None:
        return first_layers(comparison.source, settings.student_layers)
    assert settings.student_sparsity is not None
    return without_the_least_expressive(comparison, settings.student_sparsity)


def _table(task: Task, name: str, found: Mapping[str, Mapping[str, Any]], dense: Trained) -> Table:
    """A sparsity a row: the student, and the teacher it had, whose time is told against the dense one's, too."""
    table = Table("sparsity", title=f"{name}: {task.name}")
    for column in (f"student's {task.metric} %", "its teacher's", "teacher's parameters", "its time an example"):
        table.add_column(column, justify="right")
    for tried in found.values():
        teacher = tried["teacher"]
        faster = teacher["examples_per_second"] / dense.result["examples_per_second"]
        table.add_row(
            ", ".join(f"{100 * sparsity:.0f} %" for sparsity in sorted(set(tried["sparsity"]))),
            percent(tried["student"], task.metric),
            percent(teacher, task.metric),
            f"{teacher['parameters'] / 1e6:.2f} M",
            f"{1e3 / teacher['examples_per_second']:.2f} ms, 1/{faster:.2f}",
        )
    return table


def _plot(
    settings: StarkSettings,
    comparison: Comparison,
    sparsities: Mapping[str, Mapping[str, Mapping[str, Any]]],
    run: _Run,
) -> list[Path]:
    """sparsities.svg; heads.svg and the densities of scores are of the first seed, and of the first tradeoff."""
    if not PartialState().is_main_process:
        return []
    output, metric, results, told = settings.folder, comparison.metric, comparison.results, str(comparison.told)
    curves = {
        name: {float(key): comparison.interval(one["student"]) for key, one in found.items()}
        for name, found in sparsities.items()
        if "auto" not in found
    }
    names = [name for name in results if name in ("finetuned", "trial", "kd", "takd") or name.startswith("stark-auto")]
    if results.get("kd", {}).get("stages") == results["trial"]["stages"]:
        names.remove("kd")
    lines = {name: comparison.interval(results[name]) for name in names}
    drawn = [plots.metric_by_share(output / "sparsities.svg", "sparsity of the teacher", metric, curves, lines, told)]
    if not isinstance(run.found, Sensitivities):
        return drawn
    mixed = run.found.knowledgeable(settings.tradeoff[0])
    scored = run.stages.examples.train if settings.score_on == "train" else run.stages.examples.validation
    split = "train" if settings.score_on == "train" else comparison.told.select_on
    of_scores = f"{len(scored):,} examples of {split}, {comparison.told.first_seed}"
    drawn.append(plots.heat_map(output / "heads.svg", mixed.heads, "knowledgeable score", of_scores))
    found = {"P, expressiveness": run.found.expressiveness, "Q, student-friendliness": run.found.friendliness}
    parts = {name: scores.normalized() for name, scores in found.items() if scores is not None}
    for units in UNITS:
        values = {name: torch.cat(list(getattr(scores, units))) for name, scores in parts.items()}
        of = torch.cat(list(getattr(mixed, units)))
        curves_of = {"I, knowledgeable": of, **values}
        drawn.append(plots.densities(output / f"density-{units}.svg", curves_of, units, of_scores))
    return drawn
