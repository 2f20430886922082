"""`fastdistill autoskd` on images, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fastdistill
from fastdistill.cli import main
from fastdistill.models.image_classifiers import WideResNetForImageClassification
from tests import tiny


def command(task: Path, output: Path, *more: str) -> list[str]:
    return [
        "autoskd", "--task", str(task), "--output", str(output), "--epochs", "1", "--batch-size", "6",
        "--candidates", "2", "--search-epochs", "2", "--theta-learning-rate", "0.01", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_a_team_of_networks(tmp_path: Path) -> None:
    task, output = tiny.image_folder(tmp_path / "squares"), tmp_path / "run"
    more = ("--student", "wrn-10-1", "--team", "wrn-10-1,wrn-16-1,resnet-8", "--baselines", "--random-candidates", "1")
    assert main(command(task, output, *more)) == 0
    found = json.loads((output / "results.json").read_text())
    assert found["team"] == ["wrn_10_1", "wrn_16_1", "resnet_8"]
    assert {"finetuned", "kd", "single", "avgkd", "mtbert", "autoskd", "random", *found["team"]} == set(
        found["results"]
    )
    theta = found["searches"][0]["theta"]
    assert sum(theta.values()) == pytest.approx(1) and len(set(theta.values())) > 1
    assert sorted(file.name.split("-")[0] for file in (output / "stored").iterdir()) == sorted(
        [*found["team"], "teacher"]
    )
    alike, alone = (fastdistill.from_pretrained(output / name) for name in ("team-wrn_10_1", "seed-0/finetuned"))
    assert not torch.equal(next(alike.parameters()), next(alone.parameters()))  # a teacher is not the student itself
    student = fastdistill.from_pretrained(output / "seed-0" / "autoskd-1")
    assert isinstance(student, WideResNetForImageClassification)
    assert (output / "theta.svg").is_file() and (output / "candidates.svg").is_file()
    before = {file: file.stat().st_mtime_ns for file in output.rglob("stage.json")}
    assert main(command(task, output, *more)) == 0
    assert before == {file: file.stat().st_mtime_ns for file in output.rglob("stage.json")}


@pytest.mark.parametrize(
    "more, said",
    [
        (("--student", "wrn-10-1"), "squares is a task of images; expected --student and --team"),
        (("--student", "wrn-10-1", "--team", "wrn-10-1"), "--team is wrn-10-1; expected two or more networks"),
        (("--student", "wrn-10-1", "--team", "1,2"), "'1' is no image classifier; expected wrn-DEPTH-WIDTH"),
        (
            ("--student", "wrn-10-1", "--team", "wrn-10-1,resnet-8", "--teacher", "minilm", "--chain", "2,1"),
            "--teacher, --chain would have no effect: squares is a task of images; leave it out",
        ),
        (("--student", "wrn-10-1", "--team", "wrn-10-1,resnet-8", "--team-from", "teacher"), "--team-from teacher"),
        (
            ("--student", "wrn-10-1", "--team", "wrn-10-1,resnet-8", "--baselines", "kd,avgkd,takd,pkd"),
            "--baselines has pkd, takd, of a text's tokens and layers; leave it out",
        ),
    ],
)
def test_what_cannot_be(more: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tiny.image_folder(tmp_path / "squares"), tmp_path / "run", *more)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_text_and_images_have_options_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = tiny.task_folder(tmp_path / "words")
    assert main(command(task, tmp_path / "run")) == 2
    assert "words is a task of text; expected --teacher and --student-layers" in capsys.readouterr().err
    teacher = tiny.model_folder(tmp_path / "encoder", tiny.bert(layers=3).bert)
    more = ("--teacher", str(teacher), "--student-layers", "1")
    assert main(command(task, tmp_path / "run", *more, "--student", "wrn-10-1")) == 2
    assert "--student would have no effect: words is a task of text" in capsys.readouterr().err
    task = tiny.image_folder(tmp_path / "squares")
    assert main(["kd", "--task", str(task), *more, "--output", str(tmp_path / "run")]) == 2
    assert "is of images; expected one of text" in capsys.readouterr().err
