"""A training step of DeKD at ratio 0.5, with its teachers' forward passes, against plain distillation's, and against
DeKD where teacher and assistant run on the whole batch. Models of MiniLM's width: 6, 4 and 2 layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.encoders import encoder
from benchmarks.harness import DEVICE, OURS, measure
from fastdistill import DeKD, LogitsKD, TeacherOutputs, first_layers

BATCH, TOKENS, CLASSES = 32, 32, 6


@functools.cache
def models() -> tuple[Any, Any, Any]:
    teacher = encoder(6, CLASSES)
    student, assistant = (first_layers(teacher, layers) for layers in (2, 4))
    return teacher.requires_grad_(False), assistant.requires_grad_(False).eval(), student.train()


def step(loss: Callable[[Any, dict[str, Any], Any], Any]) -> Callable[[], None]:
    teacher, assistant, student = models()
    optimizer = torch.optim.AdamW(student.parameters(), 1e-5, foreach=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (BATCH, TOKENS), generator=generator).to(DEVICE)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "output_hidden_states": True}
    labels = torch.randint(CLASSES, (BATCH,), generator=generator).to(DEVICE)

    def run() -> None:
        optimizer.zero_grad()
        answers = {"teacher": TeacherOutputs(teacher, batch), "assistant": TeacherOutputs(assistant, batch)}
        loss(student(**batch), answers, labels).backward()
        optimizer.step()

    return run


def plain(student: Any, answers: dict[str, Any], labels: Any) -> Any:
    return LogitsKD(temperature=5.0)(student, answers["teacher"].run(), labels)


def dekd(student: Any, answers: dict[str, Any], labels: Any) -> Any:
    return DeKD()(student, answers, labels)


def whole_batch(student: Any, answers: dict[str, Any], labels: Any) -> Any:
    return DeKD()(student, {name: outputs.run() for name, outputs in answers.items()}, labels)


IMPLEMENTATIONS = {"plain KD": plain, "whole-batch teachers": whole_batch, OURS: dekd}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dekd_step(benchmark: Any, implementation: str) -> None:
    run = step(IMPLEMENTATIONS[implementation])
    measure(benchmark, run, op="DeKD step", case=f"{BATCH}x{TOKENS}", implementation=implementation)
