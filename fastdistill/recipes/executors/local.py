"""Trainings one after another, in this process: what the other executors do otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fastdistill.recipes.stages import Stages
from fastdistill.recipes.training import Trained, Training


@dataclass(frozen=True)
class Trial:
    """A training that none of the others waits for, and the stages that keep it."""

    stages: Stages
    training: Training

    def train(self) -> Trained:
        return self.stages.train(self.training)


class Local:
    """Trains one after another, in this process."""

    def in_turn(self, trials: Iterable[Trial]) -> Iterator[Trained]:
        """What was trained, in the trials' order. Neither their models nor those of what was trained are held, and
        nothing is done before it is asked for."""
        for trial in trials:
            yield trial.train()

    def __call__(self, trials: Iterable[Trial]) -> list[Trained]:
        return list(self.in_turn(trials))
