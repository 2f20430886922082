"""Rates by width, and what students begin as."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill import first_layers, from_pretrained
from fastdistill.cli import main
from fastdistill.models.drawing import draw_anew
from fastdistill.recipes import KDSettings, fitting
from fastdistill.recipes.begin import begin
from tests import commands, tiny
from tests.records import record

ENCODER = {"layers": 3}


@pytest.mark.parametrize("whose", ["teacher", "pretrained"])
def test_both_students_begin_as_the_same_first_layers(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], whose: str
) -> None:
    """And see the same batches in the same order. The table says what they are."""
    begun, seen = {}, {}
    compute = fitting.DistillationTrainer.compute_loss

    def watched(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        name = Path(self.args.output_dir).name
        begun.setdefault(name, {key: value.clone() for key, value in model.state_dict().items()})
        seen.setdefault(name, []).append(inputs["input_ids"].clone())
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(fitting.DistillationTrainer, "compute_loss", watched)
    monkeypatch.setattr(fitting, "can_compact", lambda model: False)  # so that states have all embeddings
    options = ("--student-from", "pretrained", "--debug-gradients") if whose == "pretrained" else ()
    assert main(commands.kd(sources, tmp_path / "run", "--epochs", "1", "--teacher-epochs", "1", *options)) == 0
    asked = KDSettings(task=str(sources / "task"), teacher=str(sources / "encoder"), student_layers=1, output="o")
    source = from_pretrained(tmp_path / "run" / "teacher") if whose == "teacher" else begin(asked).pretrained
    student = first_layers(source, 1)
    draw_anew(student, seed=0)
    for name in ("finetuned", "distilled"):
        torch.testing.assert_close(begun[name], student.state_dict(), rtol=0, atol=0)
    found, said = record(tmp_path / "run"), " ".join(capsys.readouterr().out.split())
    of = {"teacher": "fine-tuned teacher", "pretrained": "pretrained encoder"}[whose]
    assert f"cut of the {of}" in said
    assert (found["student_from"], found["settings"]["student_from"]) == (whose, whose)
    assert (found["select_on"], found["report_on"], found["report_examples"]) == ("validation", "validation", 24)
    if options:
        assert {name: set(terms) for name, terms in found["gradients"].items()} == {
            "teacher": {"loss"},
            "finetuned": {"loss"},
            "distilled": {"kd", "ce"},
        }
        assert "gradients before the first step" in said
    assert len(seen["finetuned"]) == len(seen["distilled"])
    assert all(map(torch.equal, seen["finetuned"], seen["distilled"]))


@pytest.mark.slow
def test_each_seed_draws_a_head_of_its_own(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for all students of that seed; all else is pretrained."""
    begun: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    compute = fitting.DistillationTrainer.compute_loss

    def watched(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        *_, seed, name = Path(self.args.output_dir).parts
        begun.setdefault((seed, name), {key: value.clone() for key, value in model.state_dict().items()})
        return compute(self, model, *args, **kwargs)

    monkeypatch.setattr(fitting.DistillationTrainer, "compute_loss", watched)
    monkeypatch.setattr(fitting, "can_compact", lambda model: False)
    options = ("--student-from", "pretrained", "--seeds", "3,4", "--epochs", "0.2", "--teacher-epochs", "0.2")
    assert main(commands.kd(sources, tmp_path / "run", *options)) == 0
    same = [
        torch.equal(begun["seed-3", "distilled"][name], other) for name, other in begun["seed-4", "distilled"].items()
    ]
    heads = [name.startswith("classifier.weight") for name in begun["seed-4", "distilled"]]
    assert [not head for head in heads] == same
    for seed in ("seed-3", "seed-4"):
        torch.testing.assert_close(begun[seed, "finetuned"], begun[seed, "distilled"], rtol=0, atol=0)


@pytest.mark.parametrize("width, rates", [(16, (3e-4, 1e-4)), (768, (7.5e-5, 2.5e-5))])
def test_wide_encoders_learn_slower(sources: Path, tmp_path: Path, width: int, rates: tuple[float, float]) -> None:
    tiny.model_folder(tmp_path, tiny.bert(layers=1, hidden_size=width).bert)
    asked = KDSettings(task=str(sources / "task"), teacher=str(tmp_path), student_layers=1, output="o")
    found = begin(asked)
    assert (found.learning_rate, found.teacher_learning_rate) == pytest.approx(rates)
    found = begin(replace(asked, learning_rate=0.1))
    assert (found.learning_rate, found.teacher_learning_rate) == pytest.approx((0.1, rates[1]))
    assert asked.learning_rate is None


@pytest.mark.parametrize(
    "labels, said, refusal",
    [
        (("0", "1"), "is a classifier of task already; taken as it is", None),
        (("LABEL_0", "LABEL_1"), "is fine-tuned on them for 2 epochs; --teacher-epochs 0 takes it as it is", None),
        (("bad", "good"), "is a classifier of bad, good, and task's labels are 0, 1: it is fine-tuned", None),
        (("a", "b", "c"), "is fine-tuned on them for 2 epochs\n", "is a classifier of a, b, c; expected one of task's"),
        (None, "", "is no classifier; expected one of task's labels, 0, 1, in this order"),
    ],
)
def test_what_is_done_to_a_teacher_is_told(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], labels: Any, said: str, refusal: str | None
) -> None:
    names = dict(enumerate(labels or "ab"))
    model: Any = tiny.bert(layers=1, id2label=names, label2id={name: place for place, name in names.items()})
    tiny.model_folder(tmp_path, model if labels else model.bert)
    asked = KDSettings(task=str(sources / "task"), teacher=str(tmp_path), student_layers=1, output="o")
    begin(asked)
    printed = capsys.readouterr().out
    assert said in printed and ("teacher:" in printed) == bool(said)
    if refusal is None:
        assert begin(replace(asked, teacher_epochs=0.0)).teacher_epochs == 0
    else:
        with pytest.raises(ValueError, match=refusal):
            begin(replace(asked, teacher_epochs=0.0))


def test_that_labels_are_numbers_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What pandas writes of classes in a column with a gap, 0.0 and 1.0, is a regression."""
    tiny.model_folder(tmp_path / "encoder", tiny.bert(layers=1).bert)
    task = tiny.task_folder(tmp_path / "scores", regression=True)
    begin(KDSettings(task=str(task), teacher=str(tmp_path / "encoder"), student_layers=1, output="o"))
    assert "its labels are numbers with decimals: a regression" in capsys.readouterr().out
