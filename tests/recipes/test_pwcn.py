"""`fastdistill pwcn` end to end."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import fastdistill
from fastdistill import recipes
from fastdistill.cli import main
from fastdistill.recipes import PWCNSettings, fitting
from fastdistill.recipes.predictions import load_predictions
from tests import tiny
from tests.commands import refused
from tests.records import record, untimed

BY_POSITION = ["lstm", "att-lstm", "pwcn-pos", "att-pwcn-pos", "point-pwcn-pos"]
GOOD, BAD, PLAIN = ("good", "great", "fine"), ("bad", "awful", "poor"), ("usual", "plain", "known")
THINGS = ("food", "service", "screen", "battery life", "price")


def rows(number: int, seed: int) -> list[dict[str, Any]]:
    """Of sentences about two things, each aspect alone: what stands before it tells its label, and what stands before
    the other tells another. Who does not know which aspect is meant is right half of the time at most."""
    draw, made = random.Random(seed), []
    while len(made) < number:
        first, second = draw.sample(THINGS, 2)
        labels = draw.sample(range(3), 2)
        words = [draw.choice((BAD, PLAIN, GOOD)[label]) for label in labels]
        text = f"{words[0]} {first} and then in the end {words[1]} {second}"
        made.append({"sentence1": text, "sentence2": first, "start": text.index(first), "label": labels[0]})
        made.append({"sentence1": text, "sentence2": second, "start": text.rindex(second), "label": labels[1]})
    return made


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "task").mkdir()
    for split, number, seed in (("train", 200, 1), ("test", 60, 2), ("validation_mismatched", 20, 3)):
        lines = (json.dumps(row) + "\n" for row in rows(number, seed))
        (folder / "task" / f"{split}.jsonl").write_text("".join(lines))
    words = [*GOOD, *BAD, *PLAIN, "food", "service"]
    tiny.model_folder(folder / "encoder", tiny.bert(vocab_size=len(tiny.SPECIAL) + len(words)).bert)
    tiny.tokenizer(words).save_pretrained(folder / "encoder")
    return folder


def command(sources: Path, output: Path, *more: str) -> list[str]:
    """Two epochs of three steps a model, unless `more` says otherwise."""
    own = ("--vectors", "random", "--hidden-size", "8", "--epochs", "2", "--no-plots")
    return ["pwcn", "--task", str(sources / "task"), "--output", str(output), *own, *more]


@pytest.fixture(scope="module")
def finished(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert main(command(sources, output)[:-1]) == 0  # with plots
    return output


def test_a_run_leaves_models_and_results(finished: Path) -> None:
    found = record(finished)
    assert list(found["results"]) == BY_POSITION
    assert (found["select_on"], found["report_on"], found["report_examples"]) == ("validation", "test", 60)
    assert found["words"] == {"all": 22, "with_vectors": 0}
    settings = found["settings"]
    assert settings["models"] == BY_POSITION and settings["learning_rate"] == 0.001
    assert "teacher" not in settings and "kd_temperature" not in settings
    for name in BY_POSITION:
        result = found["results"][name]
        assert set(result["metrics"]) == {"accuracy", "f1", "mismatched_accuracy"}
        model = fastdistill.from_pretrained(finished / name)
        assert model.config.variant == name and model.num_parameters() == result["parameters"]
        assert model.config.id2label == {0: "0", 1: "1", 2: "2"}
        labels, outputs = load_predictions(finished / name / "predictions.parquet")
        assert (outputs.argmax(1) == labels).mean() == pytest.approx(result["accuracy"])
        assert set(result.get("against", {})) == {"lstm", "pwcn-pos"} - {name}
    assert "<svg" in (finished / "models.svg").read_text()


def test_a_model_on_disk_says_what_was_reported(sources: Path, finished: Path) -> None:
    """With the tokenizer beside it, of a sentence that is new."""
    tokenizer = AutoTokenizer.from_pretrained(finished / "pwcn-pos")
    model = fastdistill.from_pretrained(finished / "pwcn-pos")
    right = 0
    for line in (sources / "task" / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        encoded = tokenizer(row["sentence1"], return_offsets_mapping=True, return_tensors="pt")
        place = next(i for i, (start, _) in enumerate(encoded["offset_mapping"][0].tolist()) if start == row["start"])
        last = place + len(row["sentence2"].split()) - 1
        distance = [max(place - i, 0, i - last) for i in range(encoded["input_ids"].shape[1])]
        with torch.no_grad():
            logits = model(encoded["input_ids"], position_distance=torch.tensor([distance]).float()).logits
        right += int(logits.argmax()) == row["label"]
    assert right / 60 == pytest.approx(record(finished)["results"]["pwcn-pos"]["accuracy"])


def test_the_table_shows_every_model(sources: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a run that is repeated trains nothing."""
    before = untimed(finished, "results")["results"]
    assert main(command(sources, finished)) == 0
    said = capsys.readouterr()
    for name in BY_POSITION:
        row = [row for row in said.out.splitlines() if row.startswith(f"│ {name} ")][-1]
        metrics = before[name]["metrics"]
        assert f"{100 * metrics['accuracy']:.1f}" in row and f"{100 * metrics['f1']:.1f}" in row
        assert f"{name}: done earlier" in said.err.replace("\n", "")
    assert "from lstm" in said.out and "from pwcn-pos" in said.out
    assert untimed(finished, "results")["results"] == before


class Cut(BaseException):
    """As a kill would, this passes by every `except Exception`."""


@pytest.mark.slow
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(
    sources: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if Path(args.output_dir).name == "pwcn-pos" and state.global_step == 5:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(fitting._ProgressBar, "on_step_end", cut)
        with pytest.raises(Cut):
            main([*command(sources, tmp_path), "--checkpoints", "3"])
    assert not (tmp_path / "results.json").exists()
    assert main(command(sources, tmp_path)) == 0
    assert record(tmp_path)["results"]["pwcn-pos"]["resumed"]
    assert untimed(tmp_path, "results") == untimed(finished, "results")


@pytest.mark.slow
def test_position_tells_what_an_lstm_cannot_know(sources: Path, tmp_path: Path) -> None:
    more = ("--models", "lstm,pwcn-pos", "--epochs", "30", "--learning-rate", "0.01", "--seeds", "0,1")
    assert main(command(sources, tmp_path, *more)) == 0
    found = record(tmp_path)["results"]
    assert max(found["lstm"]["values"]) <= 0.5 < 0.9 <= min(found["pwcn-pos"]["values"])
    assert found["pwcn-pos"]["against"]["lstm"]["verdict"] == "better"
    one, other = (fastdistill.from_pretrained(tmp_path / f"seed-{seed}" / "pwcn-pos") for seed in (0, 1))
    assert not torch.equal(one.convolution.weight, other.convolution.weight)


@pytest.mark.slow
def test_proximity_by_dependency_tree(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a parser whose trees are chains: it is then what it is by position."""

    class Chains:
        def __init__(self, name: str) -> None:
            assert name == "chains"

        def __call__(self, text: str, offsets: Any) -> list[int]:
            return [max(0, place - 1) for place in range(len(offsets))]

    monkeypatch.setattr("fastdistill.recipes.methods.pwcn.Parser", Chains)
    assert main(command(sources, tmp_path, "--parser", "chains", "--seeds", "3")) == 0
    found = untimed(tmp_path, "results")["results"]
    assert list(found) == [*BY_POSITION, "pwcn-dep"]
    for key in ("accuracy", "loss", "parameters"):
        assert found["pwcn-dep"][key] == found["pwcn-pos"][key]


@pytest.mark.slow
def test_other_ways(sources: Path, tmp_path: Path) -> None:
    """Vectors of a file, which stay as they are unless they are to learn, and of an encoder; a grid of rates."""
    (tmp_path / "glove.txt").write_text("good 1 0 2\nbad -1 0 2\n")
    shared = ("--models", "point-pwcn-pos", "--form", "released", "--early-stopping", "1", "--debug-gradients")
    options = ("--vectors", str(tmp_path / "glove.txt"), "--learning-rate-grid", "0.01,0.001")
    assert main(command(sources, tmp_path / "file", *shared, *options)) == 0
    found = record(tmp_path / "file")
    assert found["words"]["with_vectors"] == 2
    model = fastdistill.from_pretrained(tmp_path / "file" / "point-pwcn-pos-0.01-64")
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "file" / "point-pwcn-pos-0.01-64").get_vocab()
    assert model.get_input_embeddings().weight[vocabulary["good"]].tolist() == [1, 0, 2]
    more = ("--vectors", str(tmp_path / "glove.txt"), "--train-vectors")
    assert main(command(sources, tmp_path / "learned", *shared, *more)) == 0
    learned = fastdistill.from_pretrained(tmp_path / "learned" / "point-pwcn-pos")
    assert learned.get_input_embeddings().weight[vocabulary["good"]].tolist() != [1, 0, 2]
    assert main(command(sources, tmp_path / "encoder", *shared, "--vectors", str(sources / "encoder"))) == 0
    assert record(tmp_path / "encoder")["words"]["with_vectors"] == 11
    of_encoder = fastdistill.from_pretrained(tmp_path / "encoder" / "point-pwcn-pos").get_input_embeddings().weight
    assert of_encoder.shape == (22, 16) and sum(row.any() for row in of_encoder) == 11


def test_from_python(sources: Path, finished: Path, tmp_path: Path) -> None:
    """What the command does."""
    asked = PWCNSettings(
        task=str(sources / "task"),
        output=tmp_path,
        vectors="random",
        hidden_size=8,
        epochs=2,
        models=["pwcn-pos"],  # type: ignore[arg-type]
        no_plots=True,
    )
    report = recipes.pwcn(asked)
    theirs = untimed(finished, "results")["results"]["pwcn-pos"]
    assert report.results["pwcn-pos"]["metrics"] == theirs["metrics"]
    assert asked.models == ("pwcn-pos",)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--models", "pwcn-dep"], "--models has pwcn-dep; expected --parser"),
        (["--models", "pwcn-pos", "--parser", "p"], "--parser would have no effect"),
        (["--models", "rnn"], "'rnn' is not among lstm, att-lstm"),
        (["--models", "lstm", "--form", "released"], "--form would have no effect"),
        (["--train-vectors"], "--train-vectors would have no effect"),
        (["--teacher", "minilm"], "unrecognized arguments: --teacher minilm"),
        (["--dropout", "1"], "1 is not a finite number"),
        (["--parser", "nowhere"], "--parser"),
        (["--vectors", "./nowhere"], "nowhere is not there; expected"),
        (["--task", "docstrings"], "docstrings is a task without aspects"),
        (["--report-on", "test", "--task", "{}/alone.jsonl"], "has no labelled test split"),
        (["--task", "{}/scores.jsonl"], "has no classes, one an example"),
        (["--task", "{}/task/nowhere"], "is no file, no folder"),
        (["--learning-rate", "1", "--learning-rate-grid", "1,2"], "--learning-rate would have no effect"),
    ],
)
def test_what_cannot_be_is_refused(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    (sources / "alone.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(30, 3)))
    numbers = (json.dumps(row | {"label": row["label"] + 0.5}) + "\n" for row in rows(30, 3))
    (sources / "scores.jsonl").write_text("".join(numbers))
    more = [option.format(sources) for option in options]
    assert message in refused(command(sources, tmp_path / "run", *more), capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, value", [("teacher", "minilm"), ("baselines", True), ("chain", (3, 2))])
def test_settings_that_mean_nothing_here_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*, for which PWCNSettings has no use"):
        PWCNSettings(task="t", output="o", **{name: value})
