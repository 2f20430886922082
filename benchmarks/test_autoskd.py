"""The whole of AutoSKDBERT from a trained team: `fastdistill autoskd`, that is a search and a student of each candidate
distribution, against the same written plainly, in three forms.

By default a little of the embedded task. FASTDISTILL_TASK, FASTDISTILL_TRAIN_EXAMPLES (2000) and FASTDISTILL_SEEDS (as
0,1,2) set another task, as a folder of SST-2's files, with 10 candidates; the accuracies are noted with the times.
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

from benchmarks import plain_autoskd
from benchmarks.harness import DEVICE, OURS, measure_recipe
from benchmarks.plain_stark import Form
from fastdistill import first_layers, from_pretrained
from fastdistill.cli import main

SMALL = "FASTDISTILL_TASK" not in os.environ
TASK = os.environ.get("FASTDISTILL_TASK", "docstrings")
EXAMPLES = os.environ.get("FASTDISTILL_TRAIN_EXAMPLES", "64" if SMALL else "2000")
SEEDS = [int(seed) for seed in os.environ.get("FASTDISTILL_SEEDS", "0").split(",")]
CANDIDATES, SEARCH_EPOCHS, EPOCHS = (2, 4, 1) if SMALL else (10, 5, 3)
EVALUATED = 64 if SMALL else None
RATE = 3e-4  # the command's own, for MiniLM's width
LAYERS = range(1, 7)


def command(output: Path, *more: str) -> list[str]:
    return [
        "autoskd", "--task", TASK, "--teacher", "minilm", "--student-layers", "2", "--output", str(output),
        "--team", ",".join(map(str, LAYERS)), "--candidates", str(CANDIDATES), "--search-epochs", str(SEARCH_EPOCHS),
        "--epochs", str(EPOCHS), "--max-train-examples", EXAMPLES, "--no-plots",
        "--select-on", "validation", "--report-on", "validation", "--student-from", "teacher",
        "--theta-optimizer", "adam", "--no-theta-baseline",
        *(["--max-eval-examples", str(EVALUATED)] if EVALUATED else []), *more,
    ]  # fmt: skip


@functools.cache
def trained() -> dict[int, Path]:
    """The team by layers, from a run that is stopped where it is trained."""
    from fastdistill.recipes.stages import Stages

    output = Path(tempfile.mkdtemp())
    train = Stages.train

    def only_the_team(self: Any, training: Any) -> Any:
        if training.name != "teacher" and not training.name.startswith("team-"):
            raise KeyboardInterrupt
        return train(self, training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stages, "train", only_the_team)
        main(command(output, "--checkpoints", "0"))  # to be quick; what they are is the same
    return {k: output / ("teacher" if k == max(LAYERS) else f"team-{k}") for k in LAYERS}


def ours(seed: int, output: Path) -> float:
    for folder in trained().values():
        shutil.copytree(folder, output / folder.name)
    assert main(command(output, "--seeds", str(seed))) == 0
    return float(json.loads((output / "results.json").read_text())["results"]["autoskd"]["accuracy"])


def plain(form: Form, seed: int, output: Path) -> float:
    from fastdistill import load_task, tokenize
    from fastdistill.models.loading import load_tokenizer

    data = load_task(TASK, max_train_examples=int(EXAMPLES), max_eval_examples=EVALUATED, seed=0)
    tokenizer = load_tokenizer("minilm")
    train, validation = (tokenize(split, tokenizer, data.task) for split in (data.train, data.validation))
    team = [from_pretrained(folder) for folder in trained().values()]
    torch.manual_seed(seed)
    return plain_autoskd.autoskd(
        first_layers(team[-1], 2), team, train, validation, tokenizer, form,
        candidates=CANDIDATES, search_epochs=SEARCH_EPOCHS, epochs=EPOCHS, rate=RATE,
    )  # fmt: skip


@pytest.mark.skipif(DEVICE == "cuda", reason="measured on the CPU")
@pytest.mark.parametrize(
    "implementation, run",
    [*((f"written plainly, {form.value}", functools.partial(plain, form)) for form in Form), (OURS, ours)],
)
def test_autoskd(benchmark: Any, implementation: str, run: Any, tmp_path: Path) -> None:
    trained()
    benchmark.group = f"AutoSKD {Path(TASK).name}"
    case = f"{Path(TASK).name}, {EXAMPLES} examples, team of 6, {CANDIDATES} candidates"
    measure_recipe(benchmark, run, SEEDS, tmp_path, op="AutoSKD", case=case, implementation=implementation)
