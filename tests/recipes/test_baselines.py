"""What methods are compared with, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

import fastdistill
from fastdistill.cli import main
from fastdistill.models.architectures import blocks
from fastdistill.recipes.baselines import BASELINES
from fastdistill.recipes.settings.shared import Baseline
from tests import commands
from tests.commands import refused

ENCODER = {"layers": 4}
STUDENT = ("--student-layers", "2")


def results(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "results.json").read_text())["results"])


def learned_by(output: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((output / name / "stage.json").read_text())["came_from"])


def test_each_name_of_the_command_line_has_its_rule() -> None:
    assert set(BASELINES) == set(get_args(Baseline))


@pytest.mark.slow
def test_each_learns_by_its_objective_and_from_its_teacher(sources: Path, tmp_path: Path) -> None:
    names = ",".join(BASELINES)
    more = ("--ce-weight", "0.5", "--baselines", names, "--debug-gradients")
    assert main(commands.command("kd", sources, tmp_path, *STUDENT, *more)) == 0
    gradients = json.loads((tmp_path / "results.json").read_text())["gradients"]
    assert gradients["tinybert"].keys() == {"attention", "hidden", "prediction"}
    assert all(norm["gradient"] > 0 for name in ("pkd", "distilbert", "tinybert") for norm in gradients[name].values())
    found = results(tmp_path)
    assert list(found) == [
        "teacher", "assistant-0.25", "assistant-3", "finetuned", "kd", "dkd", "pkd", "ckd", "distilbert",
        "tinybert", "metakd", "takd-pruned", "takd", "distilled",
    ]  # fmt: skip
    assert all({"kd", "finetuned"} - {name} <= found[name]["against"].keys() for name in ("pkd", "ckd", "takd"))
    teacher = learned_by(tmp_path, "kd")["teacher"]
    assert learned_by(tmp_path, "finetuned")["teacher"] is None
    for name in ("dkd", "pkd", "ckd", "distilbert", "tinybert", "metakd", "assistant-3", "assistant-0.25"):
        assert learned_by(tmp_path, name)["teacher"] == teacher
    assert len({learned_by(tmp_path, name)["teacher"] for name in ("kd", "takd", "takd-pruned")}) == 3
    plain = learned_by(tmp_path, "kd")["objective"]
    assert learned_by(tmp_path, "takd")["objective"] == learned_by(tmp_path, "takd-pruned")["objective"] == plain
    assert learned_by(tmp_path, "pkd")["objective"].count(plain) == 1
    assert "'pkd': (100.0, PKD(pairs='skip'" in learned_by(tmp_path, "pkd")["objective"]
    assert "'ckd': (1.0, CKD(" in learned_by(tmp_path, "ckd")["objective"]
    assert "'kd': (5.0, LogitsKD(" in learned_by(tmp_path, "distilbert")["objective"]
    pruned = fastdistill.from_pretrained(tmp_path / "assistant-0.25")
    assert sum(block.neurons for block in blocks(pruned)) == 0.75 * 4 * 32
    assert len(blocks(fastdistill.from_pretrained(tmp_path / "assistant-3"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dekd", "peakd", "autoskd"])
def test_every_recipe_has_them(recipe: str, sources: Path, tmp_path: Path) -> None:
    more = {
        "dekd": ("--no-plots",),
        "peakd": ("--beta", "0"),
        "autoskd": ("--team", "3,4", "--candidates", "1", "--search-epochs", "1", "--no-plots"),
    }
    arguments = commands.command(
        recipe, sources, tmp_path, *STUDENT, *more[recipe], "--baselines", "pkd,tinybert,metakd,takd-pruned,takd"
    )
    assert main(arguments) == 0
    found = results(tmp_path)
    assert {"pkd", "tinybert", "metakd", "takd-pruned", "takd", recipe} < found.keys()
    assert not {"kd", "single", "kd-longer"} & found.keys()


@pytest.mark.slow
def test_of_a_pruned_student_the_assistant_is_pruned_half_as_far(sources: Path, tmp_path: Path) -> None:
    more = ("--student-sparsity", "0.7", "--sparsity", "0.25,0.5", "--baselines", "kd,takd", "--no-plots")
    assert main(commands.command("stark", sources, tmp_path, *more)) == 0
    for name in ("kd", "takd"):  # as often as there are sparsities
        runs = {path.name for path in (tmp_path / "seed-0").glob(f"{name}*")}
        assert runs == {name, f"{name}-run-2"}
    assert {"assistant-0.35", "takd", "kd", "trial", "stark"} < results(tmp_path).keys()


@pytest.mark.slow
def test_of_a_regression_too(sources: Path, tmp_path: Path) -> None:
    names = "none,pkd,distilbert,tinybert,metakd,takd"
    assert main(commands.command("kd", sources, tmp_path, *STUDENT, "--baselines", names, task="scores")) == 0
    assert {"finetuned", "pkd", "distilbert", "tinybert", "metakd", "takd", "distilled"} < results(tmp_path).keys()
    assert "'kd': (5.0, MSE(" in learned_by(tmp_path, "distilbert")["objective"]


def test_what_cannot_be_is_said_before_anything_is_trained(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(*more: str, recipe: str = "kd") -> str:
        return refused(commands.command(recipe, sources, tmp_path / "run", *more), capsys)

    assert "no assistant has more layers than the student's 3 and fewer than the teacher's 4" in asked(
        "--student-layers", "3", "--baselines", "takd"
    )
    assert "no assistant between the student's 4 layers and the teacher's 4" in asked(
        "--student-layers", "4", "--baselines", "takd-pruned"
    )
    assert "'dk' is not among none, kd, dkd" in asked("--student-layers", "2", "--baselines", "kd,dk")
    assert "tinybert, of all heads' attention" in asked(
        "--student-sparsity", "0.7", "--baselines", "tinybert", recipe="stark"
    )
    assert "takd-pruned, which is takd itself" in asked(
        "--student-sparsity", "0.7", "--baselines", "takd-pruned", recipe="stark"
    )
    assert not (tmp_path / "run").exists()
