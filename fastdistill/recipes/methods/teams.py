"""Teams that autoskd distils from, and the student: cuts of an encoder, or networks for images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, get_args

from transformers import PreTrainedModel

from fastdistill.models.image_classifiers import image_classifier
from fastdistill.models.students import first_layers
from fastdistill.objectives.logits import LogitsKD, TaskLoss
from fastdistill.recipes.begin import begin, load, stages_of
from fastdistill.recipes.comparison import Comparison, Learner, chain_of, compare
from fastdistill.recipes.examples import of_images
from fastdistill.recipes.executors import executor_of
from fastdistill.recipes.settings import AutoSKDSettings
from fastdistill.recipes.settings.autoskd import TeamBaseline
from fastdistill.recipes.splits import Splits
from fastdistill.recipes.training import Trained

IMAGE_RATE = 3e-3
"""Peak learning rate of networks for images."""


class Team(Protocol):
    """What the settings name is checked when a team is made; nothing is trained before `train`."""

    data: Splits
    teachers: int
    chain: tuple[int, ...]
    learning_rate: float

    def record(self) -> dict[str, Any]:
        """The settings for results.json, with what they left open."""

    def comparison(self) -> Comparison: ...

    def train(self, comparison: Comparison) -> dict[str, Trained]:
        """The teachers, by names that are identifiers; all that was trained for them goes into its results."""

    def student(self, seed: int) -> PreTrainedModel:
        """Where students with this seed begin, once the team is trained."""


def team_of(settings: AutoSKDSettings) -> Team:
    """Raises ValueError where settings and task do not go together."""
    data = load(settings)
    if data.task.is_regression:
        raise ValueError(f"{data.task.name} is regression: there are no classes whose probabilities teachers tell")
    return _Images(settings, data) if data.task.is_of_images else _Cuts(settings, data)


class _Cuts:
    """An encoder, fine-tuned, and its first layers."""

    def __init__(self, settings: AutoSKDSettings, data: Splits) -> None:
        if settings.teacher is None or settings.student_layers is None:
            raise ValueError(f"{data.task.name} is a task of text; expected --teacher and --student-layers")
        _refuse(settings, data, ("student",))
        self.settings, self.data, self.beginning = settings, data, begin(settings, data)
        self.learning_rate, self.depth = self.beginning.learning_rate, self.beginning.depth
        self.layers = self._layers()
        self.teachers = len(self.layers)
        self.chain = chain_of(settings, self.depth)
        self.student_layers = settings.student_layers
        first_layers(self.beginning.pretrained, self.student_layers)  # if it cannot be, say so before any is trained

    def _layers(self) -> tuple[int, ...]:
        team = self.settings.team
        if team is None:
            return tuple(range(1, self.depth + 1))
        given = [int(one) if one.isdecimal() else 0 for one in team]
        if len(set(given)) < max(2, len(given)) or not all(1 <= one <= self.depth for one in given):
            raise ValueError(
                f"--team is {','.join(team)}; expected two or more different numbers of layers, at most the teacher's "
                f"{self.depth}"
            )
        return tuple(given)

    def record(self) -> dict[str, Any]:
        return self.beginning.record()

    def comparison(self) -> Comparison:
        return compare(self.beginning, candidates=self.settings.candidates)

    def train(self, comparison: Comparison) -> dict[str, Trained]:
        self.teacher = comparison.teach(self.beginning.teacher())
        if self.chain:
            comparison.assistant(*self.chain[:-1])
        learner: Learner = (TaskLoss(self.settings.smoothing), None)
        if self.settings.team_from == "teacher":
            learner = (comparison.kd, self.teacher.model)
        cut = [layers for layers in self.layers if layers != self.depth]
        trained = comparison.train(
            (comparison.stages, comparison.training(f"team-{k}", first_layers(comparison.source, k), learner))
            for k in cut
        )
        members = dict(zip(cut, trained, strict=True)) | {self.depth: self.teacher}
        self.source = comparison.source
        team = {f"layers_{layers}": members[layers] for layers in self.layers}
        comparison.results |= {name: one.result for name, one in team.items()}
        return team

    def student(self, seed: int) -> PreTrainedModel:
        return first_layers(self.source, self.student_layers)


class _Images:
    """Networks that learn from the labels alone, from weights at random."""

    chain: tuple[int, ...] = ()

    def __init__(self, settings: AutoSKDSettings, data: Splits) -> None:
        if settings.student is None or settings.team is None:
            raise ValueError(f"{data.task.name} is a task of images; expected --student and --team")
        trained = ("teacher", "teacher_epochs", "teacher_learning_rate")
        _refuse(settings, data, (*trained, "student_layers", "student_from", "max_length", "chain"))
        if settings.team_from != "labels":
            raise ValueError("--team-from teacher is for text: of a team for images none is the teacher of the others")
        if others := sorted(set(settings.baselines or ()) - {"none", "kd", *get_args(TeamBaseline)}):
            raise ValueError(f"--baselines has {', '.join(others)}, of a text's tokens and layers; leave it out")
        if len(settings.team) < 2:
            raise ValueError(f"--team is {settings.team[0]}; expected two or more networks")
        self.settings, self.data = settings, data
        self.learning_rate, self.network = settings.learning_rate or IMAGE_RATE, settings.student
        # with other weights than a student of the same kind
        self.networks = {name.replace("-", "_"): self._network(name, ~settings.seed) for name in settings.team}
        self._network(self.network, settings.seed)  # if it cannot be, say so before the team is trained
        self.teachers = len(self.networks)

    def _network(self, name: str, seed: int) -> PreTrainedModel:
        return image_classifier(name, self.data.task, seed=seed)

    def record(self) -> dict[str, Any]:
        return self.settings.record() | {"learning_rate": self.learning_rate} | self.data.names

    def comparison(self) -> Comparison:
        settings = self.settings
        executor_of(settings)  # if it cannot be, say so before anything is written
        kd = LogitsKD(temperature=settings.kd_temperature or 2.0, label_smoothing=settings.smoothing)
        stages = stages_of(settings, of_images(self.data))
        return Comparison(
            settings,
            self.data,
            stages,
            self.learning_rate,
            kd,
            student_from=None,
            candidates=settings.candidates,
        )

    def train(self, comparison: Comparison) -> dict[str, Trained]:
        learner: Learner = (TaskLoss(self.settings.smoothing), None)
        trained = comparison.train(
            (comparison.stages, comparison.training(f"team-{name}", one, learner))
            for name, one in self.networks.items()
        )
        team = dict(zip(self.networks, trained, strict=True))
        comparison.results |= {name: one.result for name, one in team.items()}
        return team

    def student(self, seed: int) -> PreTrainedModel:
        return self._network(self.network, seed)


def _refuse(settings: AutoSKDSettings, data: Splits, names: Iterable[str]) -> None:
    if given := [f"--{name.replace('_', '-')}" for name in names if getattr(settings, name) is not None]:
        kind = "images" if data.task.is_of_images else "text"
        raise ValueError(f"{', '.join(given)} would have no effect: {data.task.name} is a task of {kind}; leave it out")
