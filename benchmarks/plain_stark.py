"""STARK as it is written without this package: eager PyTorch, padded to a fixed length, the teacher run in every step,
gates and weights differentiated together, twice a batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, get_linear_schedule_with_warmup

import fastdistill
from benchmarks.test_score import losses

PADDED, BATCH = 64, 32


def loader(data: Any, tokenizer: Any, shuffle: bool) -> Any:
    collate = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=PADDED)
    return DataLoader(data.remove_columns("length"), BATCH, shuffle=shuffle, collate_fn=collate)


def distil(student: Any, teacher: Any, batches: Any, epochs: int, rate: float) -> Any:
    student = copy.deepcopy(student).train()
    optimizer = torch.optim.AdamW(student.parameters(), rate, weight_decay=0.01)
    steps = epochs * len(batches)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    for _ in range(epochs):
        for batch in batches:
            labels = batch.pop("labels")
            with torch.no_grad():
                theirs = teacher(**batch).logits
            ours = student(**batch).logits
            kl = F.kl_div((ours / 2).log_softmax(-1), (theirs / 2).softmax(-1), reduction="batchmean")
            loss = 4 * kl + F.cross_entropy(ours, labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return student.eval()


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
    **training: Any,
) -> float:
    """The best student's accuracy."""
    teacher = copy.deepcopy(teacher).requires_grad_(False).eval()
    batches, evaluated = loader(train, tokenizer, True), loader(validation, tokenizer, False)
    trial = distil(student, teacher, batches, **training)
    found = [accuracy(trial, evaluated)]
    scored = scores(teacher, trial, batches)
    for sparsity in sparsities:
        sparse = masked(teacher, scored, sparsity)
        accuracy(sparse, evaluated)
        found.append(accuracy(distil(student, sparse, batches, **training), evaluated))
    return max(found)
