"""`fastdistill autoskd` with a team of encoders of different tokenizers, and a student that is none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

import fastdistill
from fastdistill.cli import main
from fastdistill.recipes import fitting
from tests import commands, tiny
from tests.records import record

OTHER = list(reversed(tiny.WORDS))
SIZES = {"first": (2, 16), "second": (3, 32), "third": (4, 16)}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of "second" and "third" have other numbers for the words than "first"; "second" is wider, too."""
    folder = tmp_path_factory.mktemp("encoders")
    tiny.task_folder(folder / "task", train=48)
    for seed, (name, (layers, width)) in enumerate(SIZES.items()):
        tiny.bert(seed, layers=layers, hidden_size=width).bert.save_pretrained(folder / name)
        tiny.tokenizer(tiny.WORDS if name == "first" else OTHER).save_pretrained(folder / name)
    return folder


def command(encoders: Path, output: Path, *more: str) -> list[str]:
    own = ("--candidates", "2", "--search-epochs", "3", "--drop", "1", "--no-plots", "--task", str(encoders / "task"))
    rates = ("--epochs", "1", "--batch-size", "16", "--teacher-epochs", "1", "--baseline-runs", "1")
    return ["autoskd", "--output", str(output), "--select-on", "validation", *own, *rates, *more]


def words(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder).get_vocab()


@pytest.fixture(scope="module")
def finished(encoders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "whole"
    rows = ("--each-teacher", "--team-chain", "--phase-1-candidates", "2", "--baselines")
    team = ",".join(str(encoders / name) for name in ("first", "second"))
    student = ("--student", str(encoders / "third"), "--student-layers", "1", "--seeds", "3")
    assert main(command(encoders, output, "--team", team, *student, *rows)) == 0
    return output


@pytest.mark.slow
def test_every_row_that_was_asked_for(finished: Path, encoders: Path) -> None:
    found = record(finished)
    rows = {"finetuned", "kd", "takd-team", "single", "avgkd", "mtbert", "autoskd", "phase-1"}
    singles = {"single-first", "single-second"}
    weakest = min(("first", "second"), key=lambda name: found["results"][name]["selection"])
    assert set(found["results"]) - {"first", "second", f"assistant-{weakest}"} == rows | singles
    assert found["team"] == ["first", "second"]
    assert found["results"]["single"] == found["results"][f"single-{found['strongest']}"]
    assert found["student_from"] == "another"
    told = found["settings"]["members"]
    assert told["second"]["from"] == str(encoders / "second") and told["second"]["teacher_epochs"] == 1
    for tried in found["candidates"]["phase-1"][0].values():
        assert min(tried["theta"].values()) > 0  # none is dropped yet
    assert 0 in found["candidates"]["autoskd"][0]["autoskd-1"]["theta"].values()


@pytest.mark.slow
def test_each_teacher_sees_its_own_tokens(finished: Path, encoders: Path) -> None:
    """What is stored is what a teacher says to the sentences as its own tokenizer has them, in the task's order."""
    sentences = [row["sentence1"] for row in tiny.rows(48, 1)]
    for name in ("first", "second"):
        model = fastdistill.from_pretrained(finished / f"team-{name}")
        assert words(finished / f"team-{name}") == words(encoders / name)
        tokens = AutoTokenizer.from_pretrained(encoders / name)(sentences, padding=True, return_tensors="pt")
        with torch.no_grad():
            wanted = model(**tokens)
        (file,) = (finished / "stored").glob(f"{name}-*.arrow")
        logits = torch.tensor(Dataset.from_file(str(file))[0:48]["_logits"])
        torch.testing.assert_close(logits, wanted.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_student_is_an_encoder_of_its_own(finished: Path, encoders: Path) -> None:
    for name in ("autoskd-1", "takd-team", "single-first"):
        student = fastdistill.from_pretrained(finished / "seed-3" / name)
        assert (student.config.num_hidden_layers, student.config.hidden_size) == (1, 16)
        assert words(finished / "seed-3" / name) == words(encoders / "third")


@pytest.mark.slow
def test_the_chain_goes_from_the_strongest_down(
    encoders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each learns what the one before says to it, in that one's tokens; and layers of a teacher are in the team."""
    seen: dict[str, torch.Tensor] = {}

    class Watched(fitting.DistillationTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            data: Any = self.train_dataset
            if "teacher_logits" in data.column_names:
                seen[Path(str(self.args.output_dir)).name] = torch.tensor(data["teacher_logits"][:])
            return super().train(*args, **kwargs)

    monkeypatch.setattr(fitting, "DistillationTrainer", Watched)
    output, second = tmp_path / "run", str(encoders / "second")
    more = ("--teacher", str(encoders / "first"), "--team", f"1,2,{second}", "--student-layers", "1", "--team-chain")
    assert main(command(encoders, output, *more)) == 0
    found = record(output)["results"]
    order = sorted(("layers_1", "layers_2", "second"), key=lambda name: found[name]["selection"], reverse=True)
    folder = {"layers_1": "team-1", "layers_2": "teacher", "second": "team-second"}[order[0]]
    sources = {"layers_1": "first", "layers_2": "first", "second": "second"}
    sentences = [row["sentence1"] for row in tiny.rows(48, 1)]
    for name, teacher in zip((*order[1:], None), (folder, *(f"assistant-{name}" for name in order[1:])), strict=True):
        tokenizer = AutoTokenizer.from_pretrained(encoders / sources[order[0]])
        model, order = fastdistill.from_pretrained(output / teacher), order[1:]
        with torch.no_grad():
            said = model(**tokenizer(sentences, padding=True, return_tensors="pt")).logits
        taught = "takd-team" if name is None else f"assistant-{name}"
        torch.testing.assert_close(seen[taught], said, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "more, message",
    [
        (("--team", "first,second"), "task is a task of text; expected --teacher and --student-layers, or --team and"),
        (("--team", "1,second", "--student", "third"), "--team has 1, layers of --teacher, which is not given"),
        (("--student", "third"), "layers of --teacher, which is not given"),
        (("--team", "first", "--student", "third"), "--team is first; expected two or more different encoders"),
        (("--team", "first,second", "--student", "third", "--teacher", "first"), "--teacher would have no effect"),
        (("--team", "first,second", "--student", "third", "--student-from", "pretrained"), "--student-from would have"),
        (("--team", "1,2", "--teacher", "first", "--student", "third", "--chain", "2,1"), "expected --team-chain"),
        (("--team", "first,second", "--student", "third", "--student-layers", "5"), "expected from 1 to 4"),
        (("--team", "first,second", "--student", "third", "--baselines", "kd,pkd"), "--baselines has pkd, of one"),
        (("--team", "first,second", "--student", "third", "--momentum", "0.5"), "--momentum is 0.5, but --optim is"),
    ],
)
def test_what_cannot_be(
    encoders: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(encoders)
    assert message in commands.refused(command(encoders, tmp_path / "run", *more), capsys)
    assert not (tmp_path / "run").exists()
