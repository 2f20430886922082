from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastdistill import recipes
from fastdistill.cli import main
from fastdistill.recipes import KDSettings, fitting, folder
from tests import commands, tiny
from tests.processes import start
from tests.records import done_since, record, written

STAGES = ("teacher", "finetuned", "distilled")
ENCODER = {"layers": 3}
EXAMPLES = 96
EVERYTHING = ()


def command(sources: Path, output: Path, *more: str, task: str = "task", teacher: str = "encoder") -> list[str]:
    """Two epochs of six steps a stage, and three checkpoints, unless `more` says otherwise."""
    return commands.kd(sources, output, "--checkpoints", "3", *more, task=task, teacher=teacher)


def without(stage: str, finished: Path, output: Path) -> Path:
    """The run, of which this stage is yet to be done."""
    shutil.copytree(finished, output)
    shutil.rmtree(output / stage)
    (output / "results.json").unlink()
    return output


def metrics(output: Path) -> dict[str, dict[str, Any]]:
    """All that is measured but time."""
    return {
        name: {key: found[key] for key in ("accuracy", "loss", "parameters")}
        for name, found in record(output)["results"].items()
    }


def model(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def test_a_run_leaves_models_and_results(finished: Path) -> None:
    found = record(finished)
    assert found["task"] == "task"
    assert found["metric"] == "accuracy"
    assert found["settings"]["epochs"] == 2
    assert found["settings"]["objective"].startswith("LogitsKD(temperature=2.0")
    assert found["versions"]["torch"] == torch.__version__
    assert list(found["results"]) == list(STAGES)
    for name in STAGES:
        trained = model(finished / name)
        measured = found["results"][name]
        assert trained.config.num_hidden_layers == (3 if name == "teacher" else 1)
        assert trained.config.id2label == {0: "0", 1: "1"}
        assert measured["parameters"] == trained.num_parameters()
        assert measured["examples_per_second"] > 0 and measured["trained_examples_per_second"] > 0
        assert measured["peak_memory"] > 2**20
        assert AutoTokenizer.from_pretrained(finished / name).get_vocab() == tiny.tokenizer().get_vocab()
        assert not list((finished / name).glob("checkpoint-*"))
        assert not list((finished / name).glob("*.bin"))


def test_the_metrics_are_those_of_the_models_on_disk(finished: Path) -> None:
    data = [tiny.rows(24, 2)[i] for i in range(24)]
    inputs = tiny.tokenizer()([row["sentence1"] for row in data], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    for name in STAGES:
        with torch.no_grad():
            predicted = model(finished / name)(**inputs).logits.argmax(-1).tolist()
        right = sum(p == row["label"] for p, row in zip(predicted, data, strict=True))
        assert metrics(finished)[name]["accuracy"] == pytest.approx(right / 24)


def test_the_table_shows_every_model(sources: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = metrics(finished)
    stamps = {path: path.stat().st_mtime_ns for path in finished.glob("*/model.safetensors")}
    assert main(command(sources, finished)) == 0
    said = capsys.readouterr()
    for name in STAGES:
        rows = [row for row in said.out.splitlines() if f"│ {name}" in row]
        assert f"{100 * before[name]['accuracy']:.1f}" in rows[-1]
        assert f"{name}: done earlier" in said.err.replace("\n", "")
    assert metrics(finished) == before
    assert {path: path.stat().st_mtime_ns for path in finished.glob("*/model.safetensors")} == stamps


class Cut(BaseException):
    """As a kill would, this passes by every `except Exception`."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, step",
    [
        ("teacher", 2),
        ("teacher", "saving"),
        ("finetuned", 5),
        ("finetuned", "evaluating"),
        ("distilled", 9),
        ("distilled", "saving"),
    ],
)
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(
    sources: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, step: int | str
) -> None:
    """Before and after the first checkpoint, in each epoch, within the writing of a checkpoint, and after training;
    stages that come from it are then done already."""
    output = without(stage, finished, tmp_path / "run")

    def cut(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if Path(args.output_dir).name == stage and state.global_step == step:
            raise Cut

    save, evaluate = fitting.DistillationTrainer._save_rng_state, fitting.DistillationTrainer.evaluate

    def cut_saving(self: Any, output_dir: str) -> None:
        if Path(self.args.output_dir).name == stage and self.state.global_step == 9:
            raise Cut  # the model and optimiser are written, the state is not
        save(self, output_dir)

    def cut_evaluating(self: Any) -> Any:
        if Path(self.args.output_dir).name == stage:
            raise Cut
        return evaluate(self)

    with monkeypatch.context() as patch:
        if step == "saving":
            patch.setattr(fitting.DistillationTrainer, "_save_rng_state", cut_saving)
        elif step == "evaluating":
            patch.setattr(fitting.DistillationTrainer, "evaluate", cut_evaluating)
        else:
            patch.setattr(fitting._ProgressBar, "on_step_end", cut)
        with pytest.raises(Cut):
            main(command(sources, output))
    assert not (output / "results.json").exists()
    before = written(output)
    assert main(command(sources, output)) == 0
    assert metrics(output) == metrics(finished)
    assert record(output)["results"][stage]["resumed"] == (step != 2)
    ours, theirs = (model(folder / stage).state_dict() for folder in (output, finished))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert done_since(output, before) == {stage}


@pytest.mark.slow
def test_a_marker_that_was_cut_off_is_no_hindrance(sources: Path, finished: Path, tmp_path: Path) -> None:
    output = without("teacher", finished, tmp_path / "run")
    (output / "teacher").mkdir()
    (output / "teacher" / ".stage.json.4711").write_text('{"came_')
    assert main(command(sources, output)) == 0


@pytest.mark.slow
def test_a_removal_that_was_cut_off_is_no_hindrance(
    sources: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)

    def cut(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            (path / "stage.json").unlink()
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(folder.shutil, "rmtree", cut)
        with pytest.raises(Cut):
            main(command(sources, output, "--epochs", "1"))
    assert main(command(sources, output)) == 0
    assert metrics(output) == metrics(finished)
    assert not [path for path in output.iterdir() if path.name.startswith(".")]


def killed(arguments: list[str]) -> None:
    def kill(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.output_dir.endswith("distilled") and state.global_step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    fitting._ProgressBar.on_step_end = kill  # type: ignore[method-assign]
    main(arguments)


@pytest.mark.slow
def test_a_killed_process_is_taken_up_again(sources: Path, finished: Path, tmp_path: Path) -> None:
    output, said = without("distilled", finished, tmp_path / "run"), tmp_path / "said"
    process = start(killed, command(sources, output), said=said)
    process.join(300)
    assert process.exitcode == -signal.SIGKILL, said.read_text()
    assert main(command(sources, output)) == 0
    assert record(output)["results"]["distilled"]["resumed"]
    assert {name: m["accuracy"] for name, m in metrics(output).items()} == {
        name: m["accuracy"] for name, m in metrics(finished).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, again",
    [
        (("--temperature", "5"), {"distilled"}),
        (("--divergence", "reverse_kl"), {"distilled"}),
        (("--ce-weight", "0.5"), {"distilled"}),
        (("--label-smoothing", "0.1"), {"finetuned", "distilled"}),
        (("--epochs", "1"), {"finetuned", "distilled"}),
        (("--student-layers", "2"), {"finetuned", "distilled"}),
        (("--teacher-learning-rate", "0.02"), set(STAGES)),
        (("--max-train-examples", "80"), set(STAGES)),
        (("--max-eval-examples", "20"), set(STAGES)),
        (("--max-length", "5"), set(STAGES)),
        (("--batch-size", "8"), set(STAGES)),
        (("--seed", "1"), set(STAGES)),
        (("--bf16",), set(STAGES)),
        (("--checkpoints", "0", "--tensorboard", "--no-cuda-graphs"), set()),
    ],
)
def test_a_changed_option_repeats_what_depends_on_it(
    sources: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: tuple[str, ...],
    again: set[str],
) -> None:
    monkeypatch.setattr(fitting.DistillationTrainer, "train", lambda self, **options: None)
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    before = written(output)
    assert main(command(sources, output, *change)) == 0
    assert done_since(output, before) == again


@pytest.mark.slow
def test_changed_data_repeat_everything(sources: Path, finished: Path, tmp_path: Path) -> None:
    output, task = tmp_path / "run", tmp_path / "task"
    shutil.copytree(finished, output)
    shutil.copytree(sources / "task", task)
    lines = (task / "train.jsonl").read_text().splitlines(keepends=True)
    first = json.loads(lines[0])
    changed = json.dumps(first | {"label": 1 - first["label"]}) + "\n"
    (task / "train.jsonl").write_text("".join([changed, *lines[1:]]))
    before = metrics(output)
    assert main(command(tmp_path, output, teacher=os.path.relpath(sources / "encoder", tmp_path))) == 0
    assert {name for name in STAGES if metrics(output)[name]["loss"] == before[name]["loss"]} == set()


@pytest.mark.slow
def test_a_classifier_of_the_task_is_not_fine_tuned(
    sources: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = os.path.relpath(finished / "teacher", sources)
    arguments = command(sources, tmp_path, teacher=teacher)
    while "--teacher-epochs" in arguments:
        at = arguments.index("--teacher-epochs")
        del arguments[at : at + 2]
    assert main(arguments) == 0
    assert "is a classifier of task already" in capsys.readouterr().out.replace("\n", " ")
    assert metrics(tmp_path)["teacher"] == metrics(finished)["teacher"]
    assert record(tmp_path)["settings"]["teacher_epochs"] == 0
    torch.testing.assert_close(
        model(tmp_path / "teacher").state_dict(), model(finished / "teacher").state_dict(), rtol=0, atol=0
    )
    assert metrics(tmp_path) == metrics(finished)
    assert main([*arguments, "--seed", "1"]) == 0  # which the teacher does not depend on
    assert metrics(tmp_path)["finetuned"] != metrics(finished)["finetuned"]


def test_a_classifier_has_no_pretrained_encoder(
    sources: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = os.path.relpath(finished / "teacher", sources)
    arguments = command(
        sources, tmp_path / "run", "--student-from", "pretrained", "--teacher-epochs", "0", teacher=teacher
    )
    assert "is a classifier already; expected teacher" in commands.refused(arguments, capsys)


@pytest.mark.slow
def test_regression(sources: Path, tmp_path: Path) -> None:
    assert main(command(sources, tmp_path, "--epochs", "1", "--teacher-epochs", "1", task="scores")) == 0
    found = record(tmp_path)
    assert found["metric"] == "spearman"
    assert found["settings"]["objective"] == "MSE(kd_weight=1.0, label_weight=1.0)"
    assert model(tmp_path / "distilled").config.problem_type == "regression"
    assert all(-1 <= found["results"][name]["spearman"] <= 1 for name in STAGES)


@pytest.mark.slow
def test_tensorboard_logs_the_parts_of_the_loss(sources: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(command(sources, tmp_path, "--tensorboard", "--epochs", "1", "--teacher-epochs", "1")) == 0
    files = (tmp_path / "distilled").rglob("events.out.tfevents*")
    seen = {name for file in files for name in EventAccumulator(str(file)).Reload().Tags()["scalars"]}
    assert {"train/loss", "train/kd", "train/ce", "eval/accuracy"} <= seen


def test_other_peoples_files_are_left_alone(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "thesis.txt").write_text("mine")
    assert main(command(sources, tmp_path)) == 2
    assert "holds something that is no stage of a run" in capsys.readouterr().err
    assert (tmp_path / "teacher" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("file, content", [("stage.json", "{"), ("model.safetensors", "no weights")])
def test_a_damaged_stage_is_an_error(
    sources: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: str
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    (output / "teacher" / file).write_text(content)
    assert main(command(sources, output)) == 2
    assert "is damaged" in capsys.readouterr().err


def test_an_interrupted_run_says_that_it_can_go_on(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting.DistillationTrainer, "train", interrupt)
    assert main(command(sources, tmp_path)) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.slow
def test_from_python(sources: Path, finished: Path, tmp_path: Path) -> None:
    """What the command does, of which nothing is repeated."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    before = written(output)
    asked = KDSettings(
        task=str(sources / "task"),
        teacher=str(sources / "encoder"),
        student_layers=1,
        output=output,
        epochs=2,
        teacher_epochs=2,
        batch_size=16,
        learning_rate=0.01,
        teacher_learning_rate=0.01,
        select_on="validation",
        checkpoints=3,
    )
    report = recipes.kd(asked)
    assert not done_since(output, before)
    assert metrics(output) == metrics(finished)
    assert report.record["settings"] == {**record(finished)["settings"], "output": output}
    for name in STAGES:
        assert report.results[name]["accuracy"] == metrics(finished)[name]["accuracy"]
        rows = [row for row in str(report).split("\n") if f"│ {name}" in row]
        assert f"{100 * report.results[name]['accuracy']:.1f}" in rows[-1]
    assert report.file == output / "results.json"
    assert report.plots == ()
