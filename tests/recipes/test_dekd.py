"""`fastdistill dekd` end to end; tests/objectives/test_dekd.py has the objective."""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fastdistill.cli import main
from fastdistill.models.students import first_layers
from fastdistill.recipes import fitting, stages
from fastdistill.recipes.methods.dekd import variants_of
from fastdistill.recipes.report import against
from fastdistill.recipes.settings import DeKDSettings
from fastdistill.recipes.settings.arguments import add_arguments, from_arguments
from tests import commands
from tests.records import done_since, record, untimed, written

ENCODER = {"layers": 4}


def command(sources: Path, output: Path, *more: str, task: str = "task") -> list[str]:
    """One epoch of three steps a stage, unless `more` says otherwise."""
    return commands.command("dekd", sources, output, "--student-layers", "1", *more, task=task)


def model(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


EVERYTHING = (
    "--baselines", "--chain", "4,3,2,1", "--seeds", "0,7", "--without", "ds", "--without", "ta,doa",
)  # fmt: skip
STUDENTS = ("finetuned", "kd", "takd", "dekd", "dekd-without-ds", "dekd-without-ta-doa")


@pytest.mark.slow
def test_a_run_trains_all_that_was_asked_for(finished: Path) -> None:
    found = record(finished)["results"]
    assert list(found) == ["teacher", "assistant-2", "assistant-3", "assistant-3-2", *STUDENTS]
    layers = {"teacher": 4, "assistant-2": 2, "assistant-3": 3, "assistant-3-2": 2}
    assert {name: model(finished / name).config.num_hidden_layers for name in layers} == layers
    for name in STUDENTS:
        for seed in (0, 7):
            assert model(finished / f"seed-{seed}" / name).config.num_hidden_layers == 1
        values = found[name]["values"]
        assert found[name]["accuracy"] == pytest.approx(statistics.mean(values))
        assert found[name]["spread"] == pytest.approx(statistics.stdev(values))
    ends = [model(finished / f"seed-{seed}" / "dekd").state_dict() for seed in (0, 7)]
    assert not torch.equal(ends[0]["classifier.weight"], ends[1]["classifier.weight"])


@pytest.mark.slow
def test_each_student_has_its_objective(finished: Path) -> None:
    said = record(finished)["settings"]["objectives"]
    assert "ratio=0.5" in said["dekd"]
    assert all(text in said["dekd"] for text in ("temperature=5.0", "ce_weight=0.5", "ta_weight=0.3", "da_weight=0.2"))
    assert "ratio=1.0" in said["dekd-without-ds"]
    assert all(text in said["dekd-without-ta-doa"] for text in ("assistant=False", "da_weight=0.0", "ratio=0.5"))


@pytest.mark.slow
def test_the_table_has_spreads(sources: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = untimed(finished, "results")
    found = before["results"]["dekd"]
    assert main(command(sources, finished, *EVERYTHING)) == 0
    said = capsys.readouterr()
    differences, row = [line for line in said.out.splitlines() if " dekd " in line]
    assert f"{100 * found['accuracy']:.1f} ± {100 * found['spread']:.1f}" in row
    assert all(against(found, reference) in differences for reference in ("kd", "finetuned"))
    assert "dekd: done earlier" in said.err.replace("\n", "")
    assert untimed(finished, "results") == before


@pytest.mark.slow
def test_plots_are_drawn(finished: Path) -> None:
    assert {path.name for path in finished.glob("*.svg")} == {"entropy.svg", "layers.svg"}
    assert all("<svg" in path.read_text() for path in finished.glob("*.svg"))


@pytest.mark.slow
def test_who_teaches_whom(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What teachers say has been stored before."""
    begun: dict[str, Any] = {}
    stored: dict[str, Any] = {}
    store = stages.store

    def watched(dataset: Any, model: Any, **options: Any) -> Any:
        stored[options["name"]] = model
        return store(dataset, model, **options)

    class Watched(fitting.DistillationTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            teachers = {**stored, **self.teachers}
            stored.clear()
            begun[Path(self.args.output_dir).name] = (
                {name: teacher.config.num_hidden_layers for name, teacher in teachers.items()},
                {name: value.clone() for name, value in self.model.state_dict().items()},
            )
            return super().train(*args, **kwargs)

    monkeypatch.setattr(stages, "store", watched)
    monkeypatch.setattr(fitting, "DistillationTrainer", Watched)
    monkeypatch.setattr(fitting, "can_compact", lambda model: False)  # so that states have all embeddings
    assert main(command(sources, tmp_path, "--chain", "2,1", "--baselines", "--without", "ta", "--no-plots")) == 0
    assert {name: depths for name, (depths, _) in begun.items()} == {
        "teacher": {},
        "assistant-2": {"teacher": 4},
        "finetuned": {},
        "kd": {"teacher": 4},
        "takd": {"teacher": 2},
        "dekd": {"teacher": 4, "assistant": 2},
        "dekd-without-ta": {"teacher": 4},
    }
    teacher = model(tmp_path / "teacher")
    for name, (_, weights) in begun.items():
        if name != "teacher":
            start = first_layers(teacher, 2 if name == "assistant-2" else 1).state_dict()
            torch.testing.assert_close(weights, start, rtol=0, atol=0)
    assert not list(tmp_path.glob("*.svg"))


class Cut(BaseException):
    """As a kill would, this passes by every `except Exception`."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, options",
    [
        ("assistant-2", ()),
        ("dekd", ()),
        ("dekd", ("--select-per", "epoch", "--ce-on", "selected")),
    ],
)
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, options: tuple[str, ...]
) -> None:
    options = (*options, "--epochs", "2", "--checkpoints", "3", "--no-plots")
    assert main(command(sources, tmp_path / "whole", *options)) == 0
    shutil.copytree(tmp_path / "whole" / "teacher", tmp_path / "cut" / "teacher")

    def cut(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if Path(args.output_dir).name == stage and state.global_step == 5:  # of six, in the second epoch
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(fitting._ProgressBar, "on_step_end", cut)
        with pytest.raises(Cut):
            main(command(sources, tmp_path / "cut", *options))
    assert list((tmp_path / "cut").rglob("checkpoint-4"))
    assert main(command(sources, tmp_path / "cut", *options)) == 0
    assert untimed(tmp_path / "cut", "results") == untimed(tmp_path / "whole", "results")
    seed = "seed-0"
    ours, theirs = (model(tmp_path / run / seed / "dekd").state_dict() for run in ("cut", "whole"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, again",
    [
        (("--ratio", "0.25"), {"dekd"}),
        (("--kd-temperature", "3"), {"assistant-2", "kd", "dekd"}),
        (("--assistant-layers", "3"), {"dekd"}),
        (("--select-per", "epoch"), {"dekd"}),
        (("--unscaled",), {"dekd"}),
        (("--over-layers", "mean"), {"dekd"}),
        (("--early-stopping", "2"), {"teacher", "assistant-2", "finetuned", "kd", "dekd"}),
        (("--align-layers", "1"), {"dekd"}),
        (("--label-smoothing", "0.1"), {"assistant-2", "finetuned", "kd", "dekd"}),
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
    assert main(command(sources, output, "--baselines", "--no-plots", *change)) == 0
    assert done_since(output, before) == again


@pytest.mark.slow
def test_ratios_and_strategies(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--ratio", "0.25,1", "--strategy", "margin,random", "--assistant-layers", "0", "--without", "ds")
    assert main(command(sources, tmp_path, *options)) == 0
    found = record(tmp_path)
    names = ["teacher", "dekd-margin-0.25", "dekd-1", "dekd-random-0.25", "dekd-without-ds"]
    assert list(found["results"]) == names  # with a ratio of 1 strategies are one
    assert "strategy='random'" in found["settings"]["objectives"]["dekd-random-0.25"]
    drawn = (tmp_path / "ratios.svg").read_text()
    assert "<svg" in drawn
    assert "spread" not in found["results"]["dekd-1"]  # there is one seed


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--ta-weight", "0"), ("--assistant-layers", "0", "--student-layers", "3")])
def test_without_an_assistant_none_is_trained(sources: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """Between three layers and four there can be none."""
    assert main(command(sources, tmp_path, *options, "--no-plots")) == 0
    found = record(tmp_path)
    assert list(found["results"]) == ["teacher", "dekd"]
    assert ("assistant=False" in found["settings"]["objectives"]["dekd"]) == ("--assistant-layers" in options)


def variants(*options: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_arguments(parser, DeKDSettings)
    return variants_of(from_arguments(DeKDSettings, parser.parse_args(command(Path(), Path(), *options)[1:])))


def test_variants_are_called_by_exact_names() -> None:
    assert list(variants("--ratio", "0.3333333,0.3333334")) == ["dekd-entropy-0.3333333", "dekd-entropy-0.3333334"]
    assert {name: one.strategy for name, one in variants("--strategy", "entropy,random", "--ratio", "1").items()} == {
        "dekd-1": "entropy"
    }
    found = variants("--without", "ta,ds", "--without", "doa,ds,ta")
    assert list(found) == ["dekd", "dekd-without-ds-ta", "dekd-without-ds-ta-doa"]
    assert (found["dekd-without-ds-ta"].ratio, found["dekd-without-ds-ta"].assistant) == (1.0, False)
    assert not variants("--without", "ta")["dekd-without-ta"].assistant
    assert variants("--without", "doa")["dekd-without-doa"].da_weight == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, columns",
    [
        (("--da-weight", "0"), {"teacher_logits", "assistant_logits"}),
        (("--store-hidden-states",), {"teacher_logits", "teacher_hidden_states", "assistant_logits"}),
        (
            ("--store-hidden-states", "--select-per", "epoch", "--assistant-layers", "0"),
            {"teacher_logits", "teacher_hidden_states"},
        ),
    ],
)
def test_stored_outputs_stand_for_the_teachers(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], columns: set[str]
) -> None:
    """No teacher runs in the students' steps, and they learn the same."""
    options = (*options, "--epochs", "2", "--no-plots")
    taught: list[tuple[Any, set[str]]] = []

    class Watched(fitting.DistillationTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            if Path(self.args.output_dir).name == "dekd":
                taught.append((self.teachers, {name for name in self.train_dataset.column_names if "_" in name}))
            return super().train(*args, **kwargs)

    monkeypatch.setattr(fitting, "DistillationTrainer", Watched)
    assert main(command(sources, tmp_path / "stored", *options)) == 0
    shown = {"input_ids", "attention_mask", "token_type_ids"}
    assert [(models, names - shown) for models, names in taught] == [({}, columns)]
    shutil.copytree(tmp_path / "stored", tmp_path / "live")
    shutil.rmtree(tmp_path / "live" / "seed-0" / "dekd")
    with monkeypatch.context() as patch:
        patch.setattr(stages.Stages, "_taught", lambda self, training: (self.examples.train, training.teacher))
        assert main(command(sources, tmp_path / "live", *options)) == 0
    assert len(taught[-1][0]) == (1 if "--assistant-layers" in options else 2)
    ours, theirs = (model(tmp_path / run / "seed-0" / "dekd").state_dict() for run in ("stored", "live"))
    for weights in (ours, theirs):
        for name in [name for name in weights if name.endswith("key.bias")]:
            weights.pop(name)  # changes no output: its gradient is rounding alone, which Adam makes steps of
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_without_matplotlib_plots_are_refused_at_once(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastdistill.recipes import plots

    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    assert main(command(sources, tmp_path / "run")) == 2
    assert "pip install 'fastdistill[bench]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_matplotlib_is_imported_only_to_plot(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    assert main(command(sources, tmp_path, "--no-plots")) == 0
    assert "matplotlib" not in sys.modules


@pytest.mark.parametrize(
    "options, message",
    [
        (["--ratio", "0"], "argument --ratio: 0 is not a finite number above 0 and at most 1"),
        (["--ratio", "0.5,2"], "argument --ratio: 2 is not a finite number above 0 and at most 1"),
        (["--ratio", "0.5,0.5"], "argument --ratio: 0.5,0.5 has a value twice"),
        (
            ["--strategy", "entropy,energy"],
            "argument --strategy: 'energy' is not among entropy, least_confidence, margin",
        ),
        (["--without", "dx"], "argument --without: 'dx' is not among ds, ta, doa"),
        (["--seeds", "1,"], "argument --seeds: invalid list of integers value: '1,'"),
        (["--ratio", "1", "--without", "ds"], "--without ds changes nothing"),
        (["--ta-weight", "0", "--without", "ta"], "--without ta changes nothing"),
        (["--da-weight", "0", "--without", "doa"], "--without doa changes nothing"),
        (["--ta-weight", "0", "--da-weight", "0"], "ta_weight and da_weight are both 0"),
        (["--da-weight", "0", "--align-layers", "1"], "layers is 1 but da_weight is 0"),
        (["--da-weight", "0", "--store-hidden-states"], "--store-hidden-states is given, but --da-weight is 0"),
        (["--ta-weight", "0", "--temperature", "3"], "temperature is 3.0 but ta_weight is 0"),
        (["--ta-weight", "0", "--unscaled"], "scale_by_temperature is False but ta_weight is 0"),
        (["--ta-weight", "0", "--kd-temperature", "3"], "--kd-temperature is 3, but no model learns by plain"),
        (["--assistant-layers", "0", "--kd-temperature", "3"], "--kd-temperature is 3, but no model learns by plain"),
        (["--ce-weight", "0", "--ce-on", "selected"], "ce_on is 'selected' but ce_weight is 0"),
        (
            ["--ce-weight", "0", "--assistant-layers", "0", "--label-smoothing", "0.1"],
            "--label-smoothing is 0.1, but no student learns labels",
        ),
        (["--without", "ds,ta", "--without", "ta,ds"], "--without ta,ds is given twice"),
        (["--without", "ds", "--without", "ds"], "--without ds is given twice"),
        (["--assistant-layers", "0", "--without", "ta"], "--without ta changes nothing"),
        (["--align-layers", "2"], "--align-layers is 2; the student has 1"),
        (["--student-layers", "5"], "--student-layers is 5; the teacher has 4"),
        (
            ["--student-layers", "3"],
            "more layers than the student's 3 and fewer than the teacher's 4, not 3; --assistant-layers 0 is for no",
        ),
        (["--assistant-layers", "4"], "more layers than the student's 1 and fewer than the teacher's 4, not 4"),
        (["--ta-weight", "0", "--assistant-layers", "2"], "--assistant-layers is given, but --ta-weight is 0"),
        (["--ta-weight", "0", "--assistant-layers", "0"], "--assistant-layers is given, but --ta-weight is 0"),
        (["--chain", "4,1"], "--chain is 4,1; expected falling numbers of layers below the teacher's 4, two or more"),
        (["--chain", "4,3,2"], "--chain is 4,3,2; expected"),
        (["--chain", "2,3,1"], "--chain is 2,3,1; expected"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert message in commands.refused(command(sources, tmp_path / "run", *options), capsys)
    assert not (tmp_path / "run").exists()  # nothing was begun


def test_scores_are_no_classes(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(sources, tmp_path / "run", task="scores")) == 2
    assert "scores is regression: there are no classes to be uncertain of" in capsys.readouterr().err
