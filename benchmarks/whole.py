"""What the benchmarks of whole recipes share: the task, the models that a recipe begins with, so that what comes after
them can be timed alone, and what it is compared with.

By default a little of the embedded task. FASTDISTILL_TASK, FASTDISTILL_TRAIN_EXAMPLES and FASTDISTILL_SEEDS (as 0,1,2)
set another, as a folder of SST-2's files with 4000; with FASTDISTILL_BF16=1 both sides compute in bfloat16 mixed
precision. The accuracies are noted with the times.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import BertForSequenceClassification

from benchmarks.harness import DEVICE, OURS
from benchmarks.plain_stark import Form
from fastdistill import load_task, tokenize
from fastdistill.cli import main
from fastdistill.models.loading import load_tokenizer
from fastdistill.recipes.stages import Stages

SMALL = "FASTDISTILL_TASK" not in os.environ
TASK = os.environ.get("FASTDISTILL_TASK", "docstrings")
BF16 = os.environ.get("FASTDISTILL_BF16", "0") != "0"
DTYPE = "bfloat16" if BF16 else "float32"
SEEDS = [int(seed) for seed in os.environ.get("FASTDISTILL_SEEDS", "0").split(",")]
RATE = 3e-4  # the commands' own, for MiniLM's width


def examples(small: int, large: int = 4000) -> int:
    return int(os.environ.get("FASTDISTILL_TRAIN_EXAMPLES", small if SMALL else large))


def case(sizes: str) -> str:
    """How a report calls what is measured."""
    return ", ".join([Path(TASK).name, sizes, *([DTYPE] if BF16 else [])])


def command(recipe: str, output: Path, train: int, epochs: int) -> list[str]:
    return [
        recipe, "--task", TASK, "--teacher", "minilm", "--student-layers", "2", "--output", str(output),
        "--max-train-examples", str(train), "--epochs", str(epochs), "--learning-rate", str(RATE), "--no-plots",
        "--select-on", "validation", "--report-on", "validation", *(["--bf16"] if BF16 else []),
    ]  # fmt: skip


def models(command: Callable[[Path], list[str]], wanted: Callable[[str], bool]) -> Path:
    """The output folder of a run that is stopped at the first training whose name is not wanted."""
    output = Path(tempfile.mkdtemp())
    train = Stages.train

    def only_wanted(self: Stages, training: Any) -> Any:
        if not wanted(training.name):
            raise KeyboardInterrupt
        return train(self, training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stages, "train", only_wanted)
        main(command(output))
    return output


def accuracy(command: list[str], begun: Iterable[Path], seed: int, output: Path) -> float:
    """Of a recipe's own student, from models that are there already."""
    for folder in begun:
        shutil.copytree(folder, output / folder.name)
    assert main([*command, "--seeds", str(seed)]) == 0
    return float(json.loads((output / "results.json").read_text())["results"][command[0]]["accuracy"])


def tokenized(train: int, evaluated: int | None = None) -> tuple[Any, Any, Any]:
    """Training and validation examples, and the tokenizer."""
    data, tokenizer = load_task(TASK, max_train_examples=train, max_eval_examples=evaluated), load_tokenizer("minilm")
    return *(tokenize(split, tokenizer, data.task) for split in (data.train, data.validation)), tokenizer


@contextmanager
def mixed_precision() -> Iterator[None]:
    """Within it plainly written models compute as accelerate's do: under autocast, with logits of float32."""
    own = BertForSequenceClassification.forward

    @functools.wraps(own)
    def forward(self: Any, *inputs: Any, **others: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            found = own(self, *inputs, **others)
        found.logits = found.logits.float()
        return found

    with patch.object(BertForSequenceClassification, "forward", forward):
        yield


def against_plain(plain: Callable[[Form, int, Path], float], ours: Callable[[int, Path], float]) -> Any:
    """Marks a test that measures `run(seed, output)` of an implementation."""
    if BF16:
        plain = mixed_precision()(plain)
    plainly = [(f"written plainly, {form.value}", functools.partial(plain, form)) for form in Form]
    cases = pytest.mark.parametrize("implementation, run", [*plainly, (OURS, ours)])
    on_cpu = pytest.mark.skipif(DEVICE == "cuda", reason="measured on the CPU")
    return lambda test: on_cpu(cases(test))
