"""Teacher assistants (TAKD): models between teacher and student, each distilled from the one before."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from fastdistill.models.students import first_layers
from fastdistill.objectives.base import Objective
from fastdistill.recipes.stages import Stages, Trained


class Assistants:
    """The teacher's first layers, by plain distillation; each is trained when it is first asked for.

    ``assistants(4)`` learns from the teacher, ``assistants(4, 3)`` from that one. Their results go into `results`.
    """

    def __init__(
        self, stages: Stages, teacher: Trained, kd: Objective, training: Mapping[str, Any], results: dict[str, Any]
    ) -> None:
        self.stages, self.teacher, self.kd, self.training, self.results = stages, teacher, kd, training, results
        self.trained: dict[str, Trained] = {}

    def __call__(self, *layers: int) -> Trained:
        name = "-".join(map(str, ("assistant", *layers)))
        if name not in self.trained:
            source = self(*layers[:-1]) if layers[:-1] else self.teacher
            student = first_layers(self.teacher.model, layers[-1])
            self.trained[name] = self.stages.train(name, student, self.kd, teacher=source.model, **self.training)
            self.results[name] = self.trained[name].result
        return self.trained[name]


def chain_of(options: argparse.Namespace, depth: int) -> tuple[int, ...]:
    """The layers of the models that follow the teacher, or none; the teacher's own may stand before them."""
    if options.chain is None:
        return ()
    chain = options.chain[1:] if options.chain[0] == depth else options.chain
    falling = all(a > b for a, b in zip((depth, *chain), chain, strict=False))
    if len(chain) < 2 or not falling or chain[-1] != options.student_layers:
        raise ValueError(
            f"--chain is {','.join(map(str, options.chain))}; expected falling numbers of layers below the teacher's "
            f"{depth}, two or more, to the student's {options.student_layers}"
        )
    return tuple(chain)
