"""`fastdistill autoskd` on images, end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdistill
from fastdistill.cli import main
from fastdistill.data.load import load_task
from fastdistill.models.image_classifiers import WideResNetForImageClassification, image_classifier
from fastdistill.objectives.logits import TaskLoss
from fastdistill.recipes import fitting
from fastdistill.recipes.examples import of_images
from fastdistill.recipes.optimization import IMAGES
from fastdistill.recipes.splits import Splits
from fastdistill.recipes.stages import Stages
from fastdistill.recipes.training import Training
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
    more += ("--augmentation", "none", "--optim", "adamw_torch")
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


@pytest.mark.slow
def test_settings_are_the_papers_and_teachers_see_what_the_student_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGD with momentum, by cosine, on crops; no batch of a student has stored logits."""
    seen: dict[str, Any] = {}

    class Watched(fitting.DistillationTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if model.training:
                one = seen.setdefault(Path(str(self.args.output_dir)).name, {"columns": set(inputs), "images": []})
                one["group"], one["args"] = dict(self.optimizer.param_groups[0]), self.args
                one["images"].append(inputs["pixel_values"].clone())
            return super().compute_loss(model, inputs, *args, **kwargs)

        def teacher_outputs(self, features: Any, inputs: Any) -> Any:
            outputs: Any = super().teacher_outputs(features, inputs)
            for teacher in outputs.values() if isinstance(outputs, dict) else [outputs]:
                assert teacher is None or teacher.features["pixel_values"] is features["pixel_values"]
            return outputs

    monkeypatch.setattr(fitting, "DistillationTrainer", Watched)
    task, output = tiny.image_folder(tmp_path / "squares"), tmp_path / "run"
    more = ("--student", "wrn-10-1", "--team", "resnet8x2,resnet-8", "--each-teacher", "--team-chain", "--no-plots")
    more = ("--epochs", "2", "--candidates", "1", "--search-epochs", "4", "--baseline-runs", "1", *more)
    assert main(["autoskd", "--task", str(task), "--output", str(output), "--select-on", "validation", *more]) == 0
    settings = json.loads((output / "results.json").read_text())["settings"]
    told = ("optim", "lr_scheduler_type", "weight_decay", "momentum", "batch_size", "learning_rate", "augmentation")
    assert [settings[name] for name in told] == ["sgd", "cosine", 5e-4, 0.9, 64, 0.05, "crop-flip"]
    for name in ("team-resnet_8", "finetuned", "autoskd-1", "single-resnet8x2", "takd-team"):
        one = seen[name]
        assert (one["group"]["momentum"], one["group"]["weight_decay"]) == (0.9, 5e-4)
        assert (one["args"].lr_scheduler_type, one["args"].max_grad_norm, one["args"].warmup_steps) == ("cosine", 0, 0)
        assert one["columns"] == {"pixel_values", "labels"}
        first, second = (images.flatten(1).sum(1).sort().values for images in one["images"])  # whatever their order
        assert not torch.equal(first, second)


@pytest.mark.slow
def test_a_training_on_crops_that_was_cut_off_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of its second epoch."""
    data = load_task(tiny.image_folder(tmp_path / "squares"))
    splits = Splits(data.task, data.train, data.validation, data.validation, "validation", "validation")
    model = image_classifier("wrn-10-1", data.task)
    training = Training(name="one", model=model, objective=TaskLoss(), epochs=3, learning_rate=0.05, batch_size=6)

    def train(folder: str) -> Any:
        examples = of_images(splits, augment=True)
        return Stages(tmp_path / folder, examples, checkpoints=11, optimization=IMAGES).train(training)

    whole = train("whole")
    step = fitting.DistillationTrainer.training_step

    def cut(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 6:
            raise RuntimeError("cut off")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="cut off"):
        patch.setattr(fitting.DistillationTrainer, "training_step", cut)
        train("run")
    again = train("run")
    assert again.result["resumed"]
    torch.testing.assert_close(again.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


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
    assert "words is a task of text; expected --teacher and --student-layers, or --team" in capsys.readouterr().err
    teacher = tiny.model_folder(tmp_path / "encoder", tiny.bert(layers=3).bert)
    more = ("--teacher", str(teacher), "--student-layers", "1")
    assert main(command(task, tmp_path / "run", *more, "--augmentation", "none")) == 2
    assert "--augmentation would have no effect: words is a task of text" in capsys.readouterr().err
    task = tiny.image_folder(tmp_path / "squares")
    assert main(["kd", "--task", str(task), *more, "--output", str(tmp_path / "run")]) == 2
    assert "is of images; expected one of text" in capsys.readouterr().err
