"""A team of teachers, one sampled at a time (AutoSKDBERT): how likely each should be is learned, and then tried."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from typing import TYPE_CHECKING, Any

from fastdistill.recipes import options as shared

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table
    from torch import Tensor
    from transformers import PreTrainedModel

    from fastdistill.autoskd.search import Found, Settings
    from fastdistill.data.tasks import Task
    from fastdistill.objectives.base import Objective
    from fastdistill.recipes.executors import Trial
    from fastdistill.recipes.stages import Stages, Trained

Results = dict[str, Any]
Theta = dict[str, float]
"""How likely each teacher is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_run(parser, of_text_alone=False)
    shared.add_training(parser)
    shared.add_executor(parser)
    number = shared.number
    add = parser.add_argument_group("teachers").add_argument
    add(
        "--team",
        type=shared.listed(str),
        metavar="K,K[,...]",
        help="layers of each of the team: the teacher's first, trained as a student is; its own number is the teacher "
        "itself (default: 1,2,... to the teacher's); for images networks, as wrn-16-1,wrn-16-2,resnet-20",
    )
    add("--student", metavar="NETWORK", help="for images, which network the student is, as wrn-10-1")
    add(
        "--team-from",
        choices=("labels", "teacher"),
        default="labels",
        help="what those with fewer layers than the teacher learn from: the labels alone, or by plain distillation "
        "from the teacher (default: %(default)s)",
    )
    add(
        "--temperature",
        type=number(above=0),
        default=1.0,
        metavar="X",
        help="of the softmax on both sides, in the search and for its students (default: %(default)g)",
    )
    add = parser.add_argument_group("AutoSKDBERT").add_argument
    add(
        "--method",
        choices=("sswo", "cr"),
        default="sswo",
        help="search by the sampled teacher's logits and weight alone (sswo), or by all teachers' mixed (cr) "
        "(default: %(default)s)",
    )
    add(
        "--order",
        type=int,
        choices=(1, 2),
        default=2,
        help="whether the weights' gradient looks a step of the student ahead (2) or not (1) (default: %(default)s)",
    )
    add(
        "--look-ahead",
        type=number(above=0),
        metavar="X",
        help="length of that step (default: --theta-learning-rate, as the paper has it)",
    )
    add(
        "--drop",
        type=shared.integer(0),
        metavar="M",
        help="teachers dropped after half of the search, the least likely (default: as many as are weaker than the "
        "student without teacher)",
    )
    add(
        "--candidates",
        type=shared.integer(1),
        default=25,
        metavar="N",
        help="distributions taken from the search's second half, a student trained with each (default: %(default)s)",
    )
    add(
        "--random-candidates",
        type=shared.integer(0),
        default=0,
        metavar="N",
        help="students of random distributions, to compare with (default: %(default)s)",
    )
    add("--search-epochs", type=number(above=0), metavar="N", help="of the search, over half the data (default: 15)")
    add(
        "--theta-learning-rate",
        type=number(above=0),
        default=1e-3,
        metavar="X",
        help="of the distribution; the paper's are 3e-4 to 1e-3 (default: %(default)g)",
    )
    shared.add_comparison(
        parser,
        baselines="students by plain distillation from the strongest of the team, with labels (kd) and with this "
        "method's loss (single), and by all teachers at once (avgkd, mtbert)",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Do the recipe, print its tables, write results.json and the plots; returns what results.json holds.

    1. The team is trained. Of text: the teacher is fine-tuned on the task, unless it is a classifier of it already, and
       so are its first layers. Of images: networks are, from weights at random.
    2. The team's logits on the training data are stored; no teacher runs from here on.
    3. Search: the probabilities learn on one half of the data while a student learns on the other; after half of the
       steps the weakest teachers are dropped. Snapshots of the rest of the way are the candidates.
    4. With each candidate a student learns from the beginning, from one sampled teacher a step. The best on the
       validation examples counts, and so does, to compare, the best of random distributions. (Both are the best of
       many on the very examples that they are reported on: compare equal numbers of them.)

    Each seed has a search of its own, and of images a student with weights of its own.
    """
    from fastdistill.objectives.logits import LogitsKD, TaskLoss
    from fastdistill.recipes.executors import Trial, executor_of
    from fastdistill.recipes.plots import require_matplotlib
    from fastdistill.recipes.report import finish, summary
    from fastdistill.recipes.teams import team_of
    from fastdistill.teachers.team import TeacherTeam

    started = time.perf_counter()
    if not options.no_plots:
        require_matplotlib()
    executor = executor_of(options)
    source = team_of(options)
    task = source.data.task
    if options.drop is not None and options.drop >= source.teachers:
        raise ValueError(f"--drop is {options.drop}; expected fewer than the {source.teachers} teachers")
    uses_kd = options.baselines or options.chain or options.team_from == "teacher"
    if options.kd_temperature is not None and not uses_kd:
        raise ValueError("--kd-temperature would have no effect: nothing learns by plain distillation; leave it out")
    _settings(options, drop=options.drop or 0).schedule(len(source.data.train))
    stages = source.stages()
    smoothing = options.label_smoothing or 0.0
    training = {"epochs": options.epochs, "learning_rate": options.learning_rate}

    results: Results = {}
    team = source.train(stages, executor, results)
    seeded = [stages.seeded(seed) for seed in options.seeds or (options.seed,)]
    students = {stages.seed: source.student(stages.seed) for stages in seeded}

    def trials(learners: Mapping[str, tuple[Objective, PreTrainedModel | None]]) -> Iterator[Trial]:
        for name, (objective, teacher) in learners.items():
            for stages in seeded:
                yield Trial(stages, name, students[stages.seed], objective, {"teacher": teacher, **training})

    def summarize(names: Iterable[str], trained: Iterator[Trained]) -> None:
        results.update({name: summary(task.metric, [next(trained).result for _ in seeded]) for name in names})

    kd = LogitsKD(temperature=options.kd_temperature or 2.0, label_smoothing=smoothing)
    strongest = max(team, key=lambda name: team[name].result[task.metric])
    learners: dict[str, tuple[Objective, PreTrainedModel | None]] = {"finetuned": (TaskLoss(smoothing), None)}
    if (assistant := source.chained()) is not None:
        learners["takd"] = (kd, assistant)
    if options.baselines:
        learners["kd"] = (kd, team[strongest].model)
    summarize(learners, executor.in_turn(trials(learners)))
    weaker = sum(one.result[task.metric] < results["finetuned"][task.metric] for one in team.values())
    drop = min(weaker, len(team) - 1) if options.drop is None else options.drop

    with_logits = stages.with_team(TeacherTeam({name: one.model for name, one in team.items()}))
    seeded = [with_logits.seeded(stages.seed) for stages in seeded]
    runs = [
        _Run(stages, students[stages.seed], tuple(team), _settings(options, drop, stages.seed), training)
        for stages in seeded
    ]
    thetas = {"autoskd": [run.learned() for run in runs]}
    if options.random_candidates:
        thetas["random"] = [run.random(options.random_candidates) for run in runs]
    mixed = _baselines(options, tuple(team), strongest) if options.baselines else {}
    trained = executor.in_turn(
        chain(
            trials({name: (objective, None) for name, objective in mixed.items()}),
            (
                run.trial(name, theta)
                for by_seed in thetas.values()
                for run, named in zip(runs, by_seed, strict=True)
                for name, theta in named.items()
            ),
        )
    )
    summarize(mixed, trained)
    candidates = {}
    for kind, by_seed in thetas.items():
        tried = [{name: next(trained).result for name in named} for named in by_seed]
        names = [max(found, key=lambda name: found[name][task.metric]) for found in tried]
        results[kind] = summary(task.metric, [found[name] for found, name in zip(tried, names, strict=True)])
        results[kind] |= {
            "theta": [named[name] for named, name in zip(by_seed, names, strict=True)],
            "candidate": names,
        }
        candidates[kind] = [
            {name: {"theta": theta, task.metric: found[name][task.metric]} for name, theta in named.items()}
            for found, named in zip(tried, by_seed, strict=True)
        ]
    searches = [
        {
            "seed": run.stages.seed,
            "steps": len(run.found.theta) - 1,
            "selected_at": run.found.selected_at,
            "theta": dict(zip(run.found.names, run.found.theta[-1].tolist(), strict=True)),
        }
        for run in runs
    ]

    more = {"team": list(team), "strongest": strongest, "drop": drop, "searches": searches, "candidates": candidates}
    tables = [_theta_table(task, results, runs[0].found), _candidates_table(task, candidates)]
    record = finish(options.output, source.settings, task, results, time.perf_counter() - started, *tables, **more)
    if not options.no_plots:
        _plot(options.output, task.metric, runs[0].found, candidates, results)
    return record


class _Run:
    """The method with one seed."""

    def __init__(
        self,
        stages: Stages,
        student: PreTrainedModel,
        names: tuple[str, ...],
        settings: Settings,
        training: Mapping[str, Any],
    ) -> None:
        self.stages, self.student, self.names = stages, student, names
        self.settings, self.training = settings, training
        self.found = self._search()

    def learned(self) -> dict[str, Theta]:
        """By what each candidate is called; of equal ones the first alone."""
        named = {f"autoskd-{place}": self._named(theta) for place, theta in enumerate(self.found.candidates, 1)}
        first = {tuple(theta.values()): name for name, theta in reversed(named.items())}
        return {name: theta for name, theta in named.items() if first[tuple(theta.values())] == name}

    def random(self, number: int) -> dict[str, Theta]:
        import torch

        from fastdistill.autoskd.theta import random_distributions

        generator = torch.Generator().manual_seed(self.stages.seed)
        drawn = random_distributions(number, len(self.names), generator)
        return {f"random-{place}": self._named(theta) for place, theta in enumerate(drawn, 1)}

    def trial(self, name: str, theta: Theta) -> Trial:
        from fastdistill.objectives.team import SampledTeacher
        from fastdistill.recipes.executors import Trial

        objective = SampledTeacher(theta, self.settings.temperature, self.stages.seed)
        return Trial(self.stages, name, self.student, objective, self.training)

    def _named(self, theta: Tensor) -> Theta:
        return dict(zip(self.names, theta.tolist(), strict=True))

    def _search(self) -> Found:
        from accelerate import PartialState  # type: ignore[import-untyped]

        from fastdistill.autoskd.search import Found, search
        from fastdistill.digest import model_digest
        from fastdistill.recipes.folder import UNFINISHED

        stages = self.stages

        def make(folder: Path) -> Any:
            found = search(
                self.student,
                stages.train_data,
                self.names,
                self.settings,
                collate=stages.collate,
                checkpoint=folder / UNFINISHED,
                checkpoints=stages.checkpoints,
                device=PartialState().device,
                bf16=stages.bf16,
                progress=PartialState().is_main_process,
            )
            return lambda: found.save(folder / "theta.safetensors")

        came_from = {"settings": asdict(self.settings), "names": list(self.names), "model": model_digest(self.student)}
        return Found.load(stages.keep("search", came_from, make) / "theta.safetensors")


def _settings(options: argparse.Namespace, drop: int, seed: int = 0) -> Settings:
    from fastdistill.autoskd.search import Settings

    return Settings(
        method=options.method,
        order=options.order,
        drop=drop,
        candidates=options.candidates,
        epochs=options.search_epochs or 15.0,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        theta_learning_rate=options.theta_learning_rate,
        look_ahead=options.look_ahead,
        temperature=options.temperature,
        seed=seed,
    )


def _baselines(options: argparse.Namespace, names: tuple[str, ...], strongest: str) -> dict[str, Objective]:
    from fastdistill.objectives.team import MTBERT, AvgKD

    temperature = options.temperature
    return {
        "single": AvgKD((strongest,), temperature),
        "avgkd": AvgKD(names, temperature),
        "mtbert": MTBERT(names, temperature),
    }


def _theta_table(task: Task, results: Mapping[str, Any], found: Found) -> Table:
    """A teacher a row: its metric, and its probability after phase 1, after selection and phase 2, and in the best."""
    from rich.table import Table

    from fastdistill.recipes.report import percent

    table = Table("teacher", title=f"probabilities: {task.name}, first seed")
    for column in (f"{task.metric} %", "before selection", "after", "at the end", "best candidate"):
        table.add_column(column, justify="right")
    best = results["autoskd"]["theta"][0]
    for place, name in enumerate(found.names):
        steps = (found.selected_at - 1, found.selected_at, -1)
        shares = [*(float(found.theta[step, place]) for step in steps), best[name]]
        table.add_row(name, percent(results[name], task.metric), *(f"{share:.3f}" for share in shares))
    return table


def _candidates_table(task: Task, candidates: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """Learned against random: the best, mean and worst of all seeds' students."""
    import statistics

    from rich.table import Table

    table = Table("distributions", title=f"students: {task.name}, {task.metric} %")
    for column in ("students", "best", "mean", "worst"):
        table.add_column(column, justify="right")
    for name, by_seed in candidates.items():
        values = [100 * one[task.metric] for found in by_seed for one in found.values()]
        shown = (max(values), statistics.fmean(values), min(values))
        table.add_row({"autoskd": "learned"}.get(name, name), str(len(values)), *(f"{value:.1f}" for value in shown))
    return table


def _plot(
    output: Path,
    metric: str,
    found: Found,
    candidates: Mapping[str, Sequence[Mapping[str, Any]]],
    results: Mapping[str, Any],
) -> None:
    """theta.svg and candidates.svg, which ranks students with the best first; both of the first seed."""
    from accelerate import PartialState

    from fastdistill.recipes import plots

    if not PartialState().is_main_process:
        return
    plots.probabilities_over_steps(output / "theta.svg", found.names, found.theta, found.selected_at)
    curves: dict[str, dict[float, tuple[float, float]]] = {}
    for name, by_seed in candidates.items():
        ranked = sorted((one[metric] for one in by_seed[0].values()), reverse=True)
        curves[{"autoskd": "learned"}.get(name, name)] = {rank: (v, 0.0) for rank, v in enumerate(ranked, 1)}
    names = ("finetuned", "kd", "single", "avgkd", "mtbert")
    lines = {name: results[name]["values"][0] for name in names if name in results}
    plots.metric_by_share(output / "candidates.svg", "rank of the distribution", metric, curves, lines)
