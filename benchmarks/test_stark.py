"""The whole of STARK from a fine-tuned teacher: `fastdistill stark` against the same written plainly, in three
forms.

By default on 512 of the embedded task's examples. FASTDISTILL_TASK, FASTDISTILL_TRAIN_EXAMPLES and FASTDISTILL_SEEDS
(as 0,1,2) set another task, as a folder of SST-2's files with 4000; the accuracies are noted with the times.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import plain_stark
from benchmarks.harness import DEVICE, OURS, measure_recipe
from benchmarks.plain_stark import Form
from fastdistill import first_layers, from_pretrained
from fastdistill.cli import main

TASK = os.environ.get("FASTDISTILL_TASK", "docstrings")
EXAMPLES = os.environ.get("FASTDISTILL_TRAIN_EXAMPLES", "512")
SEEDS = [int(seed) for seed in os.environ.get("FASTDISTILL_SEEDS", "0").split(",")]
SPARSITIES = (0.2, 0.4, 0.6)
EPOCHS, RATE = 3, 3e-4


def command(output: Path, *more: str) -> list[str]:
    return [
        "stark", "--task", TASK, "--teacher", "minilm", "--student-layers", "2", "--output", str(output),
        "--max-train-examples", EXAMPLES, "--epochs", str(EPOCHS), "--learning-rate", str(RATE), "--no-plots",
        "--select-on", "validation", "--report-on", "validation", *more,
    ]  # fmt: skip


@functools.cache
def fine_tuned() -> Path:
    """The teacher, from a run that is stopped where it is trained."""
    from fastdistill.recipes.stages import Stages

    output = Path(tempfile.mkdtemp())
    train = Stages.train

    def only_the_teacher(self: Any, training: Any) -> Any:
        if training.name != "teacher":
            raise KeyboardInterrupt
        return train(self, training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stages, "train", only_the_teacher)
        main(command(output))
    return output / "teacher"


def ours(seed: int, output: Path) -> float:
    shutil.copytree(fine_tuned(), output / "teacher")
    sparsities = ",".join(map(str, SPARSITIES))
    assert main(command(output, "--sparsity", sparsities, "--seeds", str(seed))) == 0
    return float(json.loads((output / "results.json").read_text())["results"]["stark"]["accuracy"])


def plain(form: Form, seed: int, output: Path) -> float:
    from fastdistill import load_task, tokenize
    from fastdistill.models.loading import load_tokenizer

    data, tokenizer = load_task(TASK, max_train_examples=int(EXAMPLES), seed=0), load_tokenizer("minilm")
    train, validation = (tokenize(split, tokenizer, data.task) for split in (data.train, data.validation))
    teacher = from_pretrained(fine_tuned())
    torch.manual_seed(seed)
    return plain_stark.stark(
        teacher,
        first_layers(teacher, 2),
        train,
        validation,
        tokenizer,
        SPARSITIES,
        form,
        epochs=EPOCHS,
        rate=RATE,
    )


@pytest.mark.skipif(DEVICE == "cuda", reason="measured on the CPU")
@pytest.mark.parametrize(
    "implementation, run",
    [*((f"written plainly, {form.value}", functools.partial(plain, form)) for form in Form), (OURS, ours)],
)
def test_stark(benchmark: Any, implementation: str, run: Any, tmp_path: Path) -> None:
    fine_tuned()
    benchmark.group = f"STARK {Path(TASK).name}"
    case = f"{Path(TASK).name}, {EXAMPLES} examples, 3 sparsities"
    measure_recipe(benchmark, run, SEEDS, tmp_path, op="STARK", case=case, implementation=implementation)
