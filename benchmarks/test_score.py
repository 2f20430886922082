"""Scoring the heads and neurons of a 6-layer teacher with a 2-layer student, one batch: `fastdistill.score` by example;
two backward passes through gates and weights, by batch, as the code published with STARK does it; and the definition,
two backward passes for each single example."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdistill
from benchmarks.encoders import batch, encoder
from benchmarks.harness import OURS, measure


def losses(student: Any, teacher: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    cross_entropy = F.cross_entropy(teacher.logits, labels)
    soft = (teacher.logits / 2).softmax(-1) * (student.logits / 2).log_softmax(-1)
    return cross_entropy, -4 * soft.sum(-1).mean()


def two_backwards(teacher: Any, student: Any, data: dict[str, Tensor]) -> list[Tensor]:
    """Gradients of gates and of all weights, of the batch's mean loss."""
    features = {name: value for name, value in data.items() if name != "labels"}
    totals = []
    with fastdistill.gate(teacher) as gates:
        theirs = teacher(**features)
        with torch.no_grad():
            ours = student(**features)
        for loss in losses(ours, theirs, data["labels"]):
            loss.backward(retain_graph=True)
            totals += [gate.grad.abs() for gate in gates.tensors]
            for gate in gates.tensors:
                gate.grad = None
            teacher.zero_grad()
    return totals


def loop_over_examples(teacher: Any, student: Any, data: dict[str, Tensor]) -> list[Tensor]:
    sums: list[Tensor] = []
    for row in range(len(data["labels"])):
        found = two_backwards(teacher, student, {name: value[row : row + 1] for name, value in data.items()})
        sums = found if not sums else [total + one for total, one in zip(sums, found, strict=True)]
    return sums


def ours(teacher: Any, student: Any, data: dict[str, Tensor]) -> Any:
    return fastdistill.score(teacher, [data], student, progress=False)


IMPLEMENTATIONS = {"two backwards": two_backwards, "loop over examples": loop_over_examples, OURS: ours}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("tokens", [32, 128])
def test_score(benchmark: Any, implementation: str, tokens: int, classes: int) -> None:
    if implementation == "loop over examples" and classes == 3:
        pytest.skip("as long as with two classes")
    teacher, student, data = encoder(6, classes), encoder(2, classes), batch(32, tokens, classes)
    run = IMPLEMENTATIONS[implementation]
    case = f"32x{tokens}, {classes} classes"
    measure(benchmark, lambda: run(teacher, student, data), op="score", case=case, implementation=implementation)
