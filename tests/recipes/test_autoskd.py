"""`fastdistill autoskd` end to end."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill.autoskd.search import Found
from fastdistill.cli import main
from tests import commands
from tests.processes import kill_when, start
from tests.records import done_since, record, untimed, written

TEAM = ["layers_1", "layers_2", "layers_3"]
ENCODER = {"layers": 3}


def command(sources: Path, output: Path, *more: str, task: str = "task") -> list[str]:
    """One epoch of three steps a student, and three of six a search, unless `more` says otherwise."""
    own = ("--student-layers", "1", "--theta-learning-rate", "0.01", "--candidates", "2", "--search-epochs", "3")
    return commands.command("autoskd", sources, output, *own, *more, task=task)


def measured(output: Path) -> Any:
    return untimed(output, "results", "candidates", "searches", "drop")


EVERYTHING = ("--random-candidates", "1", "--baselines", "--seeds", "0,7", "--drop", "1", "--baseline-runs", "1")


@pytest.mark.slow
def test_a_run_trains_all_that_was_asked_for(finished: Path) -> None:
    found = record(finished)
    students = {"finetuned", "kd", "single", "avgkd", "mtbert", "autoskd", "random"}
    assert found["results"].keys() == {"teacher", *TEAM, *students}
    assert found["results"]["layers_3"] == found["results"]["teacher"]
    assert found["team"] == TEAM
    candidates = {"autoskd-1", "autoskd-2", "random-1"}
    for seed in (0, 7):
        folders = {path.name for path in (finished / f"seed-{seed}").iterdir()}
        assert folders == students - {"autoskd", "random"} | candidates | {"search"}
        assert {p.name for p in (finished / f"seed-{seed}" / "search").iterdir()} == {"stage.json", "theta.safetensors"}
    for plot in ("theta", "candidates"):
        assert "<svg" in (finished / f"{plot}.svg").read_text()


@pytest.mark.slow
def test_teachers_say_what_they_say_once(finished: Path) -> None:
    """The strongest a second time as "teacher", for plain distillation with labels."""
    files = [path.name.partition("-")[0] for path in (finished / "stored").iterdir()]
    assert sorted(files) == [*TEAM, "teacher"]


@pytest.mark.slow
def test_candidates_are_of_the_search(finished: Path) -> None:
    found = record(finished)
    for place, seed in enumerate((0, 7)):
        search = Found.load(finished / f"seed-{seed}" / "search" / "theta.safetensors")
        assert list(search.names) == TEAM
        torch.testing.assert_close(search.theta.sum(1), torch.ones(len(search.theta), dtype=torch.float64))
        assert (search.theta[search.selected_at :] == 0).sum(1).eq(1).all()
        tried = found["candidates"]["autoskd"][place]
        for one, theta in zip(tried.values(), search.candidates.tolist(), strict=True):
            assert list(one["theta"].values()) == theta
        said, reached = found["searches"][place], torch.tensor([found["results"][name]["accuracy"] for name in TEAM])
        assert sum(said["draws"].values()) == search.selected_at
        theta = search.theta[search.selected_at - 1]
        assert said["correlation_with_teachers"] == pytest.approx(
            torch.corrcoef(torch.stack([theta, reached.double()]))[0, 1].item(), nan_ok=True
        )
        assert found["searches"][place]["theta"] == dict(zip(TEAM, search.theta[-1].tolist(), strict=True))


@pytest.mark.slow
def test_the_best_candidate_counts(finished: Path) -> None:
    found = record(finished)
    for name in ("autoskd", "random"):
        for place, tried in enumerate(found["candidates"][name]):
            result = found["results"][name]
            best = tried[result["candidate"][place]]
            assert best["accuracy"] == result["values"][place] == max(one["accuracy"] for one in tried.values())
            assert best["theta"] == result["theta"][place]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("--method", "cr", "--order", "1", "--team", "1,3", "--team-from", "teacher", "--chain", "3,2,1"),
        ("--look-ahead", "0.1", "--temperature", "2", "--team", "2,1", "--student-layers", "2"),
    ],
)
def test_other_ways(sources: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    assert main(command(sources, tmp_path / "run", *more, "--no-plots")) == 0
    found = record(tmp_path / "run")
    metrics = {name: found["results"][name]["accuracy"] for name in (*found["team"], "finetuned")}
    weak = sum(metrics[name] <= metrics["finetuned"] for name in found["team"])  # as the student itself is
    assert found["drop"] == min(max(1, weak), len(found["team"]) - 1)


@pytest.mark.slow
def test_equal_candidates_are_tried_once(sources: Path, tmp_path: Path) -> None:
    """Where one teacher is left, they all are."""
    assert main(command(sources, tmp_path / "run", "--drop", "2", "--candidates", "3", "--no-plots")) == 0
    (tried,) = record(tmp_path / "run")["candidates"]["autoskd"]
    assert list(tried) == ["autoskd-1"]
    assert sorted(tried["autoskd-1"]["theta"].values()) == [0, 0, 1]


@pytest.mark.slow
def test_a_killed_search_goes_on(sources: Path, finished: Path, tmp_path: Path) -> None:
    """SIGKILL within it; the same command ends with the same results. Its students would be begun anew for another
    distribution, and are taken as they are."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    shutil.rmtree(output / "seed-7" / "search")
    (output / "results.json").unlink()
    before = written(output)
    arguments = command(sources, output, *EVERYTHING, "--checkpoints", "3")
    kill_when((output / "seed-7" / "search" / "unfinished.safetensors").is_file, start(main, arguments))
    assert not (output / "results.json").exists()
    assert main(arguments) == 0
    assert measured(output) == measured(finished)
    assert done_since(output, before) == {"search"}


@pytest.mark.parametrize(
    "more, message",
    [
        (("--team", "1"), "--team is 1; expected two or more"),
        (("--team", "1,4"), "at most the teacher's 3"),
        (("--drop", "3"), "--drop is 3; expected fewer than the 3 teachers"),
        (("--candidates", "9"), "phase 2 has 3 of the 6 steps"),
        (("--order", "1", "--look-ahead", "1"), "order 1 does not look ahead"),
        (("--student-layers", "4"), "expected from 1 to 3"),
        (("--kd-temperature", "3"), "--kd-temperature would have no effect"),
        (("--method", "cr", "--no-theta-baseline"), "--no-theta-baseline would have no effect"),
        (("--method", "both"), "invalid choice: 'both'"),
        (("--task", "scores"), "is regression"),
    ],
)
def test_what_cannot_be(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    if more[0] == "--task":
        more = ("--task", str(sources / more[1]))
    assert message in commands.refused(command(sources, tmp_path / "run", *more), capsys)
    assert not (tmp_path / "run").exists()
