"""Scoring the heads and neurons of a 6-layer teacher of MiniLM's width with a 2-layer student (on a GPU, of BERT-base
with a 4-layer one), one batch: `fastdistill.score` by example;
two backward passes through gates and weights, by batch, as the code published with STARK does it; the same with
fastdistill's gates; and the definition, two backward passes for each single example."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdistill
from benchmarks.encoders import batch, encoder, multiplications
from benchmarks.harness import DEVICE, OURS, measure, sizes
from fastdistill.cuda_graphs import AFTER, CudaGraphs, GraphedStep
from fastdistill.models.first_token import first_token_only
from fastdistill.sensitivity.units import Passes, evaluating, objective_of, split_batch
from fastdistill.sensitivity.values import unit_values


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


@contextmanager
def replayed(teacher: Any, student: Any, data: dict[str, Tensor]) -> Iterator[Callable[[], Any]]:
    """A batch of `fastdistill.score` with ``cuda_graphs=True``, when its shape has been captured."""
    with evaluating(teacher, student), first_token_only(teacher, student), unit_values(teacher) as values:
        objective, totals = objective_of(teacher, student, None), torch.zeros(2, sum(values.units), device=DEVICE)
        passes = Passes(totals, teacher, student, values, objective, "example")
        step = GraphedStep(passes, CudaGraphs(totals.device), "score")

        def run() -> Any:
            return step(*split_batch(data, objective, teacher, student, totals.device))

        for _ in range(AFTER):
            run()
        assert run() is not None
        yield run


def multiplied(run: Callable[..., Any]) -> Callable[..., Any]:
    def with_multiplications(*args: Any) -> Any:
        with multiplications():
            return run(*args)

    return with_multiplications


IMPLEMENTATIONS = {
    "two backwards": multiplied(two_backwards),
    "two backwards, fastdistill.gate": two_backwards,
    "loop over examples": multiplied(loop_over_examples),
    OURS: ours,
}
GRAPHS = f"{OURS}, graphs"


# like, teacher's and student's layers, tokens, classes, dtype
CASES = sizes(
    tiny=[("MiniLM", 2, 1, 8, 2, torch.float32)],
    cpu=[("MiniLM", 6, 2, tokens, classes, torch.float32) for tokens in (32, 128) for classes in (2, 3)],
    cuda=[("BERT-base", 12, 4, 128, 2, dtype) for dtype in (torch.float32, torch.bfloat16)],
)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *([GRAPHS] if DEVICE == "cuda" else [])])
@pytest.mark.parametrize("like,layers,student_layers,tokens,classes,dtype", CASES)
def test_score(
    benchmark: Any,
    implementation: str,
    like: str,
    layers: int,
    student_layers: int,
    tokens: int,
    classes: int,
    dtype: torch.dtype,
) -> None:
    if implementation == "loop over examples" and (classes == 3 or DEVICE == "cuda"):
        pytest.skip("as long as with two classes" if classes == 3 else "takes seconds")
    teacher, student = (encoder(k, classes, like=like, dtype=dtype) for k in (layers, student_layers))
    data = batch(32, tokens, classes)
    case = f"32x{tokens}, {classes} classes" if like == "MiniLM" else f"{like} 32x{tokens} {str(dtype)[6:]}"
    ready: Any = (
        replayed
        if implementation == GRAPHS
        else lambda *given: nullcontext(lambda: IMPLEMENTATIONS[implementation](*given))
    )
    with ready(teacher, student, data) as run:
        measure(benchmark, run, op="score", case=case, implementation=implementation, dtype=dtype)
