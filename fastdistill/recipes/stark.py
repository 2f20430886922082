"""Sparse teachers (STARK): a teacher without what a trial student finds unfriendly, and the student learns anew."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, product
from typing import TYPE_CHECKING, Any

from fastdistill.ops.kd_ce_loss import Divergence
from fastdistill.recipes import options as shared

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel

    from fastdistill.data.tasks import Task
    from fastdistill.models.scores import Scores
    from fastdistill.objectives.base import Objective
    from fastdistill.recipes.begin import Beginning
    from fastdistill.recipes.executors import Local, Trial
    from fastdistill.recipes.stages import Stages, Trained
    from fastdistill.sensitivity.weights import WeightScores

    Learner = tuple[Stages, str, Objective, PreTrainedModel | None]
    """Where a student is kept, by what name, how it learns, and from whom."""

SELECTIONS = {"knowledge": "stark", "random": "stark-rand", "auto": "stark-auto"}
"""How what is pruned is selected, and what its students are called."""

OBJECTIVES = ("kd", "pkd", "ckd")

DIVERGENCE: Divergence = "soft_ce"
"""The paper's. A student learns by it what it does by forward KL, but teachers' gradients, which score them, differ."""

SPARSITIES = tuple(n / 10 for n in range(1, 10))

Result = Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_run(parser, needs_layers=False)
    shared.add_training(parser)
    shared.add_distillation(parser, divergence=DIVERGENCE)
    add = parser.add_argument_group("STARK").add_argument
    share = shared.number(low=0, most=1)
    add(
        "--student-sparsity",
        type=shared.number(above=0, below=1),
        metavar="X",
        help="in the place of --student-layers: the student is the teacher without that share of its heads and "
        "neurons, the least expressive (the paper's: 0.7)",
    )
    add(
        "--sparsity",
        type=shared.listed(shared.number(above=0, below=1)),
        metavar="X[,X...]",
        help="shares of the teacher's heads and neurons that are removed, each tried (default: 0.1,0.2,...,0.9)",
    )
    add(
        "--selection",
        type=shared.listed(shared.choice(*SELECTIONS)),
        default=("knowledge",),
        metavar="S[,S...]",
        help="what is removed: the least knowledgeable (knowledge), any (random), or the least knowledgeable up to the "
        "first peak of the density of the heads' scores, which tries one sparsity alone (auto) (default: knowledge)",
    )
    add(
        "--tradeoff",
        type=share,
        default=0.5,
        metavar="X",
        help="weight of expressiveness against student-friendliness in a score (default: %(default)g)",
    )
    add(
        "--objective",
        choices=OBJECTIVES,
        default="kd",
        help="how students learn: by logits alone (kd), or by hidden states too, of the first token (pkd) or the "
        "relations of all tokens (ckd: its teachers run in every step) (default: %(default)s)",
    )
    add(
        "--hidden-weight",
        type=shared.number(above=0),
        metavar="X",
        help="weight of the hidden states' term (default: 100 for pkd, 1 for ckd)",
    )
    add("--unstructured", action="store_true", help="remove single weights of the encoder, by making them zero")
    add(
        "--reduce",
        choices=("example", "batch"),
        default="example",
        help="sensitivities by example, or as in the published code by batch (default: %(default)s)",
    )
    add(
        "--score-on",
        choices=("train", "validation"),
        default="train",
        help="the examples that the teacher is scored on (default: %(default)s)",
    )
    add(
        "--round-to",
        type=shared.integer(1),
        metavar="N",
        help="round the neurons that a layer keeps to a multiple of N (default: 1)",
    )
    for name, of, kind in (
        ("learning-rate", "students' peak learning rates", shared.number(above=0)),
        ("batch-size", "batch sizes of students", shared.integer(1)),
    ):
        add(
            f"--{name}-grid",
            type=shared.listed(kind),
            metavar="X[,X...]",
            help=f"{of} to try, of which the best on the validation examples counts; a chain's assistants take the "
            f"first (default: --{name})",
        )
    shared.add_comparison(parser)
    shared.add_executor(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Do the recipe, print its tables, write results.json and the plots; returns what results.json holds.

    1. The teacher is fine-tuned on the task, unless it is a classifier of it already.
    2. Trial distillation: the student learns from the dense teacher.
    3. The teacher's heads and neurons are scored with that student.
    4. For each sparsity the lowest scores are removed, the student is rewound to where it began, and learns from the
       sparse teacher. The best on the validation examples counts, the trial student among them.
    """
    from fastdistill.objectives.logits import MSE, LogitsKD, TaskLoss
    from fastdistill.recipes.assistants import Assistants, chain_of
    from fastdistill.recipes.begin import begin
    from fastdistill.recipes.executors import executor_of
    from fastdistill.recipes.plots import require_matplotlib
    from fastdistill.recipes.report import finish, summary

    started = time.perf_counter()
    if not options.no_plots:
        require_matplotlib()
    _check(options)
    beginning = begin(options)
    task, metric = beginning.data.task, beginning.data.task.metric
    objective, of_teacher = _objectives(options, task)
    _check_models(options, beginning.pretrained)
    executor = executor_of(options)
    chain = chain_of(options, beginning.pretrained.config.num_hidden_layers)
    stages = beginning.stages()

    teacher = beginning.teacher(stages)
    results: dict[str, Any] = {"teacher": teacher.result}
    student = _student(beginning, stages, teacher)
    train = _Grid(options, student, metric, executor)
    smoothing = options.label_smoothing or 0.0
    kd: Objective = MSE()
    if not task.is_regression:
        kd = LogitsKD(options.kd_temperature or 2.0, divergence=DIVERGENCE, label_smoothing=smoothing)
    assistants = Assistants(stages, teacher, kd, train.first, results)

    baselines: dict[str, tuple[Objective, PreTrainedModel | None]] = {}
    if options.baselines:
        baselines["finetuned"] = (TaskLoss(smoothing), None)
        if objective != kd:
            baselines["kd"] = (kd, teacher.model)
    if chain:
        baselines["takd"] = (kd, assistants(*chain[:-1]).model)
    runs = [_Run(options, stages.seeded(seed), teacher, objective) for seed in options.seeds or (options.seed,)]
    learners = {**baselines, "trial": (objective, teacher.model)}
    trained = train((run.stages, name, *learner) for name, learner in learners.items() for run in runs)
    results |= {name: summary(metric, [next(trained).result for _ in runs]) for name in baselines}
    for run in runs:
        run.score(next(trained), of_teacher)
    results["trial"] = summary(metric, [run.trial for run in runs])
    if options.baselines and objective == kd:
        results["kd"] = results["trial"]
    trained = train(learner for run in runs for learner in run.learners())
    for run in runs:
        for selection in options.selection:
            run.students[selection] = {key: next(trained).result for key in run.plan(selection)}
    sparsities = {}
    for selection in options.selection:
        name = SELECTIONS[selection]
        tried = runs[0].students[selection]
        sparsities[name] = {
            key: {
                "student": summary(metric, [run.students[selection][key] for run in runs]),
                "teacher": summary(metric, [run.teachers[selection][key] for run in runs]),
                "sparsity": [run.sparsity(selection, key) for run in runs],
            }
            for key in tried
        }
        best = [run.best(selection) for run in runs]
        results[name] = {**summary(metric, [one for _, one in best]), "sparsity": [key for key, _ in best]}

    settings = {**beginning.settings, "objective": repr(objective)}
    tables = [_table(task, name, found, teacher) for name, found in sparsities.items()]
    seconds = time.perf_counter() - started
    record = finish(options.output, settings, task, results, seconds, *tables, sparsities=sparsities)
    if not options.no_plots:
        _plot(options, metric, sparsities, results, runs[0].scores)
    return record


class _Grid:
    """Trains students from their beginning with every learning rate and batch size, and gives the best of each."""

    def __init__(self, options: argparse.Namespace, student: PreTrainedModel, metric: str, executor: Local) -> None:
        rates = options.learning_rate_grid or (options.learning_rate,)
        self.student, self.metric, self.executor, self.epochs = student, metric, executor, options.epochs
        self.points = list(product(rates, options.batch_size_grid or (options.batch_size,)))

    @property
    def first(self) -> dict[str, Any]:
        return self._training(*self.points[0])

    def _training(self, rate: float, batch_size: int) -> dict[str, Any]:
        return {"epochs": self.epochs, "learning_rate": rate, "batch_size": batch_size}

    def __call__(self, learners: Iterable[Learner]) -> Iterator[Trained]:
        """All that the executor can train at once, in the learners' order."""
        trained = self.executor.in_turn(trial for learner in learners for trial in self._trials(*learner))
        while best := max(islice(trained, len(self.points)), key=lambda one: one.result[self.metric], default=None):
            yield best

    def _trials(
        self, stages: Stages, name: str, objective: Objective, teacher: PreTrainedModel | None
    ) -> Iterator[Trial]:
        from fastdistill.recipes.executors import Trial

        for rate, batch_size in self.points:
            folder = name if len(self.points) == 1 else f"{name}-{rate:g}-{batch_size}"
            training = {"teacher": teacher, "store_hidden_states": True, **self._training(rate, batch_size)}
            yield Trial(stages, folder, self.student, objective, training)


class _Run:
    """The method with one seed."""

    trial: Result
    scores: Scores | WeightScores | None

    def __init__(self, options: argparse.Namespace, stages: Stages, teacher: Trained, objective: Objective) -> None:
        self.options, self.stages, self.teacher, self.objective = options, stages, teacher, objective
        self.students: dict[str, dict[str, Result]] = {}
        self.teachers: dict[str, dict[str, Result]] = {}
        self.auto = 0.0

    def score(self, trial: Trained, of_teacher: Objective) -> None:
        from fastdistill.models.scores import Scores

        self.trial, self.scores = trial.result, self._scores(trial.model, of_teacher)
        if "auto" in self.options.selection:
            assert isinstance(self.scores, Scores)
            self.auto = self.scores.auto_sparsity()

    def learners(self) -> Iterator[Learner]:
        """The students of all sparse teachers, each of which is made when its turn comes."""
        from fastdistill.objectives.logits import TaskLoss

        for selection in self.options.selection:
            self.teachers[selection] = {}
            scores = self._ranked(selection)
            for key, sparsity in self.plan(selection).items():
                name = f"{SELECTIONS[selection]}-{key}" if key != "auto" else SELECTIONS[selection]
                model = self._sparse(scores, sparsity)
                sparse = self.stages.train(f"teacher-{name}", model, TaskLoss(), epochs=0, learning_rate=0)
                self.teachers[selection][key] = sparse.result
                yield self.stages, name, self.objective, sparse.model

    def plan(self, selection: str) -> dict[str, float]:
        """The sparsities that are tried, by what they are called."""
        return {"auto": self.auto} if selection == "auto" else {f"{one:g}": one for one in self.options.sparsity}

    def best(self, selection: str) -> tuple[float, Result]:
        """The sparsity and the student that is best on the validation examples; 0 is the trial student's."""
        found: list[tuple[float, Result]] = [(0.0, self.trial)]
        found += [(self.sparsity(selection, key), one) for key, one in self.students[selection].items()]
        return max(found, key=lambda pair: pair[1][self.stages.task.metric])

    def sparsity(self, selection: str, key: str) -> float:
        return self.auto if selection == "auto" else float(key)

    def _scores(self, trial: PreTrainedModel, of_teacher: Objective) -> Scores | WeightScores | None:
        """None where nothing but chance selects."""
        options = self.options
        if set(options.selection) == {"random"}:
            return None
        found = self.stages.score(
            "scores",
            self.teacher.model,
            trial if options.tradeoff < 1 else None,
            objective=of_teacher if options.tradeoff < 1 else None,
            reduce=options.reduce,
            on=options.score_on,
            of_weights=options.unstructured,
        )
        return found.knowledgeable(options.tradeoff)

    def _ranked(self, selection: str) -> Scores | WeightScores:
        """The scores by which to prune, at random if that is how to select."""
        import torch

        from fastdistill.models.scores import random_scores
        from fastdistill.sensitivity.weights import random_weight_scores

        if selection == "random":
            generator = torch.Generator().manual_seed(self.stages.seed)
            draw: Any = random_weight_scores if self.options.unstructured else random_scores
            return draw(self.teacher.model, generator)  # type: ignore[no-any-return]
        assert self.scores is not None
        return self.scores

    def _sparse(self, scores: Scores | WeightScores, sparsity: float) -> PreTrainedModel:
        from fastdistill.models.pruning import prune
        from fastdistill.models.scores import Scores
        from fastdistill.sensitivity.weights import mask_weights

        if isinstance(scores, Scores):
            return prune(self.teacher.model, scores, sparsity, round_to=self.options.round_to or 1)
        return mask_weights(self.teacher.model, scores, sparsity)


def _check_models(options: argparse.Namespace, teacher: PreTrainedModel) -> None:
    """What could not be is said before the teacher is trained."""
    from fastdistill.models.architectures import blocks
    from fastdistill.models.sharing import refuse_shared

    refuse_shared(teacher)
    layers, wanted = len(blocks(teacher)), options.student_layers
    if wanted is not None and wanted > layers:
        raise ValueError(f"--student-layers is {wanted}; the teacher has {layers}")
    if options.objective == "ckd" and wanted == 1:
        raise ValueError("--student-layers is 1; --objective ckd relates a token's states through 2 layers or more")


def _check(options: argparse.Namespace) -> None:
    if (options.student_layers is None) == (options.student_sparsity is None):
        raise ValueError("expected either --student-layers or --student-sparsity")
    if options.student_layers is None and options.chain is not None:
        raise ValueError("--chain is of layers, but the student has --student-sparsity; expected --student-layers")
    if options.objective == "kd" and options.hidden_weight is not None:
        raise ValueError(f"--hidden-weight is {options.hidden_weight}, but --objective kd has no hidden states")
    at_random = set(options.selection) == {"random"}
    scored_by_units = options.student_sparsity is not None or not (options.unstructured or at_random)
    ignored = {
        "--reduce": options.reduce != "example" and not scored_by_units,
        "--round-to": options.round_to is not None and options.unstructured,
        "--tradeoff": options.tradeoff != 0.5 and at_random,
        "--score-on": options.score_on != "train" and at_random and options.student_sparsity is None,
        "--sparsity": options.sparsity is not None and set(options.selection) == {"auto"},
        "--learning-rate": options.learning_rate is not None and options.learning_rate_grid is not None,
        "--kd-temperature": options.kd_temperature is not None and not (options.baselines or options.chain),
    }
    if names := [name for name, is_ignored in ignored.items() if is_ignored]:
        raise ValueError(f"{', '.join(names)} would have no effect beside the other options; leave it out")
    if options.unstructured and "auto" in options.selection:
        raise ValueError("--selection auto is by the scores of heads, which --unstructured does not have")
    options.sparsity = options.sparsity or SPARSITIES


def _objectives(options: argparse.Namespace, task: Task) -> tuple[Objective, Objective]:
    """What the student learns by, and that part of it, differentiated with respect to the teacher, that scores it."""
    from fastdistill.objectives.base import WeightedSum
    from fastdistill.objectives.ckd import CKD
    from fastdistill.objectives.pkd import PKD
    from fastdistill.recipes.kd import logits_objective

    logits = logits_objective(options, task, divergence=DIVERGENCE)
    of_teacher = logits_objective(options, task, divergence=DIVERGENCE, has_labels=False)
    if options.objective == "kd":
        return logits, of_teacher
    weight = options.hidden_weight or {"pkd": 100.0, "ckd": 1.0}[options.objective]
    hidden: dict[str, tuple[float, Objective]] = {
        options.objective: (weight, PKD() if options.objective == "pkd" else CKD())
    }
    return WeightedSum({"logits": (1.0, logits), **hidden}), WeightedSum({"logits": (1.0, of_teacher), **hidden})


def _student(beginning: Beginning, stages: Stages, teacher: Trained) -> PreTrainedModel:
    """Where every student begins."""
    from fastdistill.models.students import first_layers, parameter_pruned
    from fastdistill.sensitivity.units import Sensitivities

    options = beginning.options
    if options.student_layers is not None:
        return first_layers(teacher.model, options.student_layers)
    found = stages.score(
        "expressiveness", teacher.model, None, objective=None, reduce=options.reduce, on=options.score_on
    )
    assert isinstance(found, Sensitivities)
    return parameter_pruned(teacher.model, found.expressiveness, options.student_sparsity)


def _table(task: Task, name: str, found: Mapping[str, Mapping[str, Any]], dense: Trained) -> Table:
    """A sparsity a row: the student, and the teacher it had, whose time is told against the dense one's, too."""
    from rich.table import Table

    from fastdistill.recipes.report import percent

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
    options: argparse.Namespace,
    metric: str,
    sparsities: Mapping[str, Mapping[str, Mapping[str, Any]]],
    results: Mapping[str, Mapping[str, Any]],
    scores: Scores | WeightScores | None,
) -> None:
    """sparsities.svg; heads.svg and the densities of scores are of the first seed."""
    import torch
    from accelerate import PartialState  # type: ignore[import-untyped]

    from fastdistill.models.scores import UNITS, Scores
    from fastdistill.recipes import plots

    if not PartialState().is_main_process:
        return
    curves = {
        name: {float(key): (one["student"][metric], one["student"].get("spread", 0.0)) for key, one in found.items()}
        for name, found in sparsities.items()
        if "auto" not in found
    }
    lines = {
        name: results[name][metric] for name in ("finetuned", "trial", "kd", "takd", "stark-auto") if name in results
    }
    plots.metric_by_share(options.output / "sparsities.svg", "sparsity of the teacher", metric, curves, lines)
    if isinstance(scores, Scores):
        plots.heat_map(options.output / "heads.svg", scores.heads, "knowledgeable score")
        for units in UNITS:
            values = torch.cat(list(getattr(scores, units)))
            plots.densities(options.output / f"density-{units}.svg", values, f"knowledgeable score of {units}")
