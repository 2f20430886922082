"""STARK as it is written without this package: eager PyTorch, gates and weights differentiated together, twice a batch;
in three forms, from what papers' code does to what a good engineer makes of it. As in the recipes, students are
evaluated after each epoch, and the best epoch is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, get_linear_schedule_with_warmup
from transformers.trainer_pt_utils import LengthGroupedSampler

import fastdistill
from benchmarks.test_score import losses

PADDED, BATCH = 64, 32


class Form(Enum):
    """How batches are made, and when teachers are asked."""

    PADDED = "padded to 64, teacher in each step"
    DYNAMIC = "padded to the batch's longest, teacher in each step"
    STORED = "grouped by length, teacher's logits stored"


def loader(data: Any, tokenizer: Any, shuffle: bool, form: Form) -> Any:
    whole = {"padding": "max_length", "max_length": PADDED} if form is Form.PADDED else {}
    options: dict[str, Any] = {"shuffle": shuffle}
    if form is Form.STORED and shuffle:
        options = {"sampler": LengthGroupedSampler(BATCH, lengths=list(data["length"]))}
    elif form is Form.STORED:
        data = data.sort("length")
    collate = DataCollatorWithPadding(tokenizer, **whole)
    return DataLoader(data.remove_columns("length"), BATCH, collate_fn=collate, **options)


@torch.no_grad()
def stored(data: Any, tokenizer: Any, teachers: Sequence[Any]) -> Any:
    """The data with a column "said", of [teachers, classes] an example."""
    data = data.sort("length")
    said, labels = [], []
    for batch in loader(data, tokenizer, False, Form.STORED):
        labels += batch.pop("labels").tolist()
        said.append(torch.stack([teacher(**batch).logits for teacher in teachers], 1))
    assert labels == list(data["labels"]), "rows and what is said of them are in the same order"
    return data.add_column("said", torch.cat(said).tolist())


def fit(
    student: Any, batches: Any, loss: Callable[[Any, Any], Tensor], evaluated: Any, *, epochs: int, rate: float
) -> tuple[Any, float]:
    """The student after its best epoch, and its accuracy then. The rate goes up within a tenth of the steps, then down
    to 0."""
    student = copy.deepcopy(student)
    steps = epochs * len(batches)
    optimizer = torch.optim.AdamW(student.parameters(), rate, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    best, weights = -1.0, {}
    for _ in range(epochs):
        student.train()
        for batch in batches:
            step(student, loss(student, batch), optimizer, schedule)
        if (found := accuracy(student.eval(), evaluated)) > best:
            best, weights = found, copy.deepcopy(student.state_dict())
    student.load_state_dict(weights)
    return student, best


def step(student: Any, loss: Tensor, optimizer: Any, schedule: Any) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    schedule.step()


def distil(
    student: Any, teacher: Any, data: Any, evaluated: Any, tokenizer: Any, form: Form, **training: Any
) -> tuple[Any, float]:
    if form is Form.STORED:
        data = stored(data, tokenizer, [teacher])

    def loss(student: Any, batch: Any) -> Tensor:
        labels = batch.pop("labels")
        if form is Form.STORED:
            theirs = batch.pop("said")[:, 0]
        else:
            with torch.no_grad():
                theirs = teacher(**batch).logits
        ours = student(**batch).logits
        kl = F.kl_div((ours / 2).log_softmax(-1), (theirs / 2).softmax(-1), reduction="batchmean")
        return 4 * kl + F.cross_entropy(ours, labels)

    return fit(student, loader(data, tokenizer, True, form), loss, evaluated, **training)


@torch.no_grad()
def accuracy(model: Any, batches: Any) -> float:
    right = total = 0
    for batch in batches:
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
        total += len(labels)
    return right / total


def scores(teacher: Any, student: Any, batches: Any) -> Any:
    totals: list[Tensor] = []
    teacher.requires_grad_(True)
    with fastdistill.gate(teacher) as gates:
        for batch in batches:
            labels = batch.pop("labels")
            theirs = teacher(**batch)
            with torch.no_grad():
                ours = student(**batch)
            found = []
            for loss in losses(ours, theirs, labels):
                loss.backward(retain_graph=True)
                found += [gate.grad.abs() for gate in gates.tensors]
                for gate in gates.tensors:
                    gate.grad = None
                teacher.zero_grad()
            totals = found if not totals else [a + b for a, b in zip(totals, found, strict=True)]
        layers = len(gates.heads)
    teacher.requires_grad_(False)
    parts = [totals[start : start + layers] for start in range(0, len(totals), layers)]
    ours = fastdistill.Scores(parts[0], parts[1]).normalized()
    theirs = fastdistill.Scores(parts[2], parts[3]).normalized()
    return theirs.lerp(ours, 0.5)


def masked(teacher: Any, scores: Any, sparsity: float) -> Any:
    """The same function as the pruned teacher, of the dense one's size: the usual way."""
    sparse = copy.deepcopy(teacher)
    kept = scores.kept(sparsity)
    for block, heads, neurons in zip(fastdistill.models.architectures.blocks(sparse), *kept, strict=True):
        gates = [torch.zeros(block.heads), torch.zeros(block.neurons)]
        gates[0][heads], gates[1][neurons] = 1, 1
        with torch.no_grad():
            block.head_out.weight.mul_(gates[0].repeat_interleave(block.head_size))
            block.neuron_out.weight.mul_(gates[1])
    return sparse


def stark(
    teacher: Any,
    student: Any,
    train: Any,
    validation: Any,
    tokenizer: Any,
    sparsities: Sequence[float],
    form: Form,
    **training: Any,
) -> float:
    """The best student's accuracy."""
    teacher = copy.deepcopy(teacher).requires_grad_(False).eval()
    evaluated = loader(validation, tokenizer, False, form)
    trial, best = distil(student, teacher, train, evaluated, tokenizer, form, **training)
    scored = scores(teacher, trial, loader(train, tokenizer, False, form))
    for sparsity in sparsities:
        sparse = masked(teacher, scored, sparsity)
        accuracy(sparse, evaluated)
        best = max(best, distil(student, sparse, train, evaluated, tokenizer, form, **training)[1])
    return best
