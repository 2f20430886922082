"""Teams that autoskd distils from, and the student: encoders, apart or cut of one, or networks for images."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, get_args

from transformers import PreTrainedModel

from fastdistill.models.drawing import draw_anew
from fastdistill.models.image_classifiers import image_classifier
from fastdistill.models.students import first_layers
from fastdistill.objectives.logits import LogitsKD, TaskLoss
from fastdistill.recipes.begin import Beginning, begin, load, stages_of
from fastdistill.recipes.comparison import Comparison, Learner, chain_of, compare
from fastdistill.recipes.examples import of_images
from fastdistill.recipes.executors import executor_of
from fastdistill.recipes.optimization import optimization_of
from fastdistill.recipes.settings import AutoSKDSettings
from fastdistill.recipes.settings.autoskd import TeamBaseline
from fastdistill.recipes.splits import Splits
from fastdistill.recipes.stages import Stages
from fastdistill.recipes.training import Teacher, Trained, Training
from fastdistill.teachers.team import TeacherTeam
from fastdistill.training.checks import TEACHER

IMAGE_RATES = {"sgd": 0.05, "adamw_torch_fused": 3e-3, "adamw_torch": 3e-3}
"""Peak learning rates of networks for images; that of sgd is the paper's."""

BATCH_SIZE, IMAGE_BATCH_SIZE = 32, 64


@dataclass(frozen=True)
class Member:
    """One of a team: its stages have the examples as it takes them, by its own tokenizer."""

    stages: Stages
    training: Training
    trained: Trained

    @property
    def model(self) -> PreTrainedModel:
        return self.trained.model


class Team(Protocol):
    """What the settings name is checked when a team is made; nothing is trained before `train`."""

    settings: AutoSKDSettings
    """With what only the task could say."""
    data: Splits
    teachers: int
    chain: tuple[int, ...]
    learning_rate: float

    def record(self) -> dict[str, Any]:
        """The settings for results.json, with what they left open."""

    def comparison(self) -> Comparison: ...

    def train(self, comparison: Comparison) -> dict[str, Member]:
        """The teachers, by names that are identifiers; all that was trained for them goes into its results."""

    def student(self, seed: int) -> PreTrainedModel:
        """Where students with this seed begin, once the team is trained."""


def team_of(settings: AutoSKDSettings) -> Team:
    """Raises ValueError where settings and task do not go together."""
    data = load(settings)
    if data.task.is_regression:
        raise ValueError(f"{data.task.name} is regression: there are no classes whose probabilities teachers tell")
    if settings.batch_size is None:
        settings = replace(settings, batch_size=IMAGE_BATCH_SIZE if data.task.is_of_images else BATCH_SIZE)
    return _Images(settings, data) if data.task.is_of_images else _Encoders(settings, data)


def stored(stages: Stages, team: Mapping[str, Member]) -> Stages:
    """The same stages, with what each says to its own form of the training examples."""
    teachers = TeacherTeam({name: one.model for name, one in team.items()})
    return stages.with_team(teachers, {name: one.stages.examples for name, one in team.items()})


def taught_by(stages: Stages, teacher: Member) -> tuple[Stages, Teacher]:
    """The stages and the teacher of models that have this one: what it says is stored, unless images are others in each
    epoch."""
    if stages.examples.augment is not None:
        return stages, teacher.model
    return stored(stages, {TEACHER: teacher}), None


def through(comparison: Comparison, team: Mapping[str, Member]) -> Member:
    """The last of a chain from the strongest to the weakest (TAKD): each but the first begins again as it did, and
    learns from the one before by plain distillation."""
    strongest_first = sorted(team, key=lambda name: team[name].trained.result["selection"], reverse=True)
    last = team[strongest_first[0]]
    for name in strongest_first[1:]:
        member = team[name]
        stages, teacher = taught_by(member.stages, last)
        training = replace(
            member.training,
            name=f"assistant-{name}",
            objective=comparison.kd,
            teacher=teacher,
            epochs=member.training.epochs or comparison.settings.epochs,
        )
        (trained,) = comparison.each([(stages, training)])
        comparison.results[training.name] = trained.result
        last = replace(member, trained=trained)
    return last


class _Encoders:
    """Encoders that are fine-tuned, each with its own tokenizer, and first layers of one of them, --teacher."""

    def __init__(self, settings: AutoSKDSettings, data: Splits) -> None:
        name, team = data.task.name, settings.team
        cuts = [one for one in team or () if one.isdecimal()]
        if settings.student is None and (settings.teacher is None or settings.student_layers is None):
            raise ValueError(
                f"{name} is a task of text; expected --teacher and --student-layers, or --team and --student"
            )
        if settings.teacher is None and (team is None or cuts):
            layers = cuts or ["1", "2", "..."]
            raise ValueError(f"--team has {','.join(layers)}, layers of --teacher, which is not given")
        if settings.student is not None and settings.teacher is not None and team is not None and not cuts:
            raise ValueError(f"--teacher would have no effect: --team has no layers of it, and {settings.student} is")
        if settings.student is not None and settings.chain:
            raise ValueError("--chain is of first layers of --teacher, but --student is another; expected --team-chain")
        if settings.teacher is None and settings.student_from is not None:
            raise ValueError("--student-from would have no effect: there is no --teacher to be cut; leave it out")
        _refuse(settings, data, ("augmentation",))
        if len(cuts) < len(team or ()) or settings.student is not None:
            _refuse_baselines(settings, "of one encoder's tokens and layers")
        self.settings, self.data = settings, data
        self.base = None if settings.teacher is None else begin(settings, data)
        self.own = self._student()
        self.learning_rate = self.own.learning_rate
        self.members = self._members()
        self.teachers = len(self.members)
        self.chain = () if self.base is None else chain_of(settings, self.base.depth)
        self._cut(self.own.pretrained)  # if it cannot be, say so before any is trained

    def _student(self) -> Beginning:
        """Where the student comes from: its own encoder, or the teacher's."""
        settings = self.settings
        if settings.student is None:
            assert self.base is not None
            return self.base
        own = replace(settings, teacher=settings.student, teacher_epochs=1.0, student_from=None)  # which none has
        return begin(own, self.data)

    def _members(self) -> dict[str, int | Beginning]:
        """By name, how many of the teacher's first layers, or what another encoder begins as."""
        depth = 0 if self.base is None else self.base.depth
        team = self.settings.team or tuple(str(layers) for layers in range(1, depth + 1))
        layers = [int(one) for one in team if one.isdecimal()]
        if len(team) < 2 or len(set(layers)) < len(layers) or not all(1 <= one <= depth for one in layers):
            most = f", at most the teacher's {depth}" if self.base is not None else ""
            raise ValueError(
                f"--team is {','.join(team)}; expected two or more different encoders or numbers of layers{most}"
            )
        members: dict[str, int | Beginning] = {}
        for one in team:
            if one.isdecimal():
                members[f"layers_{int(one)}"] = int(one)
            else:
                asked = replace(self.settings, teacher=one, student_from=None)
                members[_identifier(one, {*members, *RESERVED})] = begin(asked, self.data)
        return members

    def _cut(self, model: PreTrainedModel) -> PreTrainedModel:
        layers = self.settings.student_layers
        return copy.deepcopy(model) if layers is None else first_layers(model, layers)

    def record(self) -> dict[str, Any]:
        apart = {name: one for name, one in self.members.items() if isinstance(one, Beginning)}
        filled = ("teacher_epochs", "teacher_learning_rate")
        members = {
            name: {"from": one.settings.teacher} | {key: getattr(one, key) for key in filled}
            for name, one in apart.items()
        }
        found = self.own.record() | {"teacher": self.settings.teacher}
        if self.base is None:
            found |= dict.fromkeys(filled)
        elif self.base is not self.own:
            found |= {key: getattr(self.base, key) for key in ("student_from", *filled)}
        return found | ({"members": members} if members else {})

    def comparison(self) -> Comparison:
        made = compare(self.own, candidates=self.settings.candidates)
        if self.own is not self.base:
            made.told = replace(made.told, student_from="another")
        return made

    def train(self, comparison: Comparison) -> dict[str, Member]:
        asked: dict[str, tuple[Stages, Training]] = {}
        taught: dict[str, Trained] = {}
        if self.base is not None:
            base, stages = self.base, comparison.stages if self.base is self.own else self.base.stages()
            teacher = comparison.teach(base.teacher(), stages)
            if self.chain:
                comparison.assistant(*self.chain[:-1])
            source = base.pretrained if base.student_from == "pretrained" else teacher.model
            self.source = source if base is self.own else self.own.pretrained
            for name, layers in self.members.items():
                if layers == base.depth:
                    asked[name], taught[name] = (stages, base.teacher()), teacher
                elif isinstance(layers, int):
                    asked[name] = stages, self._training_of_cut(comparison, source, layers, teacher)
        else:
            self.source = self.own.pretrained
        for name, one in self.members.items():
            if isinstance(one, Beginning):
                asked[name] = one.stages(), replace(one.teacher(), name=f"team-{name}")
        missing = [name for name in asked if name not in taught]
        taught |= zip(missing, comparison.each(asked[name] for name in missing), strict=True)
        comparison.results |= {name: taught[name].result for name in self.members}
        return {name: Member(*asked[name], taught[name]) for name in self.members}

    def _training_of_cut(
        self, comparison: Comparison, source: PreTrainedModel, layers: int, teacher: Trained
    ) -> Training:
        """By the labels, or from the teacher, and as a student is trained."""
        assert self.base is not None
        learner: Learner = (TaskLoss(self.settings.smoothing), None)
        if self.settings.team_from == "teacher":
            learner = (comparison.kd, teacher.model)
        training = comparison.training(f"team-{layers}", first_layers(source, layers), learner)
        rate = (self.settings.learning_rate_grid or (self.base.learning_rate,))[0]
        return replace(training, learning_rate=rate)

    def student(self, seed: int) -> PreTrainedModel:
        student = self._cut(self.source)
        draw_anew(student, seed)
        return student


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
        _refuse_baselines(settings, "of a text's tokens and layers")
        if len(settings.team) < 2:
            raise ValueError(f"--team is {settings.team[0]}; expected two or more networks")
        self.settings, self.data, self.network = settings, data, settings.student
        self.optimization = optimization_of(settings, is_of_images=True)
        self.learning_rate = settings.learning_rate or IMAGE_RATES[self.optimization.optim]
        # with other weights than a student of the same kind
        self.networks = {name.replace("-", "_"): self._network(name, ~settings.seed) for name in settings.team}
        self._network(self.network, settings.seed)  # if it cannot be, say so before the team is trained
        self.teachers = len(self.networks)

    def _network(self, name: str, seed: int) -> PreTrainedModel:
        return image_classifier(name, self.data.task, seed=seed)

    @property
    def augments(self) -> bool:
        return self.settings.augmentation != "none"

    def record(self) -> dict[str, Any]:
        filled = {"learning_rate": self.learning_rate, "augmentation": "crop-flip" if self.augments else "none"}
        return self.settings.record() | filled | asdict(self.optimization) | self.data.names

    def comparison(self) -> Comparison:
        settings = self.settings
        executor_of(settings)  # if it cannot be, say so before anything is written
        kd = LogitsKD(temperature=settings.kd_temperature or 2.0, label_smoothing=settings.smoothing)
        stages = stages_of(settings, of_images(self.data, augment=self.augments))
        return Comparison(
            settings,
            self.data,
            stages,
            self.learning_rate,
            kd,
            student_from=None,
            candidates=settings.candidates,
        )

    def train(self, comparison: Comparison) -> dict[str, Member]:
        stages, learner = comparison.stages, (TaskLoss(self.settings.smoothing), None)
        asked = {name: comparison.training(f"team-{name}", one, learner) for name, one in self.networks.items()}
        trained = comparison.each((stages, one) for one in asked.values())
        team = {name: Member(stages, asked[name], one) for name, one in zip(asked, trained, strict=True)}
        comparison.results |= {name: one.trained.result for name, one in team.items()}
        return team

    def student(self, seed: int) -> PreTrainedModel:
        return self._network(self.network, seed)


RESERVED = ("teacher", "finetuned", "kd", "takd", "single", "avgkd", "mtbert", "autoskd", "random")
"""What rows of results are called that are no encoder's."""


def _identifier(source: str, taken: Iterable[str]) -> str:
    """An encoder's name, as columns and rows can have it."""
    name = re.sub(r"\W", "_", Path(source).name) or "_"
    name = f"_{name}" if name[0].isdecimal() else name
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found


def _refuse(settings: AutoSKDSettings, data: Splits, names: Iterable[str]) -> None:
    if given := [f"--{name.replace('_', '-')}" for name in names if getattr(settings, name) is not None]:
        kind = "images" if data.task.is_of_images else "text"
        raise ValueError(f"{', '.join(given)} would have no effect: {data.task.name} is a task of {kind}; leave it out")


def _refuse_baselines(settings: AutoSKDSettings, of: str) -> None:
    """Where teachers may be of other inputs, or layers, than the student, those that need more than logits."""
    if others := sorted(set(settings.baselines or ()) - {"none", "kd", *get_args(TeamBaseline)}):
        raise ValueError(f"--baselines has {', '.join(others)}, {of}; leave it out")
