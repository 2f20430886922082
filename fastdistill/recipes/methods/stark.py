"""Sparse teachers (STARK): a teacher without what a trial student finds unfriendly, and the student learns anew."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
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
from fastdistill.models.students import first_layers, parameter_pruned
from fastdistill.objectives.base import Objective, WeightedSum
from fastdistill.objectives.ckd import CKD
from fastdistill.objectives.logits import TaskLoss
from fastdistill.objectives.pkd import PKD
from fastdistill.ops.kd_ce_loss import Divergence
from fastdistill.recipes import plots
from fastdistill.recipes.begin import Beginning, begin
from fastdistill.recipes.comparison import Comparison, Learner, Point, chain_of, compare
from fastdistill.recipes.measuring import Scoring
from fastdistill.recipes.methods.kd import logits_objective
from fastdistill.recipes.output import of_one_run
from fastdistill.recipes.report import Report, finish, percent, summary
from fastdistill.recipes.settings import StarkSettings
from fastdistill.recipes.settings.stark import Selection
from fastdistill.recipes.stages import Stages
from fastdistill.recipes.training import Trained, Training
from fastdistill.sensitivity.units import Sensitivities
from fastdistill.sensitivity.weights import WeightScores, mask_weights, random_weight_scores

NAMES: dict[Selection, str] = {"knowledge": "stark", "random": "stark-rand", "auto": "stark-auto"}
"""What students are called, by how what is pruned is selected."""

DIVERGENCE: Divergence = "soft_ce"
"""The paper's. A student learns by it what it does by forward KL, but teachers' gradients, which score them, differ."""

Result = Mapping[str, Any]


@of_one_run
def stark(settings: StarkSettings) -> Report:
    """Do the recipe, and write results.json and the plots.

    1. The teacher is fine-tuned on the task, unless it is a classifier of it already.
    2. Trial distillation: the student learns from the dense teacher.
    3. The teacher's heads and neurons are scored with that student.
    4. For each sparsity the lowest scores are removed, the student is rewound to where it began, and learns from the
       sparse teacher. The best on the validation examples counts, the trial student among them.
    """
    started = time.perf_counter()
    if not settings.no_plots:
        plots.require_matplotlib()
    beginning = begin(settings)
    task = beginning.task
    objective, of_teacher = _objectives(settings, task)
    _check_depth(settings, beginning.pretrained)
    settings = _within_budget(settings, beginning.pretrained)
    chain = chain_of(settings, beginning.depth)
    comparison = compare(beginning, divergence=DIVERGENCE, points=_points(settings, beginning))

    teacher = comparison.teach(beginning.teacher())
    student = _student(settings, comparison.stages, teacher)
    runs = [_Run(settings, comparison, stages, student, teacher, objective) for stages in comparison.seeded]
    _try(comparison, runs, comparison.baselines(chain), of_teacher)
    trained = comparison.train(trial for run in runs for trial in run.students_to_train())
    for run in runs:
        for selection in settings.selection:
            run.students[selection] = {key: next(trained).result for key in run.plan(selection)}
    sparsities = _summarize(comparison, runs)

    record = beginning.record() | {"objective": repr(objective)}
    tables = [_table(task, name, found, teacher) for name, found in sparsities.items()]
    drawn = [] if settings.no_plots else _plot(settings.folder, comparison, sparsities, runs[0].scores)
    seconds = time.perf_counter() - started
    return finish(
        settings.folder, record, task, comparison.results, seconds, *tables, plots=drawn, sparsities=sparsities
    )


def _try(comparison: Comparison, runs: list[_Run], baselines: Mapping[str, Learner], of_teacher: Objective) -> None:
    """The baselines and, with them, trial distillation; what its students think of the teacher."""
    own = runs[0].learner
    is_kd = own[0] == comparison.kd
    learners = {name: learner for name, learner in baselines.items() if name != "kd" or not is_kd} | {"trial": own}
    trained = comparison.train(
        (run.stages, run.training(name, learner)) for name, learner in learners.items() for run in runs
    )
    for name in learners:
        if name != "trial":
            comparison.summarize(name, [next(trained).result for _ in runs])
    for run in runs:
        run.score(next(trained), of_teacher)
    comparison.summarize("trial", [run.trial for run in runs])
    if "kd" in baselines and is_kd:
        comparison.results["kd"] = comparison.results["trial"]


def _summarize(comparison: Comparison, runs: list[_Run]) -> dict[str, dict[str, dict[str, Any]]]:
    """By selection and sparsity, the students and their teachers; the best students go into the results."""
    sparsities = {}
    for selection in runs[0].settings.selection:
        name = NAMES[selection]
        sparsities[name] = {
            key: {
                "student": summary(comparison.metric, [run.students[selection][key] for run in runs]),
                "teacher": summary(comparison.metric, [run.teachers[selection][key] for run in runs]),
                "sparsity": [run.sparsity(selection, key) for run in runs],
            }
            for key in runs[0].students[selection]
        }
        best = [run.best(selection) for run in runs]
        comparison.summarize(name, [one for _, one in best])
        comparison.results[name]["sparsity"] = [key for key, _ in best]
    return sparsities


class _Run:
    """The method with one seed."""

    trial: Result
    scores: Scores | WeightScores | None

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
        self.auto = 0.0

    def training(self, name: str, learner: Learner) -> Training:
        return self.comparison.training(name, self.student, learner, store_hidden_states=True)

    def score(self, trial: Trained, of_teacher: Objective) -> None:
        self.trial, self.scores = trial.result, self._scores(trial.model, of_teacher)
        if "auto" in self.settings.selection:
            assert isinstance(self.scores, Scores)
            self.auto = self.scores.auto_sparsity()

    def students_to_train(self) -> Iterator[tuple[Stages, Training]]:
        """The students of all sparse teachers, each of which is made when its turn comes."""
        for selection in self.settings.selection:
            self.teachers[selection] = {}
            scores = self._ranked(selection)
            for key, sparsity in self.plan(selection).items():
                name = f"{NAMES[selection]}-{key}" if key != "auto" else NAMES[selection]
                sparse = self.stages.train(
                    Training(
                        name=f"teacher-{name}",
                        model=self._sparse(scores, sparsity),
                        objective=TaskLoss(),
                        epochs=0,
                        learning_rate=0,
                        batch_size=self.settings.batch_size,
                    )
                )
                self.teachers[selection][key] = sparse.result
                yield self.stages, self.training(name, (self.learner[0], sparse.model))

    def plan(self, selection: str) -> dict[str, float]:
        """The sparsities that are tried, by what they are called."""
        return {"auto": self.auto} if selection == "auto" else {f"{one:g}": one for one in self.settings.sparsities}

    def best(self, selection: str) -> tuple[float, Result]:
        """The sparsity and the student that is best on the validation examples; 0 is the trial student's."""
        found: list[tuple[float, Result]] = [(0.0, self.trial)]
        found += [(self.sparsity(selection, key), one) for key, one in self.students[selection].items()]
        return max(found, key=lambda pair: pair[1][self.stages.task.metric])

    def sparsity(self, selection: str, key: str) -> float:
        return self.auto if selection == "auto" else float(key)

    def _scores(self, trial: PreTrainedModel, of_teacher: Objective) -> Scores | WeightScores | None:
        """None where nothing but chance selects."""
        settings = self.settings
        if set(settings.selection) == {"random"}:
            return None
        with_trial = settings.tradeoff < 1
        scoring = Scoring(
            name="scores",
            teacher=self.teacher.model,
            student=trial if with_trial else None,
            objective=of_teacher if with_trial else None,
            reduce=settings.reduce,
            on=settings.score_on,
            of_weights=settings.unstructured,
        )
        return self.stages.score(scoring).knowledgeable(settings.tradeoff)

    def _ranked(self, selection: str) -> Scores | WeightScores:
        """The scores by which to prune, at random if that is how to select."""
        if selection == "random":
            generator = torch.Generator().manual_seed(self.stages.seed)
            draw: Any = random_weight_scores if self.settings.unstructured else random_scores
            return draw(self.teacher.model, generator)  # type: ignore[no-any-return]
        assert self.scores is not None
        return self.scores

    def _sparse(self, scores: Scores | WeightScores, sparsity: float) -> PreTrainedModel:
        if isinstance(scores, Scores):
            return prune(self.teacher.model, scores, sparsity, round_to=self.settings.round_to or 1)
        return mask_weights(self.teacher.model, scores, sparsity)


def _points(settings: StarkSettings, beginning: Beginning) -> list[Point]:
    rates = settings.learning_rate_grid or (beginning.learning_rate,)
    return [Point(*each) for each in product(rates, settings.batch_size_grid or (settings.batch_size,))]


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
        settings.objective: (weight, PKD() if settings.objective == "pkd" else CKD())
    }
    return WeightedSum({"logits": (1.0, logits), **hidden}), WeightedSum({"logits": (1.0, of_teacher), **hidden})


def _student(settings: StarkSettings, stages: Stages, teacher: Trained) -> PreTrainedModel:
    """Where every student begins."""
    if settings.student_layers is not None:
        return first_layers(teacher.model, settings.student_layers)
    assert settings.student_sparsity is not None
    scoring = Scoring(name="expressiveness", teacher=teacher.model, reduce=settings.reduce, on=settings.score_on)
    found = stages.score(scoring)
    assert isinstance(found, Sensitivities)
    return parameter_pruned(teacher.model, found.expressiveness, settings.student_sparsity)


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
    output: Path,
    comparison: Comparison,
    sparsities: Mapping[str, Mapping[str, Mapping[str, Any]]],
    scores: Scores | WeightScores | None,
) -> list[Path]:
    """sparsities.svg; heads.svg and the densities of scores are of the first seed."""
    if not PartialState().is_main_process:
        return []
    metric, results = comparison.metric, comparison.results
    curves = {
        name: {float(key): (one["student"][metric], one["student"].get("spread", 0.0)) for key, one in found.items()}
        for name, found in sparsities.items()
        if "auto" not in found
    }
    lines: dict[str, float] = {
        name: results[name][metric] for name in ("finetuned", "trial", "kd", "takd", "stark-auto") if name in results
    }
    drawn = [plots.metric_by_share(output / "sparsities.svg", "sparsity of the teacher", metric, curves, lines)]
    if isinstance(scores, Scores):
        drawn.append(plots.heat_map(output / "heads.svg", scores.heads, "knowledgeable score"))
        for units in UNITS:
            values = torch.cat(list(getattr(scores, units)))
            drawn.append(plots.densities(output / f"density-{units}.svg", values, f"knowledgeable score of {units}"))
    return drawn
