"""What is given in place of a model, of scores, of data: errors that name the argument and what would be right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic

import fastdistill
from fastdistill.models.scores import Scores
from fastdistill.objectives.team import AvgKD, SampledTeacher
from fastdistill.sensitivity.units import Sensitivities
from fastdistill.training.trainer import DistillationTrainer
from tests import tiny

NONE = Scores([], [])


def meta() -> Any:
    with torch.device("meta"):
        return tiny.bert()


def collate(rows: list[Any]) -> dict[str, Any]:
    raise AssertionError("nothing is to be done before")


def batches() -> Any:
    raise AssertionError("nothing is to be done before")
    yield


def trained_by(teacher: Any) -> DistillationTrainer:
    return DistillationTrainer(model=tiny.bert(1), teacher_model=teacher, train_dataset=tiny.dataset(8))


CALLS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: fastdistill.prune(tiny.bert(), None, 0.5), TypeError, "scores is a NoneType; expected Scores"),
    (
        lambda: fastdistill.prune(tiny.bert(), Sensitivities(NONE, None), 0.5),
        TypeError,
        r"scores is a Sensitivities; .*knowledgeable\(\)",
    ),
    (
        lambda: fastdistill.prune(quantize_dynamic(tiny.bert(), {nn.Linear}), NONE, 0.5),
        ValueError,
        "model has quantized layers",
    ),
    (
        lambda: fastdistill.first_layers(quantize_dynamic(tiny.bert(), {nn.Linear}), 1),
        ValueError,
        "model has quantized layers",
    ),
    (
        lambda: fastdistill.shuffled_sharing(quantize_dynamic(tiny.bert(), {nn.Linear})),
        ValueError,
        "model has quantized layers",
    ),
    (
        lambda: fastdistill.mask_weights(tiny.bert(), None, 0.5),
        TypeError,
        "scores is a NoneType; expected WeightScores",
    ),
    (lambda: fastdistill.TeacherTeam([tiny.bert()]), TypeError, "teachers is a list; expected a dictionary of models"),
    (
        lambda: fastdistill.TeacherTeam({"a b": tiny.bert()}),
        ValueError,
        "teachers has the name 'a b'; expected a",
    ),
    (lambda: fastdistill.TeacherTeam({"a": meta()}), ValueError, r"teachers\['a'\] is on the meta device"),
    (
        lambda: SampledTeacher({"a b": 1}),
        ValueError,
        "theta has the name 'a b'; expected a text of letters, digits and",
    ),
    (lambda: SampledTeacher({1: 1}), ValueError, "theta has the name 1; expected a text of letters"),
    (lambda: AvgKD(("a b",)), ValueError, "names has 'a b'; expected a text of letters, digits and underscores"),
    (lambda: fastdistill.store(tiny.dataset(4), meta(), collate=collate), ValueError, "model is on the meta device"),
    (lambda: trained_by(meta()), ValueError, "teacher_model is on the meta device, where weights have no values"),
    (
        lambda: fastdistill.score(tiny.bert(), [(1, 2)]),
        TypeError,
        "loader gave a tuple; expected dictionaries of inputs with labels",
    ),
]


@pytest.mark.parametrize("place", range(len(CALLS)))
def test_wrong_arguments_are_named(place: int) -> None:
    call, kind, message = CALLS[place]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("score", [fastdistill.score, fastdistill.score_weights])
def test_wrong_arguments_of_scoring_are_named(score: Any) -> None:
    for arguments, kind, message in [
        ((tiny.bert(), None), TypeError, "loader is None; expected what yields dictionaries"),
        ((tiny.bert(), {"labels": 0}), TypeError, "loader is {.*; expected what yields dictionaries"),
        ((meta(), batches()), ValueError, "teacher is on the meta device, where weights have no values; expected"),
        ((tiny.bert(), batches(), meta()), ValueError, "student is on the meta device"),
        ((nn.Linear(2, 2), batches()), TypeError, "teacher is a Linear; expected a transformers.PreTrainedModel"),
        ((tiny.bert(), batches(), "student"), TypeError, "student is a str; expected a transformers.PreTrainedModel"),
    ]:
        with pytest.raises(kind, match=message):
            score(*arguments, progress=False)


def test_a_checkpoint_that_cannot_be_written_is_an_error_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"checkpoint is {tmp_path}, a folder; expected a file's name"):
        fastdistill.score(tiny.bert(), batches(), checkpoint=tmp_path)
    file = tmp_path / "no" / "file"
    with pytest.raises(ValueError, match=f"checkpoint is {file}, in a folder that is not there; expected one that is"):
        fastdistill.score(tiny.bert(), batches(), checkpoint=file)
