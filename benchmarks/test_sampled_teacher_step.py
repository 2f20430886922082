"""Training steps of a student with one sampled teacher of six: with stored logits, against running that teacher in the
step, and against running all six for their mean (AvgKD). Models of MiniLM's width: teachers of 1 to 6 layers, a student
of 2. What is timed is two steps, with the teachers of 3 and 4 layers: by uniform sampling a step's teacher has 3.5."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.encoders import batch, encoder
from benchmarks.harness import OURS, measure
from fastdistill import AvgKD, SampledTeacher, TeacherOutputs, first_layers

BATCH, TOKENS = 32, 32
SAMPLED = ("layers_3", "layers_4")


@functools.cache
def team() -> dict[str, Any]:
    return {f"layers_{k}": first_layers(encoder(6), k).requires_grad_(False).eval() for k in range(1, 7)}


@functools.cache
def features() -> dict[str, Any]:
    return {name: value for name, value in batch(BATCH, TOKENS).items() if name != "labels"}


def run_teachers() -> dict[str, TeacherOutputs]:
    """Each runs when an objective first looks at it."""
    return {name: TeacherOutputs(model, features()) for name, model in team().items()}


@functools.cache
def stored() -> dict[str, SequenceClassifierOutput]:
    return {name: SequenceClassifierOutput(logits=said.run().logits) for name, said in run_teachers().items()}


def steps(answers: Callable[[], Any], objectives: list[Any]) -> Callable[[], None]:
    student = first_layers(encoder(6), 2).train()
    optimizer = torch.optim.AdamW(student.parameters(), 1e-5, foreach=True)
    answers()

    def run() -> None:
        for objective in objectives:
            optimizer.zero_grad()
            objective(student(**features()), answers(), None).backward()
            optimizer.step()

    return run


def sampled() -> list[Any]:
    return [SampledTeacher({name: 1.0}) for name in SAMPLED]


def of_all() -> list[Any]:
    return [AvgKD(tuple(team()))] * len(SAMPLED)


IMPLEMENTATIONS = {
    "sampled teacher run": (run_teachers, sampled),
    "all teachers run": (run_teachers, of_all),
    OURS: (stored, sampled),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sampled_teacher_step(benchmark: Any, implementation: str) -> None:
    answers, objectives = IMPLEMENTATIONS[implementation]
    run = steps(answers, objectives())
    case = f"2 steps of {BATCH}x{TOKENS}, a team of 6"
    measure(benchmark, run, op="sampled teacher step", case=case, implementation=implementation)
