"""Every recipe over two processes against one process: the same models and results, within float rounding.

The last batch of an epoch and the last of an evaluation are smaller than the others, and of an odd number.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from torch.utils.data import BatchSampler

from fastdistill.autoskd.search import Found
from fastdistill.autoskd.settings import METHODS
from fastdistill.autoskd.theta import Batch, theta_gradient
from fastdistill.models.scores import Scores
from fastdistill.processes import rank_and_number, sums_over_processes
from fastdistill.recipes import fitting
from fastdistill.training.sampling import EvenShares
from tests import tiny
from tests.parallel import ONE, RECIPES, TWO, assert_alike_runs, launched, make_sources, run
from tests.searches import SETTINGS, batches, search


def searches(folder: Path) -> None:
    """Each process keeps what it found. Of the second batch of each half, with one example, one process has none."""
    folder.mkdir(exist_ok=True)
    place = os.environ.get("RANK", "0")
    for method in METHODS:
        settings = replace(SETTINGS, method=method, candidates=2, batch_size=19, epochs=3)
        for times in ("once", "again"):  # goes on from the checkpoint in its midst
            student = tiny.bert(layers=1, dropout=0.0)
            found = search(settings, student, checkpoint=folder / f"{method}.safetensors", checkpoints=1)
            found.save(folder / f"{method}-{times}-{place}.safetensors")
    save_file(gradients(), folder / f"gradients-{place}.safetensors")


def gradients() -> dict[str, Tensor]:
    """theta's, in double precision, of a batch of seven and one of one example, shared by the processes there are."""
    process, processes = rank_and_number()
    student = tiny.bert(layers=2, dropout=0.0, attn_implementation="eager").double().eval()

    def share(whole: Batch) -> Batch:
        own = list(range(len(whole.team)))[process::processes]
        rows = own or [0]
        features = {name: value[rows] for name, value in whole.features.items()}
        return Batch(features, whole.team[rows], len(own) / len(whole.team))

    def forward(weights: Any, features: Any) -> Tensor:
        return functional_call(student, dict(weights), kwargs=dict(features)).logits

    return {
        f"{len(active)} {alpha}": theta_gradient(
            forward,
            dict(student.named_parameters()),
            share(batches(7, 1, active)),
            share(batches(1, 2, active)),
            torch.full((len(active),), 0.3, dtype=torch.float64),
            look_ahead=alpha,
            reduce=sums_over_processes,
        )
        for active in ([1], [0, 1, 2])
        for alpha in (0.0, 0.3)
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders of one process and of two, with a folder a recipe."""
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    folder = make_sources(tmp_path_factory.mktemp("parallel"))
    with launched("tests.recipes.test_parallel", str(folder), str(folder / TWO), *RECIPES):
        run(folder, folder / ONE, list(RECIPES))
        searches(folder / ONE / "searches")
    yield folder


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_do_as_one(runs: Path, recipe: str) -> None:
    assert_alike_runs(runs / TWO / recipe, runs / ONE / recipe, ("dekd",) if recipe == "dekd" else ())


@pytest.mark.slow
def test_scores(runs: Path) -> None:
    for kind in ("expressiveness", "friendliness"):
        two, one = (Scores.load(runs / name / "stark/seed-0/scores" / f"{kind}.safetensors") for name in (TWO, ONE))
        for ours, theirs in zip((*two.heads, *two.neurons), (*one.heads, *one.neurons), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_search(runs: Path) -> None:
    two, one = (Found.load(runs / name / "autoskd/seed-0/search/theta.safetensors") for name in (TWO, ONE))
    torch.testing.assert_close(two.theta, one.theta, rtol=1e-5, atol=1e-7)
    assert one.theta[1:].diff(dim=0).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_processes_share_a_search(runs: Path, method: str) -> None:
    found = {
        (number, times, place): Found.load(runs / number / "searches" / f"{method}-{times}-{place}.safetensors").theta
        for number, place in ((ONE, 0), (TWO, 0), (TWO, 1))
        for times in ("once", "again")
    }
    assert torch.equal(found[TWO, "once", 0], found[TWO, "once", 1])
    for theta in found.values():
        torch.testing.assert_close(theta, found[ONE, "once", 0], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_processes_share_thetas_gradient(runs: Path) -> None:
    files = [(ONE, 0), (TWO, 0), (TWO, 1)]
    one, *two = (load_file(runs / number / "searches" / f"gradients-{place}.safetensors") for number, place in files)
    for found in two:
        torch.testing.assert_close(found, one, rtol=1e-10, atol=1e-14)


def test_shares_are_even() -> None:
    shares = EvenShares(BatchSampler(range(13), 3, drop_last=False), 2)
    assert list(shares) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [12], [12]]
    assert len(shares) == 6
    shares = EvenShares(BatchSampler(range(11), 3, drop_last=False), 2)
    assert list(shares)[2:] == [[6, 7, 8], [9, 10]]
    assert len(EvenShares(BatchSampler(range(11), 3, drop_last=True), 2)) == 2


def test_processes_that_cannot_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "PartialState", lambda: SimpleNamespace(num_processes=3))
    with pytest.raises(ValueError, match="--batch-size is 16, but 3 processes share a batch; expected a multiple of 3"):
        fitting.check_processes(16)
    monkeypatch.setattr(fitting, "is_fsdp_enabled", lambda: True)
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading is true"):
        fitting.check_processes(15)


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    searches(Path(sys.argv[2]) / "searches")
