"""The whole of STARK from a fine-tuned teacher: `fastdistill stark` against the same written plainly, in three
forms."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from benchmarks import plain_stark, whole
from benchmarks.harness import measure_recipe
from benchmarks.plain_stark import Form
from fastdistill import first_layers, from_pretrained

EXAMPLES, EPOCHS = whole.examples(512), 3
SPARSITIES = (0.2, 0.4, 0.6)


def command(output: Path) -> list[str]:
    return [*whole.command("stark", output, EXAMPLES, EPOCHS), "--sparsity", ",".join(map(str, SPARSITIES))]


@functools.cache
def fine_tuned() -> Path:
    return whole.models(command, lambda name: name == "teacher") / "teacher"


def ours(seed: int, output: Path) -> float:
    return whole.accuracy(command(output), [fine_tuned()], seed, output)


def plain(form: Form, seed: int, output: Path) -> float:
    teacher = from_pretrained(fine_tuned())
    torch.manual_seed(seed)
    return plain_stark.stark(
        teacher, first_layers(teacher, 2), *whole.tokenized(EXAMPLES), SPARSITIES, form,
        epochs=EPOCHS, rate=whole.RATE,
    )  # fmt: skip


@whole.against_plain(plain, ours)
def test_stark(benchmark: Any, implementation: str, run: Any, tmp_path: Path) -> None:
    fine_tuned()
    case = whole.case(f"{EXAMPLES} examples, {len(SPARSITIES)} sparsities")
    benchmark.group = f"STARK {case}"
    row = {"op": "STARK", "case": case, "dtype": whole.DTYPE, "implementation": implementation}
    measure_recipe(benchmark, run, whole.SEEDS, tmp_path, **row)
