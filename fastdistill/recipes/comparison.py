"""What a method is compared with: seeds, baselines, chains of assistants; and where all of it is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from transformers import PreTrainedModel

from fastdistill.models.students import first_layers
from fastdistill.objectives.base import Objective
from fastdistill.objectives.logits import MSE, LogitsKD, TaskLoss
from fastdistill.ops.kd_ce_loss import Divergence
from fastdistill.recipes.begin import Beginning
from fastdistill.recipes.executors import Trial, executor_of
from fastdistill.recipes.report import summary
from fastdistill.recipes.settings import RecipeSettings
from fastdistill.recipes.stages import Stages
from fastdistill.recipes.training import Teacher, Trained, Training

Learner = tuple[Objective, Teacher]
"""How a student learns, and from whom."""


@dataclass(frozen=True)
class Point:
    """A learning rate and a batch size to try."""

    learning_rate: float
    batch_size: int


class Comparison:
    """Trains students, each with every seed, and keeps what they reach in `results`.

    Args:
        settings: what to compare with.
        stages: where trainings are kept; each seed's in a folder of its own, or here if it is the only one and
            `in_place`.
        points: students are trained with each, and the best on the validation examples counts; assistants, with the
            first.
        kd: plain distillation, of the baseline and the chain.
    """

    def __init__(
        self,
        settings: RecipeSettings,
        stages: Stages,
        points: Sequence[Point],
        kd: Objective,
        *,
        in_place: bool = False,
    ) -> None:
        self.settings, self.stages, self.points, self.kd = settings, stages, points, kd
        self.executor = executor_of(settings)
        seeds = settings.seeds or (settings.seed,)
        self.seeded = [stages] if in_place and settings.seeds is None else [stages.seeded(seed) for seed in seeds]
        self.results: dict[str, Any] = {}
        self._assistants: dict[tuple[int, ...], Trained] = {}

    @property
    def metric(self) -> str:
        return self.stages.task.metric

    def training(
        self, name: str, model: PreTrainedModel, learner: Learner, *, store_hidden_states: bool = False
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

    def teach(self, teacher: Training) -> Trained:
        """The teacher, whose first layers the assistants are."""
        self._assistants[()] = trained = self.stages.train(teacher)
        self.results[teacher.name] = trained.result
        return trained

    def assistant(self, *layers: int) -> PreTrainedModel:
        """The teacher's first layers by plain distillation, trained when it is first asked for: ``assistant(4)`` learns
        from the teacher, ``assistant(4, 3)`` from that one (TAKD)."""
        if layers not in self._assistants:
            source = self.assistant(*layers[:-1])
            name = "-".join(map(str, ("assistant", *layers)))
            student = first_layers(self._assistants[()].model, layers[-1])
            self._assistants[layers] = trained = self.stages.train(self.training(name, student, (self.kd, source)))
            self.results[name] = trained.result
        return self._assistants[layers].model

    def baselines(self, chain: tuple[int, ...] = ()) -> dict[str, Learner]:
        """Those that are asked for: without a teacher, by plain distillation, and from the last but one of a chain."""
        learners: dict[str, Learner] = {}
        if self.settings.baselines:
            learners["finetuned"] = (TaskLoss(self.settings.smoothing), None)
            learners["kd"] = (self.kd, self._assistants[()].model)
        if chain:
            learners["takd"] = (self.kd, self.assistant(*chain[:-1]))
        return learners

    def train(self, trials: Iterable[tuple[Stages, Training]]) -> Iterator[Trained]:
        """All that the executor can train at once, in their order; of the points the best."""
        trained = self.executor.in_turn(trial for each in trials for trial in self._points(*each))
        while best := max(islice(trained, len(self.points)), key=lambda one: one.result[self.metric], default=None):
            yield best

    def _points(self, stages: Stages, training: Training) -> Iterator[Trial]:
        for point in self.points:
            several = f"-{point.learning_rate:g}-{point.batch_size}" if len(self.points) > 1 else ""
            yield Trial(stages, replace(training, name=training.name + several, **vars(point)))

    def students(self, trainings: Iterable[Training]) -> None:
        """Train each with every seed, and summarise what its students reach."""
        trainings = list(trainings)
        trained = self.train((stages, training) for training in trainings for stages in self.seeded)
        for training in trainings:
            self.summarize(training.name, [next(trained).result for _ in self.seeded])

    def summarize(self, name: str, results: Sequence[Mapping[str, Any]]) -> None:
        """One stage of the run itself is told as it is."""
        in_place = self.seeded == [self.stages]
        self.results[name] = dict(results[0]) if in_place else summary(self.metric, results)


def compare(
    beginning: Beginning,
    *,
    divergence: Divergence = "forward_kl",
    points: Sequence[Point] = (),
    in_place: bool = False,
) -> Comparison:
    """Of students of one encoder; `divergence` is plain distillation's."""
    settings = beginning.settings
    executor_of(settings)  # if it cannot be, say so before anything is written
    kd: Objective = MSE()
    if not beginning.task.is_regression:
        kd = LogitsKD(settings.kd_temperature or 2.0, divergence=divergence, label_smoothing=settings.smoothing)
    own = Point(beginning.learning_rate, settings.batch_size)
    return Comparison(settings, beginning.stages(), points or (own,), kd, in_place=in_place)


def chain_of(settings: RecipeSettings, depth: int) -> tuple[int, ...]:
    """The layers of the models that follow the teacher, or none; the teacher's own may stand before them."""
    if settings.chain is None:
        return ()
    chain = settings.chain[1:] if settings.chain[0] == depth else settings.chain
    falling = all(a > b for a, b in zip((depth, *chain), chain, strict=False))
    if len(chain) < 2 or not falling or chain[-1] != settings.student_layers:
        raise ValueError(
            f"--chain is {','.join(map(str, settings.chain))}; expected falling numbers of layers below the teacher's "
            f"{depth}, two or more, to the student's {settings.student_layers}"
        )
    return chain
