from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithPadding
from transformers.modeling_outputs import SequenceClassifierOutput

import fastdistill
from fastdistill.models.loading import load_classifier
from fastdistill.objectives.team import AvgKD
from fastdistill.teachers.outputs import TeacherOutputs
from fastdistill.training.trainer import DistillationTrainer
from tests import tiny
from tests.training.trained import bert_trainer


def trainer(folder: Path, data: Any = None, **options: Any) -> DistillationTrainer:
    settings = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 100}
    given = {"args": tiny.config(folder, **settings), "processing_class": tiny.tokenizer()}
    data = tiny.dataset(24) if data is None else data
    return DistillationTrainer(model=tiny.bert(1, layers=1), train_dataset=data, **given, **options)


def stored(row: int, name: str = "teacher") -> Any:
    """Logits of which those of one row are NaN."""
    logits = np.zeros((24, 2))
    logits[row, 1] = np.nan
    return tiny.dataset(24).add_column(f"{name}_logits", logits.tolist())


def broken(weight: str = "bert.encoder.layer.1.output.dense.weight") -> Any:
    model = tiny.bert(2)
    with torch.no_grad():
        model.get_parameter(weight)[3, 0] = torch.nan
    return model


def test_a_teacher_with_nan_weights_is_named(tmp_path: Path) -> None:
    message = "has NaN or infinity in bert.encoder.layer.1.output.dense.weight; expected numbers"
    with pytest.raises(ValueError, match=f"teacher_model {message}"):
        trainer(tmp_path, teacher_model=broken())
    broken().save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=f"{tmp_path}/teacher {message}"):
        load_classifier(str(tmp_path / "teacher"), tiny.TASK)


def test_a_stored_row_that_is_nan_is_named(tmp_path: Path) -> None:
    """Before a student that learned of it is saved."""
    with pytest.raises(ValueError, match="train_dataset has NaN in row 17 of 'teacher_logits'; expected numbers"):
        trainer(tmp_path, stored(17)).train()
    assert not list(tmp_path.glob("checkpoint-6"))


def test_of_a_team_it_is_the_one(tmp_path: Path) -> None:
    data = stored(3, "b").add_column("a_logits", [[0.0, 1.0]] * 24)
    with pytest.raises(ValueError, match="train_dataset has NaN in row 3 of 'b_logits'"):
        trainer(tmp_path, data, objective=AvgKD(("a", "b"))).train()


def test_a_teacher_that_gives_nan_is_named_though_its_weights_are_numbers(tmp_path: Path) -> None:
    teacher = tiny.bert(2)
    teacher.register_forward_hook(lambda *_: SequenceClassifierOutput(logits=torch.full((8, 2), torch.nan)))
    with pytest.raises(ValueError, match="teacher_model gave NaN; expected numbers"):
        trainer(tmp_path, teacher_model=teacher).train()


def test_a_row_that_does_not_count_may_be_nan(tmp_path: Path) -> None:
    data = stored(17)
    labels = [label if row != 17 else -100 for row, label in enumerate(data["labels"])]
    made = trainer(tmp_path, data.remove_columns("labels").add_column("labels", labels))
    made.train()
    assert all(weight.isfinite().all() for weight in made.model.parameters())


def test_nothing_waits_for_the_device() -> None:
    """A tensor on the meta device has no values to wait for: asking for one is an error."""
    logits = torch.empty(3, 2, device="meta")
    outputs = TeacherOutputs(None, {}, stored=SequenceClassifierOutput(logits=logits))
    assert outputs.run().logits.shape == (3, 2)
    assert outputs.rows(torch.empty(2, dtype=torch.long, device="meta")).logits.shape == (2, 2)
    assert outputs.is_nan is not None
    assert outputs.is_nan.is_meta


def test_what_a_teacher_says_is_checked_before_it_is_stored(tmp_path: Path) -> None:
    model, data = tiny.bert(2), tiny.dataset(24)
    token = data["input_ids"][9][1]
    first = next(row for row, ids in enumerate(data["input_ids"]) if token in ids)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[token] = torch.nan
    collate = DataCollatorWithPadding(tiny.tokenizer())
    message = rf"teacher \(BertForSequenceClassification\) says NaN or infinity to row {first} of dataset"
    with pytest.raises(ValueError, match=message):
        fastdistill.store(data, model, collate=collate, cache_file=tmp_path / "x.arrow")
    assert not list(tmp_path.glob("*.arrow"))


@pytest.mark.parametrize("score", [fastdistill.score, fastdistill.score_weights])
def test_scores_of_a_broken_model_are_an_error(score: Any) -> None:
    rows = tiny.dataset(8).remove_columns("length")
    loader = [DataCollatorWithPadding(tiny.tokenizer())(list(rows))]
    with pytest.raises(ValueError, match="teacher has NaN or infinity in bert.encoder.layer.1.output.dense.weight"):
        score(broken(), loader, progress=False)
    with pytest.raises(ValueError, match="student has NaN or infinity in bert.encoder.layer.1.output.dense.weight"):
        score(tiny.bert(1), loader, broken(), progress=False)


def test_a_loss_that_is_no_number_is_logged_as_it_is(tmp_path: Path) -> None:
    """To look for one, the host would wait for the device in each step."""

    def of_nothing(student: Any, teacher: Any, labels: Any) -> torch.Tensor:
        return student.logits.sum() * torch.inf

    t = bert_trainer(tmp_path, objective=of_nothing, args_max_steps=1, args_logging_steps=1)
    t.train()
    assert not np.isfinite(t.state.log_history[0]["loss"])


def test_copies_of_batches_wait_for_nothing_unless_it_is_said(tmp_path: Path) -> None:
    def non_blocking(**options: Any) -> bool:
        return bool(bert_trainer(tmp_path, **options).accelerator.dataloader_config.non_blocking)

    assert non_blocking(args_dataloader_pin_memory=True) is not torch.backends.mps.is_available()
    assert not non_blocking(args_dataloader_pin_memory=False)
    assert not non_blocking(args_dataloader_pin_memory=True, args_accelerator_config={"non_blocking": False})
