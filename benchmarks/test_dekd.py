"""The whole of DeKD from a fine-tuned teacher, `fastdistill dekd`: an assistant of 4 layers, and a student of 2 that
asks both; against the same written plainly, in three forms."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from benchmarks import plain_dekd, whole
from benchmarks.harness import measure_recipe
from benchmarks.plain_stark import Form
from fastdistill import first_layers, from_pretrained

EXAMPLES, EPOCHS = whole.examples(512), 3
STUDENT, ASSISTANT = 2, 4  # layers


def command(output: Path) -> list[str]:
    more = ("--assistant-layers", str(ASSISTANT), "--student-from", "teacher")
    return [*whole.command("dekd", output, EXAMPLES, EPOCHS), *more]


@functools.cache
def fine_tuned() -> Path:
    return whole.models(command, lambda name: name == "teacher") / "teacher"


def ours(seed: int, output: Path) -> float:
    return whole.accuracy(command(output), [fine_tuned()], seed, output)


def plain(form: Form, seed: int, output: Path) -> float:
    teacher = from_pretrained(fine_tuned())
    torch.manual_seed(seed)
    assistant, student = (first_layers(teacher, layers) for layers in (ASSISTANT, STUDENT))
    data = whole.tokenized(EXAMPLES)
    return plain_dekd.dekd(teacher, assistant, student, *data, form, epochs=EPOCHS, rate=whole.RATE)


@whole.against_plain(plain, ours)
def test_dekd(benchmark: Any, implementation: str, run: Any, tmp_path: Path) -> None:
    fine_tuned()
    case = whole.case(f"{EXAMPLES} examples, assistant of {ASSISTANT} layers")
    benchmark.group = f"DeKD {case}"
    row = {"op": "DeKD", "case": case, "dtype": whole.DTYPE, "implementation": implementation}
    measure_recipe(benchmark, run, whole.SEEDS, tmp_path, **row)
