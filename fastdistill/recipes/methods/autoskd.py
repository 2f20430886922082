"""A team of teachers, one sampled at a time (AutoSKDBERT): how likely each should be is learned, and then tried."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from fastdistill.autoskd.search import Found, search
from fastdistill.autoskd.settings import Settings
from fastdistill.autoskd.theta import random_distributions
from fastdistill.data.tasks import Task
from fastdistill.digest import model_digest
from fastdistill.models.vocabulary import can_compact
from fastdistill.objectives.base import Objective
from fastdistill.objectives.logits import TaskLoss
from fastdistill.objectives.team import MTBERT, AvgKD, SampledTeacher
from fastdistill.recipes import plots
from fastdistill.recipes.baselines import baselines
from fastdistill.recipes.comparison import Comparison, Learner
from fastdistill.recipes.fitting import CHECKPOINTS
from fastdistill.recipes.folder import UNFINISHED
from fastdistill.recipes.methods.teams import Member, stored, taught_by, team_of, through
from fastdistill.recipes.optimization import optimization_of
from fastdistill.recipes.output import of_one_run
from fastdistill.recipes.report import Report, percent
from fastdistill.recipes.settings import AutoSKDSettings
from fastdistill.recipes.stages import Stages
from fastdistill.recipes.training import Trained, Training

ADAM_DECAY = 1e-4

Theta = dict[str, float]
"""How likely each teacher is."""

Tried = dict[str, list[dict[str, dict[str, Any]]]]
"""By kind ("autoskd", "random") and seed, the distributions that were tried, each with what its student reached."""


@of_one_run
def autoskd(settings: AutoSKDSettings) -> Report:
    """Do the recipe, and write results.json and the plots.

    1. The team is trained. Of text: encoders are fine-tuned on the task, each with its own tokenizer, unless they are
       classifiers of it already; and so are first layers of one. Of images: networks are, from weights at random.
    2. The team's logits on the training data are stored; no teacher runs from here on, but on images that are others
       in each epoch.
    3. Search: the probabilities learn on one half of the data while a student learns on the other; after half of the
       steps the weakest teachers are dropped. Snapshots of the rest of the way are the candidates.
    4. With each candidate a student learns from the beginning, from one sampled teacher a step. The best on the
       examples that select counts, and so does, to compare, the best of random distributions.

    Each seed has a search of its own, and of images a student with weights of its own.
    """
    if not settings.no_plots:
        plots.require_matplotlib()
    source = team_of(settings)
    settings, task = source.settings, source.data.task
    if settings.drop is not None and settings.drop >= source.teachers:
        raise ValueError(f"--drop is {settings.drop}; expected fewer than the {source.teachers} teachers")
    rate = (settings.learning_rate_grid or (source.learning_rate,))[0]
    _search_settings(settings, task, rate, drop=settings.drop or 0).schedule(len(source.data.train))
    comparison = source.comparison()

    team = source.train(comparison)
    strongest = max(team, key=lambda name: team[name].trained.result["selection"])
    students = {stages.seed: source.student(stages.seed) for stages in comparison.seeded}
    _train_baselines(settings, comparison, source.chain, students, team, strongest)
    finetuned = comparison.results["finetuned"]["selection"]
    weak = sum(one.trained.result["selection"] <= finetuned for one in team.values())  # as the student itself is
    drop = min(max(1, weak), len(team) - 1) if settings.drop is None else settings.drop

    with_logits = stored(comparison.stages, team)
    runs = [
        _Run(
            comparison,
            with_logits.seeded(stages.seed),
            students[stages.seed],
            team,
            _search_settings(settings, task, rate, drop, stages.seed),
        )
        for stages in comparison.seeded
    ]
    candidates = _try(settings, comparison, runs, tuple(team), strongest)

    searches = [run.record([one.trained.result[task.metric] for one in team.values()]) for run in runs]
    tables = [
        _theta_table(task, comparison.results, runs[0].found),
        _correlations_table(task, searches),
        _candidates_table(task, candidates),
    ]
    drawn = [] if settings.no_plots else _plot(settings.folder, comparison, runs[0].found, candidates)
    more = {"team": list(team), "strongest": strongest, "drop": drop, "searches": searches, "candidates": candidates}
    return comparison.finish(source.record(), *tables, plots=drawn, **more)


def _train_baselines(
    settings: AutoSKDSettings,
    comparison: Comparison,
    chain: tuple[int, ...],
    students: Mapping[int, PreTrainedModel],
    team: Mapping[str, Member],
    strongest: str,
) -> None:
    """Those of one teacher at most: without, from the strongest, from an assistant, and down the team."""
    own = comparison.stages
    learners: dict[str, tuple[Stages, Learner]] = {"finetuned": (own, (TaskLoss(settings.smoothing), None))}
    learners |= {name: (own, one) for name, one in baselines(comparison, chain, team[strongest].model).items()}
    teachers = {"kd": team[strongest]} if "kd" in learners else {}
    if settings.team_chain:
        teachers["takd-team"] = through(comparison, team)
    for name, member in teachers.items():
        stages, teacher = taught_by(own, member)
        learners[name] = stages, (comparison.kd, teacher)
    train = comparison.baseline if settings.baselines else comparison.training  # whom the weak are told by
    trained = comparison.train(
        (stages.seeded(seed), train(name, student, learner))
        for name, (stages, learner) in learners.items()
        for seed, student in students.items()
    )
    for name in learners:
        comparison.summarize(name, [next(trained).result for _ in students])


def _try(
    settings: AutoSKDSettings, comparison: Comparison, runs: Sequence[_Run], names: tuple[str, ...], strongest: str
) -> Tried:
    """Students of single teachers and of all at once, if they are asked for, and of what was learned or drawn; the best
    of each kind go into the results."""
    thetas = {"autoskd": [run.learned() for run in runs]}
    if settings.phase_1_candidates:
        thetas["phase-1"] = [run.phase_1(settings.phase_1_candidates) for run in runs]
    if settings.random_candidates:
        thetas["random"] = [run.random(settings.random_candidates) for run in runs]
    wanted, temperature = set(settings.baselines or ()), settings.temperature
    mixed: dict[str, Objective] = {}
    if settings.each_teacher:
        mixed = {f"single-{name}": AvgKD((name,), temperature) for name in names}
    elif "single" in wanted:
        mixed = {"single": AvgKD((strongest,), temperature)}
    of_all = {"avgkd": AvgKD(names, temperature), "mtbert": MTBERT(names, temperature)}
    mixed |= {name: objective for name, objective in of_all.items() if name in wanted}

    def trials() -> Iterator[tuple[Stages, Training]]:
        for name, objective in mixed.items():
            for run in runs:
                yield run.taught, comparison.baseline(name, run.student, run.learner(objective))
        for by_seed in thetas.values():
            for run, named in zip(runs, by_seed, strict=True):
                for name, theta in named.items():
                    yield run.taught, run.training(name, theta)

    trained = comparison.train(trials())
    for name in mixed:
        comparison.summarize(name, [next(trained).result for _ in runs])
    if settings.each_teacher and "single" in wanted:
        comparison.name_too(f"single-{strongest}", "single")
    return {kind: _best(comparison, kind, by_seed, trained) for kind, by_seed in thetas.items()}


def _best(
    comparison: Comparison, kind: str, thetas: Iterable[Mapping[str, Theta]], trained: Iterator[Trained]
) -> list[dict[str, dict[str, Any]]]:
    """Of each seed's students the best into the results; what each distribution's student reached."""
    metric, best, tried = comparison.metric, [], []
    for named in thetas:
        found = {name: next(trained).result for name in named}
        name = max(found, key=lambda one: found[one]["selection"])
        best.append((name, named[name], found[name]))
        told = (metric, "selection")
        tried.append({one: {"theta": theta} | {key: found[one][key] for key in told} for one, theta in named.items()})
    comparison.summarize(kind, [result for _, _, result in best])
    comparison.results[kind] |= {
        "theta": [theta for _, theta, _ in best],
        "candidate": [name for name, _, _ in best],
    }
    return tried


class _Run:
    """The method with one seed; the stages' training data have what the team says."""

    def __init__(
        self,
        comparison: Comparison,
        stages: Stages,
        student: PreTrainedModel,
        team: Mapping[str, Member],
        settings: Settings,
    ) -> None:
        self.comparison, self.stages, self.student = comparison, stages, student
        self.names, self.settings = tuple(team), settings
        self.runs_teachers = stages.examples.augment is not None  # what they say to images as they are is stored
        self.taught = comparison.stages.seeded(stages.seed) if self.runs_teachers else stages
        self.team = team
        self.found = self._search()

    def record(self, reached: Sequence[float]) -> dict[str, Any]:
        """Of the search; `reached` is each teacher's metric."""
        found = self.found
        return {
            "seed": self.stages.seed,
            "steps": len(found.theta) - 1,
            "selected_at": found.selected_at,
            "theta": self._named(found.theta[-1]),
            "draws": self._named(found.draw_counts()),
            "correlation_with_draws": found.correlation(found.draw_counts()),
            "correlation_with_teachers": found.correlation(torch.tensor(reached)),
        }

    def learned(self) -> dict[str, Theta]:
        """By what each candidate is called; of equal ones the first alone."""
        return self._different("autoskd", self.found.candidates)

    def phase_1(self, number: int) -> dict[str, Theta]:
        """As many from before teachers were selected, evenly spaced, the last just before (table 5)."""
        last = self.found.selected_at - 1
        places = [round(last * place / number) for place in range(1, number + 1)]
        return self._different("phase-1", self.found.theta[places])

    def _different(self, kind: str, thetas: Tensor) -> dict[str, Theta]:
        named = {f"{kind}-{place}": self._named(theta) for place, theta in enumerate(thetas, 1)}
        first = {tuple(theta.values()): name for name, theta in reversed(named.items())}
        return {name: theta for name, theta in named.items() if first[tuple(theta.values())] == name}

    def random(self, number: int) -> dict[str, Theta]:
        generator = torch.Generator().manual_seed(self.stages.seed)
        drawn = random_distributions(number, len(self.names), generator)
        return {f"random-{place}": self._named(theta) for place, theta in enumerate(drawn, 1)}

    def training(self, name: str, theta: Theta) -> Training:
        learner = self.learner(SampledTeacher(theta, self.settings.temperature, self.stages.seed))
        return self.comparison.training(name, self.student, learner)

    def learner(self, objective: Objective) -> Learner:
        """With the teachers that it names, where what they say is not stored."""
        names = objective.needs.teachers if self.runs_teachers else ()
        return objective, {name: self.team[name].model for name in names} or None

    def _named(self, theta: Tensor) -> Theta:
        return dict(zip(self.names, theta.tolist(), strict=True))

    def _search(self) -> Found:
        stages = self.stages

        def make(folder: Path) -> Callable[[], None]:
            found = search(
                self.student,
                stages.examples.train,
                self.names,
                self.settings,
                collate=stages.examples.collate,
                tokens=stages.examples.tokens() if can_compact(self.student) else None,
                checkpoint=folder / UNFINISHED,
                checkpoints=CHECKPOINTS if stages.checkpoints is None else stages.checkpoints,
                device=PartialState().device,
                bf16=stages.bf16,
                cuda_graphs=stages.cuda_graphs,
                progress=PartialState().is_main_process,
            )
            return lambda: found.save(folder / "theta.safetensors")

        came_from = {"settings": asdict(self.settings), "names": list(self.names), "model": model_digest(self.student)}
        return Found.load(stages.keep("search", came_from, make) / "theta.safetensors")


def _search_settings(settings: AutoSKDSettings, task: Task, learning_rate: float, drop: int, seed: int = 0) -> Settings:
    """Its student is optimized as others are, but by Adam in place of AdamW, with the paper's weight decay."""
    optimization = optimization_of(settings, is_of_images=task.is_of_images)
    is_sgd = optimization.optim == "sgd"
    decay = optimization.weight_decay if is_sgd or settings.weight_decay is not None else ADAM_DECAY
    return Settings(
        method=settings.method,
        order=settings.order,
        drop=drop,
        candidates=settings.candidates,
        epochs=settings.search_epochs or (50.0 if task.is_of_images else 15.0),
        batch_size=settings.batch_size,
        learning_rate=learning_rate,
        optimizer="sgd" if is_sgd else "adam",
        weight_decay=decay,
        momentum=optimization.momentum or 0.0,
        lr_scheduler_type=optimization.lr_scheduler_type,
        warmup=optimization.warmup_steps,
        max_grad_norm=optimization.max_grad_norm,
        theta_optimizer=settings.theta_optimizer,
        theta_learning_rate=settings.theta_rate,
        theta_baseline=not settings.no_theta_baseline,
        look_ahead=settings.look_ahead,
        temperature=settings.temperature,
        seed=seed,
    )


def _theta_table(task: Task, results: Mapping[str, Any], found: Found) -> Table:
    """A teacher a row: its metric, and its probability after phase 1, after selection and phase 2, and in the best."""
    table = Table("teacher", title=f"probabilities: {task.name}, first seed")
    for column in (f"{task.metric} %", "before selection", "after", "at the end", "best candidate"):
        table.add_column(column, justify="right")
    best = results["autoskd"]["theta"][0]
    for place, name in enumerate(found.names):
        steps = (found.selected_at - 1, found.selected_at, -1)
        shares = [*(float(found.theta[step, place]) for step in steps), best[name]]
        table.add_row(name, percent(results[name], task.metric), *(f"{share:.3f}" for share in shares))
    return table


def _correlations_table(task: Task, searches: Sequence[Mapping[str, Any]]) -> Table:
    """What the probabilities at the end of the first phase go with, seed by seed: chance, or the teachers' quality."""
    table = Table("seed", title=f"correlation of the probabilities: {task.name}")
    columns = {
        "with the draws": "correlation_with_draws",
        f"with the teachers' {task.metric}": "correlation_with_teachers",
    }
    for column in columns:
        table.add_column(column, justify="right")
    for one in searches:
        table.add_row(str(one["seed"]), *(f"{one[key]:.2f}" for key in columns.values()))
    return table


def _candidates_table(task: Task, candidates: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """Learned against random: the best, mean and worst of all seeds' students."""
    table = Table("distributions", title=f"students: {task.name}, {task.metric} %")
    for column in ("students", "best", "mean", "worst"):
        table.add_column(column, justify="right")
    for name, by_seed in candidates.items():
        values = [100 * one[task.metric] for found in by_seed for one in found.values()]
        shown = (max(values), statistics.fmean(values), min(values))
        table.add_row({"autoskd": "learned"}.get(name, name), str(len(values)), *(f"{value:.1f}" for value in shown))
    return table


def _plot(output: Path, comparison: Comparison, found: Found, candidates: Tried) -> list[Path]:
    """theta.svg and candidates.svg, which ranks students with the best first; both of the first seed."""
    if not PartialState().is_main_process:
        return []
    metric, results = comparison.metric, comparison.results
    seed = comparison.seeded[0].output.name
    curves: dict[str, dict[float, plots.Levels]] = {}
    for kind, by_seed in candidates.items():
        ranked = sorted(by_seed[0], key=lambda name: by_seed[0][name][metric], reverse=True)
        levels = (comparison.interval({"stage": f"{seed}/{name}"}) for name in ranked)
        curves[{"autoskd": "learned"}.get(kind, kind)] = dict(enumerate(levels, 1))
    names = ("finetuned", "kd", "single", "avgkd", "mtbert")
    lines = {name: comparison.interval({"stage": results[name]["stages"][0]}) for name in names if name in results}
    told = str(replace(comparison.told, seeds=1))
    searched = f"search on {len(comparison.stages.examples.train):,} training examples, {comparison.told.first_seed}"
    return [
        plots.probabilities_over_steps(output / "theta.svg", found.names, found.theta, found.selected_at, searched),
        plots.metric_by_share(output / "candidates.svg", "rank of the distribution", metric, curves, lines, told),
    ]
