"""The whole of AutoSKDBERT from a trained team: `fastdistill autoskd`, that is a search and a student of each candidate
distribution, against the same written plainly, in three forms. By default 2 candidates, on another task 10."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from benchmarks import plain_autoskd, whole
from benchmarks.harness import measure_recipe
from benchmarks.plain_stark import Form
from fastdistill import first_layers, from_pretrained

EXAMPLES = whole.examples(64, 2000)
CANDIDATES, SEARCH_EPOCHS, EPOCHS = (2, 4, 1) if whole.SMALL else (10, 5, 3)
EVALUATED = 64 if whole.SMALL else None
LAYERS = range(1, 7)


def command(output: Path) -> list[str]:
    return [
        *whole.command("autoskd", output, EXAMPLES, EPOCHS), "--team", ",".join(map(str, LAYERS)),
        "--candidates", str(CANDIDATES), "--search-epochs", str(SEARCH_EPOCHS), "--student-from", "teacher",
        "--theta-optimizer", "adam", "--no-theta-baseline",
        *(["--max-eval-examples", str(EVALUATED)] if EVALUATED else []),
    ]  # fmt: skip


@functools.cache
def trained() -> dict[int, Path]:
    """The team by layers."""
    quickly = ("--checkpoints", "0")  # what they are is the same
    output = whole.models(
        lambda at: [*command(at), *quickly], lambda name: name == "teacher" or name.startswith("team-")
    )
    return {k: output / ("teacher" if k == max(LAYERS) else f"team-{k}") for k in LAYERS}


def ours(seed: int, output: Path) -> float:
    return whole.accuracy(command(output), trained().values(), seed, output)


def plain(form: Form, seed: int, output: Path) -> float:
    team = [from_pretrained(folder) for folder in trained().values()]
    torch.manual_seed(seed)
    return plain_autoskd.autoskd(
        first_layers(team[-1], 2), team, *whole.tokenized(EXAMPLES, EVALUATED), form,
        candidates=CANDIDATES, search_epochs=SEARCH_EPOCHS, epochs=EPOCHS, rate=whole.RATE,
    )  # fmt: skip


@whole.against_plain(plain, ours)
def test_autoskd(benchmark: Any, implementation: str, run: Any, tmp_path: Path) -> None:
    trained()
    case = whole.case(f"{EXAMPLES} examples, team of {len(LAYERS)}, {CANDIDATES} candidates")
    benchmark.group = f"AutoSKD {case}"
    row = {"op": "AutoSKD", "case": case, "dtype": whole.DTYPE, "implementation": implementation}
    measure_recipe(benchmark, run, whole.SEEDS, tmp_path, **row)
