"""Teams that autoskd distils from, and the student: cuts of an encoder, or networks for images."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any, Protocol

from transformers import PreTrainedModel

from fastdistill.data.load import TaskData
from fastdistill.models.image_classifiers import image_classifier
from fastdistill.models.students import first_layers
from fastdistill.objectives.logits import LogitsKD, TaskLoss
from fastdistill.recipes.assistants import Assistants, chain_of
from fastdistill.recipes.begin import begin, load, stages_of
from fastdistill.recipes.examples import of_images
from fastdistill.recipes.executors import Local, Trial
from fastdistill.recipes.stages import Stages, Trained

IMAGE_RATE = 3e-3
"""Peak learning rate of networks for images."""


class Team(Protocol):
    """What the options name is checked when a team is made; nothing is trained before `train`."""

    data: TaskData
    settings: dict[str, object]
    teachers: int

    def stages(self) -> Stages: ...

    def train(self, stages: Stages, executor: Local, results: dict[str, Any]) -> dict[str, Trained]:
        """The teachers, by names that are identifiers; all that was trained for them goes into `results`."""

    def student(self, seed: int) -> PreTrainedModel:
        """Where students with this seed begin, once the team is trained."""

    def chained(self) -> PreTrainedModel | None:
        """The last assistant of --chain."""


def team_of(options: argparse.Namespace) -> Team:
    """Raises ValueError where options and task do not go together."""
    data = load(options)
    if data.task.is_regression:
        raise ValueError(f"{data.task.name} is regression: there are no classes whose probabilities teachers tell")
    return _Images(options, data) if data.task.is_of_images else _Cuts(options, data)


class _Cuts:
    """An encoder, fine-tuned, and its first layers."""

    def __init__(self, options: argparse.Namespace, data: TaskData) -> None:
        if options.teacher is None or options.student_layers is None:
            raise ValueError(f"{data.task.name} is a task of text; expected --teacher and --student-layers")
        _refuse(options, data, ("student",))
        self.options, self.data, self.beginning = options, data, begin(options, data)
        self.settings = self.beginning.settings
        pretrained = self.beginning.pretrained
        self.depth = pretrained.config.num_hidden_layers
        self.layers = self._layers()
        self.teachers = len(self.layers)
        self.chain = chain_of(options, self.depth)
        first_layers(pretrained, options.student_layers)  # if it cannot be, say so before the teacher is trained

    def _layers(self) -> tuple[int, ...]:
        if self.options.team is None:
            return tuple(range(1, self.depth + 1))
        given = [int(one) if one.isdecimal() else 0 for one in self.options.team]
        if len(set(given)) < max(2, len(given)) or not all(1 <= one <= self.depth for one in given):
            raise ValueError(
                f"--team is {','.join(self.options.team)}; expected two or more different numbers of layers, at most "
                f"the teacher's {self.depth}"
            )
        return tuple(given)

    def stages(self) -> Stages:
        return self.beginning.stages()

    def train(self, stages: Stages, executor: Local, results: dict[str, Any]) -> dict[str, Trained]:
        options = self.options
        smoothing = options.label_smoothing or 0.0
        kd = LogitsKD(temperature=options.kd_temperature or 2.0, label_smoothing=smoothing)
        training = {"epochs": options.epochs, "learning_rate": options.learning_rate}
        self.teacher = self.beginning.teacher(stages)
        results["teacher"] = self.teacher.result
        assistant = Assistants(stages, self.teacher, kd, training, results)
        self.assistant = assistant(*self.chain[:-1]).model if self.chain else None

        source = self.teacher.model if options.team_from == "teacher" else None
        objective = TaskLoss(smoothing) if source is None else kd
        cut = [layers for layers in self.layers if layers != self.depth]
        trials = [
            Trial(stages, f"team-{k}", first_layers(self.teacher.model, k), objective, {"teacher": source, **training})
            for k in cut
        ]
        members = dict(zip(cut, executor(trials), strict=True)) | {self.depth: self.teacher}
        team = {f"layers_{layers}": members[layers] for layers in self.layers}
        results |= {name: one.result for name, one in team.items()}
        return team

    def student(self, seed: int) -> PreTrainedModel:
        return first_layers(self.teacher.model, self.options.student_layers)

    def chained(self) -> PreTrainedModel | None:
        return self.assistant


class _Images:
    """Networks that learn from the labels alone, from weights at random."""

    def __init__(self, options: argparse.Namespace, data: TaskData) -> None:
        if options.student is None or options.team is None:
            raise ValueError(f"{data.task.name} is a task of images; expected --student and --team")
        text = ("teacher", "student_layers", "max_length", "teacher_epochs", "teacher_learning_rate", "chain")
        _refuse(options, data, text)
        if options.team_from != "labels":
            raise ValueError("--team-from teacher is for text: of a team for images none is the teacher of the others")
        if len(options.team) < 2:
            raise ValueError(f"--team is {options.team[0]}; expected two or more networks")
        options.learning_rate = options.learning_rate or IMAGE_RATE
        self.options, self.data, self.settings = options, data, vars(options)
        # with other weights than a student of the same kind
        self.networks = {name.replace("-", "_"): self._network(name, ~options.seed) for name in options.team}
        self._network(options.student, options.seed)  # if it cannot be, say so before the team is trained
        self.teachers = len(self.networks)

    def _network(self, name: str, seed: int) -> PreTrainedModel:
        return image_classifier(name, self.data.task, seed=seed)

    def stages(self) -> Stages:
        return stages_of(self.options, of_images(self.data))

    def train(self, stages: Stages, executor: Local, results: dict[str, Any]) -> dict[str, Trained]:
        training = {"epochs": self.options.epochs, "learning_rate": self.options.learning_rate}
        learned = TaskLoss(self.options.label_smoothing or 0.0)
        trials = [Trial(stages, f"team-{name}", one, learned, training) for name, one in self.networks.items()]
        team = dict(zip(self.networks, executor(trials), strict=True))
        results |= {name: one.result for name, one in team.items()}
        return team

    def student(self, seed: int) -> PreTrainedModel:
        return self._network(self.options.student, seed)

    def chained(self) -> None:
        return None


def _refuse(options: argparse.Namespace, data: TaskData, names: Iterable[str]) -> None:
    if given := [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]:
        kind = "images" if data.task.is_of_images else "text"
        raise ValueError(f"{', '.join(given)} would have no effect: {data.task.name} is a task of {kind}; leave it out")
