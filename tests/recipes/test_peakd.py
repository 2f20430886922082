"""`fastdistill peakd` end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdistill
from fastdistill.cli import main
from fastdistill.models.drawing import draw_anew
from fastdistill.recipes import PeaKDSettings, fitting, stages
from fastdistill.recipes.begin import begin
from fastdistill.recipes.methods.ptp import PTP_LABELS, ptp_labels
from tests import commands, tiny
from tests.records import done_since, record, untimed, written

ENCODER = {"layers": 4}


def command(sources: Path, output: Path, *more: str, task: str = "task") -> list[str]:
    """One epoch of three steps a stage, unless `more` says otherwise."""
    own = ("--student-layers", "2", "--checkpoints", "1")
    return commands.command("peakd", sources, output, *own, *more, task=task)


def measured(output: Path) -> Any:
    return untimed(output, "results", "ptp")


EVERYTHING = (
    "--without", "sps", "--without", "ptp,swap", "--seeds", "0,7", "--threshold", "0.7,0.6",
)  # fmt: skip
STUDENTS = {"peakd": 4, "peakd-without-sps": 2, "peakd-without-swap-ptp": 4}


@pytest.mark.slow
def test_a_run_trains_all_that_was_asked_for(finished: Path) -> None:
    found = record(finished)
    assert list(found["results"]) == ["teacher", *STUDENTS]
    parameters = {name: found["results"][name]["parameters"] for name in STUDENTS}
    assert len(set(parameters.values())) == 1
    for name, layers in STUDENTS.items():
        assert found["results"][name]["layers"] == layers
        for seed in (0, 7):
            student = fastdistill.from_pretrained(finished / f"seed-{seed}" / name)
            assert student.config.num_hidden_layers == layers
            assert student.num_labels == 2
            expected = {"layers": 2, "swap": "swap" not in name} if layers == 4 else None
            assert getattr(student.config, "fastdistill_shared", None) == expected
    assert list(found["ptp"]["students"]) == ["ptp", "ptp-without-sps"]
    assert fastdistill.from_pretrained(finished / "seed-7" / "ptp").config.id2label == dict(enumerate(PTP_LABELS))


@pytest.mark.slow
def test_labels_are_what_the_teacher_says(finished: Path) -> None:
    teacher, data = fastdistill.from_pretrained(finished / "teacher"), tiny.dataset(48, 1)
    with torch.no_grad():
        logits = torch.cat([teacher(torch.tensor([row["input_ids"]])).logits for row in data])
    labels = ptp_labels(logits, torch.tensor(data["labels"][:]), (0.7, 0.6))
    counts = record(finished)["ptp"]["labels"]["train"]
    assert counts == {name: int((labels == number).sum()) for number, name in enumerate(PTP_LABELS)}
    assert sum(record(finished)["ptp"]["labels"]["validation"].values()) == 24


@pytest.mark.slow
def test_where_students_begin(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: dict[str, Any] = {}
    seen: dict[str, Any] = {}

    class Watched(fitting.DistillationTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            name = Path(self.args.output_dir).name
            begun[name] = {key: value.clone() for key, value in self.model.state_dict().items()}
            seen[name] = self.train_dataset["labels"][:], self.objective
            return super().train(*args, **kwargs)

    monkeypatch.setattr(fitting, "DistillationTrainer", Watched)
    monkeypatch.setattr(fitting, "can_compact", lambda model: False)  # so that states have all embeddings
    more = ("--without", "ptp", "--threshold", "1", "--beta", "5", "--alpha", "0.4")
    assert main(command(sources, tmp_path / "run", *more)) == 0
    assert record(tmp_path / "run")["ptp"]["labels"]["train"]["confidently correct"] == 0  # a class with no example
    assert "on no training example is the teacher confidently correct or confidently wrong;" in capsys.readouterr().err
    asked = PeaKDSettings(
        task=str(sources / "task"), teacher=str(sources / "encoder"), student_layers=2, output=tmp_path
    )
    student = fastdistill.first_layers(begin(asked).pretrained, 2)  # not of the fine-tuned teacher
    draw_anew(student, seed=0)
    sps = fastdistill.shuffled_sharing(student)
    torch.testing.assert_close(begun["peakd-without-ptp"], dict(sps.state_dict()), rtol=0, atol=0)
    ptp = fastdistill.from_pretrained(tmp_path / "run" / "seed-0" / "ptp").state_dict()
    for name, value in begun["peakd"].items():  # its own head, the encoder of the pretrained one
        expected = sps.state_dict()[name] if name.startswith("classifier") else ptp[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
        assert name.startswith("classifier") or torch.equal(begun["ptp"][name], sps.state_dict()[name])
    assert set(seen["ptp"][0]) <= {1, 3}
    assert set(seen["peakd"][0]) == {0, 1}
    terms = seen["peakd"][1].terms
    assert {name: weight for name, (weight, _) in terms.items()} == {"ce": 0.6, "kd": 0.4, "pkd": 5.0}
    assert (terms["kd"][1].temperature, terms["kd"][1].scale_by_temperature) == (10.0, True)
    assert terms["pkd"][1].over == "mean"


def test_pretraining_keeps_the_weights_of_the_lowest_loss(finished: Path) -> None:
    """tests/recipes/test_best.py has how."""
    for name, best in (("ptp", "loss"), ("peakd", "metric")):
        stage = json.loads((finished / "seed-0" / name / "stage.json").read_text())
        assert stage["came_from"]["best"] == best


@pytest.mark.slow
def test_labels_out_of_fold(sources: Path, tmp_path: Path) -> None:
    """Each training example is labelled by a teacher that has not learned it."""
    output = tmp_path / "run"
    assert main(command(sources, output, "--ptp-folds", "3", "--threshold", "0.7")) == 0
    data, expected = tiny.dataset(48, 1), torch.empty(48, dtype=torch.int64)
    for fold in range(3):
        teacher = fastdistill.from_pretrained(output / f"teacher-fold-{fold + 1}")
        for row in range(fold, 48, 3):
            with torch.no_grad():
                logits = teacher(torch.tensor([data[row]["input_ids"]])).logits
            expected[row] = ptp_labels(logits, torch.tensor([data[row]["labels"]]), 0.7)
    counts = record(output)["ptp"]["labels"]["train"]
    assert counts == {name: int((expected == number).sum()) for number, name in enumerate(PTP_LABELS)}
    own = fastdistill.from_pretrained(output / "teacher")
    assert not torch.equal(own.classifier.weight, teacher.classifier.weight)


@pytest.mark.slow
def test_stored_hidden_states_teach_the_same(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teachers: dict[str, Any] = {}

    class Watched(fitting.DistillationTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            teachers[str(self.args.output_dir)] = self.teacher_model
            return super().train(*args, **kwargs)

    monkeypatch.setattr(fitting, "DistillationTrainer", Watched)
    with monkeypatch.context() as limit:
        limit.setattr(stages, "STORED_STATES", 0)
        assert main(command(sources, tmp_path / "run")) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "stored")
    shutil.rmtree(tmp_path / "stored" / "seed-0" / "peakd")
    assert main(command(sources, tmp_path / "stored")) == 0
    folders = [tmp_path / name / "seed-0" / "peakd" for name in ("run", "stored")]
    assert [teachers[str(folder)] is None for folder in folders] == [False, True]
    ours, theirs = (fastdistill.from_pretrained(folder).state_dict() for folder in folders)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)


class Cut(BaseException):
    """As a kill would, this passes by every `except Exception`."""


@pytest.mark.slow
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(
    sources: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    for name in ("ptp", "peakd"):
        shutil.rmtree(output / "seed-7" / name)
    for stage in ("ptp", "peakd"):

        def cut(self: Any, args: Any, state: Any, control: Any, stage: str = stage, **kwargs: Any) -> None:
            if Path(args.output_dir).name == stage and state.global_step == 3:
                raise Cut

        with monkeypatch.context() as patch:
            patch.setattr(fitting._ProgressBar, "on_step_end", cut)
            with pytest.raises(Cut):
                main(command(sources, output, *EVERYTHING))
        assert list(output.glob(f"seed-7/{stage}/checkpoint-2"))
    assert main(command(sources, output, *EVERYTHING)) == 0
    assert measured(output) == measured(finished)
    ours, theirs = (fastdistill.from_pretrained(run / "seed-7" / "peakd").state_dict() for run in (output, finished))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.slow
def test_another_threshold_repeats_the_pretraining(sources: Path, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    before, more = written(output), ("--without", "ptp,swap", "--threshold", "0.9")
    assert main(command(sources, output, *more)) == 0
    assert done_since(output, before) == {"ptp", "peakd"}


@pytest.mark.parametrize(
    "more, message",
    [
        (("--student-layers", "3"), "the student applies 6 layers, but the teacher has 4 to pair them with"),
        (("--shared-layers", "3"), "--shared-layers is 3; the student has 2"),
        (("--student-layers", "5"), "k is 5; expected from 1 to 4"),
        (("--without", "sps,swap"), "swap changes nothing without sps"),
        (("--without", "kd"), "'kd' is not among sps, swap, ptp"),
        (("--threshold", "0.5"), "0.5 is not a finite number above 0.5"),
        (("--threshold", "0.9,0.8,0.7"), "--threshold has 3 numbers; expected one or two"),
        (("--ptp-folds", "49"), "--ptp-folds is 49; expected at most the 48 training examples"),
        (("--kd-temperature", "3"), "--kd-temperature would have no effect"),
        (("--store-hidden-states", "--beta", "0"), "--store-hidden-states would have no effect"),
        (("--alpha", "1.1"), "1.1 is not a finite number of at least 0 and at most 1"),
        (("--chain", "2,3"), "--chain is 2,3; expected falling numbers"),
    ],
)
def test_what_cannot_be(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert message in commands.refused(command(sources, tmp_path / "run", *more), capsys)
    assert not (tmp_path / "run").exists()


def test_regression_has_no_classes(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(sources, tmp_path / "run", task="scores")) == 2
    assert "scores is regression" in capsys.readouterr().err


@pytest.mark.slow
def test_layers_without_pairs(sources: Path, tmp_path: Path) -> None:
    """More layers than the teacher's are fine where hidden states teach nothing."""
    more = ("--student-layers", "3", "--beta", "0", "--baselines", "--epochs", "0.4")
    assert main(command(sources, tmp_path / "run", *more)) == 0
    found = record(tmp_path / "run")["results"]
    assert list(found) == ["teacher", "finetuned", "kd", "kd-longer", "peakd"]
    assert found["peakd"]["layers"] == 6
    assert found["peakd"]["parameters"] == found["kd"]["parameters"]
