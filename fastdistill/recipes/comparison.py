"""What a method is compared with: seeds, baselines, chains of assistants; and where all of it is trained."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from fastdistill.models.students import first_layers
from fastdistill.objectives.base import Objective
from fastdistill.objectives.logits import MSE, LogitsKD
from fastdistill.ops.kd_ce_loss import Divergence
from fastdistill.recipes.begin import Beginning
from fastdistill.recipes.bootstrap import bootstrap
from fastdistill.recipes.executors import Trial, executor_of, picked
from fastdistill.recipes.gradients import Norms, gradient_norms, gradients_table
from fastdistill.recipes.predictions import PREDICTIONS, load_predictions
from fastdistill.recipes.report import Report, Told, finish, summary
from fastdistill.recipes.settings import RecipeSettings
from fastdistill.recipes.splits import Splits
from fastdistill.recipes.stages import Stages
from fastdistill.recipes.training import Teacher, Trained, Training

Learner = tuple[Objective, Teacher]
"""How a student learns, and from whom."""

Level = tuple[float, float, float]
"""A metric, and its interval."""


@dataclass(frozen=True)
class Point:
    """A learning rate and a batch size to try."""

    learning_rate: float
    batch_size: int


class Comparison:
    """Trains students, each with every seed, and keeps what they reach in `results`.

    Args:
        settings: what to compare with.
        splits: of which `stages` has the examples.
        stages: where trainings are kept; each seed's in a folder of its own, or here if it is the only one and
            `in_place`.
        learning_rate: of students, where there is no grid.
        kd: plain distillation, of the baseline and the chain.
        student_from: whose first layers students and assistants begin as: "teacher" for the teacher's, "pretrained" for
            `source`'s; None where they are no cuts.
        candidates: of the method, for each seed; baselines are trained as often, with other batches.
        references: students from which the others' differences are told.
    """

    def __init__(
        self,
        settings: RecipeSettings,
        splits: Splits,
        stages: Stages,
        learning_rate: float,
        kd: Objective,
        *,
        student_from: str | None = "teacher",
        source: PreTrainedModel | None = None,
        candidates: int = 1,
        in_place: bool = False,
        references: Sequence[str] = ("kd", "finetuned"),
    ) -> None:
        self.started = time.perf_counter()
        if stages.task.is_regression and settings.compares_with("dkd"):
            raise ValueError(f"--baselines has dkd, of classes, but {stages.task.name} is regression; leave it out")
        self.settings, self.stages, self.kd, self.own_source = settings, stages, kd, source
        self.references = references
        self.told = Told(
            seeds=len(settings.seeds or (settings.seed,)),
            select_on=splits.select_on,
            select_examples=len(splits.select),
            report_on=splits.report_on,
            report_examples=len(splits.report),
            student_from=student_from,
        )
        grid = product(
            settings.learning_rate_grid or (learning_rate,), settings.batch_size_grid or (settings.batch_size,)
        )
        self.points = [Point(*each) for each in grid]
        self.runs = settings.baseline_runs or candidates
        self.executor = executor_of(settings)
        if settings.executor == "auto":
            stages.console.print("executor: {}, since {}".format(*picked()), highlight=False, soft_wrap=True)
        seeds = settings.seeds or (settings.seed,)
        self.seeded = [stages] if in_place and settings.seeds is None else [stages.seeded(seed) for seed in seeds]
        self.results: dict[str, Any] = {}
        self.gradients: dict[str, Norms] = {}
        self._students: dict[str, list[str]] = {}
        self._assistants: dict[tuple[int, ...], Trained] = {}

    @property
    def metric(self) -> str:
        return self.stages.task.metric

    @property
    def source(self) -> PreTrainedModel:
        """Whose first layers students and assistants begin as."""
        return self._assistants[()].model if self.own_source is None else self.own_source

    def training(
        self, name: str, model: PreTrainedModel, learner: Learner, *, store_hidden_states: bool | None = None
    ) -> Training:
        """A student's, or an assistant's."""
        objective, teacher = learner
        return Training(
            name=name,
            model=model,
            objective=objective,
            teacher=teacher,
            epochs=self.settings.epochs,
            learning_rate=self.points[0].learning_rate,
            batch_size=self.points[0].batch_size,
            store_hidden_states=store_hidden_states,
        )

    def baseline(self, name: str, model: PreTrainedModel, learner: Learner) -> Training:
        """A student's to compare with: the best of as many as the method has candidates."""
        return replace(self.training(name, model, learner), runs=self.runs)

    def teach(self, teacher: Training, stages: Stages | None = None) -> Trained:
        """The teacher, whose first layers the assistants are; by stages of its own if it has another tokenizer."""
        stages = stages or self.stages
        self._assistants[()] = trained = stages.train(self.measured(stages, teacher))
        self.results[teacher.name] = trained.result
        return trained

    def assistant(self, *layers: int) -> PreTrainedModel:
        """First layers by plain distillation, trained when they are first asked for: ``assistant(4)`` learns from the
        teacher, which is ``assistant()``, and ``assistant(4, 3)`` from that one (TAKD)."""
        if layers not in self._assistants:
            teacher = self.assistant(*layers[:-1])
            name = "-".join(map(str, ("assistant", *layers)))
            self._assistants[layers] = self.assist(name, first_layers(self.source, layers[-1]), teacher)
        return self._assistants[layers].model

    def assist(self, name: str, model: PreTrainedModel, teacher: PreTrainedModel) -> Trained:
        """An assistant by plain distillation."""
        trained = self.stages.train(self.measured(self.stages, self.training(name, model, (self.kd, teacher))))
        self.results[name] = trained.result
        return trained

    def train(self, trials: Iterable[tuple[Stages, Training]]) -> Iterator[Trained]:
        """All that the executor can train at once, in their order; of each one's points and runs the best on the
        examples that select."""
        numbers: deque[int] = deque()

        def each() -> Iterator[Trial]:
            for stages, training in trials:
                several = self._several(self.measured(stages, training))
                numbers.append(len(several))
                yield from (Trial(stages, one) for one in several)

        trained = self.executor.in_turn(each())
        for first in trained:
            rest = islice(trained, numbers.popleft() - 1)
            yield max(chain((first,), rest), key=lambda one: one.result["selection"])

    def each(self, trials: Iterable[tuple[Stages, Training]]) -> Iterator[Trained]:
        """The same, but as they are, once: teachers, with rates of their own."""
        return self.executor.in_turn(Trial(stages, self.measured(stages, training)) for stages, training in trials)

    def _several(self, training: Training) -> list[Training]:
        several = []
        for point, run in product(self.points, range(training.runs)):
            name = training.name
            name += f"-{point.learning_rate:g}-{point.batch_size}" if len(self.points) > 1 else ""
            name += f"-run-{run + 1}" if run else ""
            several.append(replace(training, name=name, run=run, **vars(point)))
        return several

    def measured(self, stages: Stages, training: Training) -> Training:
        """The same; with `debug_gradients` its terms' gradients are measured, once."""
        if self.settings.debug_gradients and training.epochs and training.name not in self.gradients:
            examples = stages.examples
            self.gradients[training.name] = gradient_norms(training, examples.train, examples.collate, stages.seed)
        return training

    def students(self, trainings: Iterable[Training]) -> None:
        """Train each with every seed, and summarise what its students reach."""
        trainings = list(trainings)
        trained = self.train((stages, training) for training in trainings for stages in self.seeded)
        for training in trainings:
            self.summarize(training.name, [next(trained).result for _ in self.seeded])

    def summarize(self, name: str, results: Sequence[Mapping[str, Any]]) -> None:
        """Of each seed's student; one stage of the run itself is told as it is."""
        in_place = self.seeded == [self.stages]
        self.results[name] = dict(results[0]) if in_place else summary(self.metric, results)
        self._students[name] = [result["stage"] for result in results]

    def name_too(self, name: str, other: str) -> None:
        """Call a student by another name, too."""
        self.results[other], self._students[other] = self.results[name], self._students[name]

    def interval(self, result: Mapping[str, Any]) -> Level:
        """A student's metric, and the interval that holds 95 % of its resamples."""
        stages = result.get("stages") or [result["stage"]]
        labels, outputs = self._outputs(stages)
        found = bootstrap(self.stages.task, labels, outputs)
        return found.value, found.low, found.high

    def finish(self, record: Mapping[str, Any], *tables: Table, plots: Sequence[Path] = (), **more: Any) -> Report:
        """The report of all this: what the recipe tells, each student's difference from each baseline, and gradients
        where they were measured."""
        self._compare_with_baselines()
        if self.gradients:
            tables, more = (*tables, gradients_table(self.gradients)), {**more, "gradients": self.gradients}
        seconds, folder = time.perf_counter() - self.started, self.settings.folder
        return finish(folder, record, self.stages.task, self.results, seconds, self.told, *tables, plots=plots, **more)

    def _outputs(self, stages: Sequence[str]) -> tuple[Any, list[Any]]:
        """The reported examples' labels, and what each of these stages' models says to them."""
        kept = [load_predictions(self.stages.output / stage / PREDICTIONS) for stage in stages]
        return kept[0][0], [outputs for _, outputs in kept]

    def _compare_with_baselines(self) -> None:
        """Into each student's result, how it differs from those that are referred to."""
        for reference in (name for name in self.references if name in self._students):
            labels, theirs = self._outputs(self._students[reference])
            for name, kept in self._students.items():
                if kept == self._students[reference]:
                    continue
                found = bootstrap(self.stages.task, labels, self._outputs(kept)[1], theirs)
                result = self.results[name]
                self.results[name] = result | {"against": result.get("against", {}) | {reference: found.record()}}


def compare(
    beginning: Beginning,
    *,
    divergence: Divergence = "forward_kl",
    candidates: int = 1,
    in_place: bool = False,
) -> Comparison:
    """Of students of one encoder; `divergence` is plain distillation's."""
    settings = beginning.settings
    executor_of(settings)  # if it cannot be, say so before anything is written
    kd: Objective = MSE()
    if not beginning.task.is_regression:
        kd = LogitsKD(settings.kd_temperature or 2.0, divergence=divergence, label_smoothing=settings.smoothing)
    return Comparison(
        settings,
        beginning.data,
        beginning.stages(),
        beginning.learning_rate,
        kd,
        student_from=beginning.student_from,
        source=beginning.pretrained if beginning.student_from == "pretrained" else None,
        candidates=candidates,
        in_place=in_place,
    )


def chain_of(settings: RecipeSettings, depth: int) -> tuple[int, ...]:
    """The layers of the models that follow the teacher, or none; the teacher's own may stand before them. For the
    baseline "takd" there is one midway, if nothing else is asked for."""
    student = settings.student_layers
    if settings.compares_with("takd-pruned") and student is not None and student >= depth:
        raise ValueError(
            f"--baselines has takd-pruned, but there is no assistant between the student's {student} layers and the "
            f"teacher's {depth}"
        )
    if settings.chain is None:
        if student is None or not settings.compares_with("takd"):
            return ()
        if not student < (layers := (student + depth) // 2) < depth:
            raise ValueError(
                f"--baselines has takd, but no assistant has more layers than the student's {student} and fewer than "
                f"the teacher's {depth}"
            )
        return layers, student
    chain = settings.chain[1:] if settings.chain[0] == depth else settings.chain
    falling = all(a > b for a, b in zip((depth, *chain), chain, strict=False))
    if len(chain) < 2 or not falling or chain[-1] != settings.student_layers:
        raise ValueError(
            f"--chain is {','.join(map(str, settings.chain))}; expected falling numbers of layers below the teacher's "
            f"{depth}, two or more, to the student's {settings.student_layers}"
        )
    return chain
