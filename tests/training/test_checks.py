"""Configurations, and what does not go together."""

from __future__ import annotations

import copy
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from transformers import HfArgumentParser, TrainingArguments

from fastdistill import MSE, PKD, DistillationConfig, LogitsKD
from fastdistill.objectives.logits import TaskLoss
from tests import tiny
from tests.training.trained import bert_trainer, vit


def test_the_configuration_is_training_arguments_with_batches_of_similar_length(tmp_path: Path) -> None:
    (parsed,) = HfArgumentParser(DistillationConfig).parse_args_into_dataclasses(["--output_dir", str(tmp_path)])
    assert parsed.train_sampling_strategy == "group_by_length"
    own = {f.name for f in fields(DistillationConfig)} - {f.name for f in fields(TrainingArguments)}
    assert own == {"read_lengths", "cuda_graphs", "min_save_seconds"}
    assert not parsed.logging_nan_inf_filter
    changed = ("train_sampling_strategy", "logging_nan_inf_filter", *own)
    assert all(f.metadata.get("help") for f in fields(DistillationConfig) if f.name in changed)


def test_plain_training_arguments_serve(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, save_strategy="no", disable_tqdm=True)
    assert math.isfinite(bert_trainer(tmp_path, args=args).train().training_loss)


def stored(width: int) -> Any:
    data = tiny.dataset(8)
    return data.add_column("teacher_logits", [[0.0] * width] * len(data))


def shares_embeddings() -> dict[str, Any]:
    student, teacher = tiny.bert(1), copy.deepcopy(tiny.bert(1))
    teacher.bert.embeddings = student.bert.embeddings
    return {"model": student, "teacher_model": teacher}


def named(*names: str) -> nn.Module:
    return tiny.bert(2, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


class NoStates(nn.Module):
    def forward(self, input_ids: Tensor) -> Any: ...


@pytest.mark.parametrize(
    "options, error, message",
    [
        (lambda: {"teacher_model": tiny.bert(2, num_labels=3)}, ValueError, "teacher_model has 3 labels but model"),
        (
            lambda: {"model": named("no", "yes"), "teacher_model": named("yes", "no")},
            ValueError,
            "teacher_model.config.id2label has 'yes' at 0 but model.config.id2label at 1",
        ),
        (
            lambda: {"model": named("No", "Yes"), "teacher_model": named("YES", "maybe")},
            ValueError,
            "id2label has 'YES' at 0",
        ),
        (lambda: {"teacher_model": tiny.bert(2, vocab_size=99)}, ValueError, "teacher_model has a vocabulary of 99"),
        (lambda: {"teacher_model": vit(2)}, ValueError, "teacher_model takes pixel_values but model takes input_ids"),
        (shares_embeddings, ValueError, "teacher_model shares parameters with model"),
        (lambda: {"teacher_model": None}, ValueError, "teacher_model is None and train_dataset has no column"),
        (lambda: {"teacher_model": 3}, TypeError, "teacher_model is a int"),
        (
            lambda: {"model": nn.Linear(2, 2), "teacher_model": "somewhere"},
            TypeError,
            "teacher_model is 'somewhere', but what to load it as beside a Linear is not known",
        ),
        (
            lambda: {"objective": TaskLoss()},
            ValueError,
            r"teacher_model is given but objective TaskLoss\(label_smoothing=0.0\) uses no teacher",
        ),
        (lambda: {"objective": MSE()}, ValueError, r"objective is MSE\(.*\), for one output, but model has 2"),
        (
            lambda: {"model": tiny.bert(1, num_labels=1), "objective": LogitsKD()},
            ValueError,
            r"objective is LogitsKD\(.*\), for classes, but model has one output",
        ),
        (lambda: {"objective": 3}, TypeError, "objective is 3"),
        (
            lambda: {"objective": PKD(), "train_dataset": stored(2)},
            ValueError,
            "needs the teacher's hidden states, but the teacher is not run where train_dataset has the column",
        ),
        (
            lambda: {"objective": PKD(), "teacher_model": NoStates()},
            ValueError,
            "teacher_model is a NoStates, whose forward takes no output_hidden_states",
        ),
        (
            lambda: {"train_dataset": stored(3), "teacher_model": None},
            ValueError,
            "train_dataset has 3 teacher_logits an example but model 2 labels",
        ),
        (lambda: {"compute_loss_func": print}, ValueError, "compute_loss_func would be ignored"),
        (lambda: {"args_label_smoothing_factor": 0.1}, ValueError, "args.label_smoothing_factor is 0.1"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_named(tmp_path: Path, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bert_trainer(tmp_path, **options())


@pytest.mark.parametrize(
    "student, teacher",
    [
        (("no", "yes"), ("No", "YES")),
        (("no", "yes"), ("LABEL_0", "LABEL_1")),
        (("bad", "good"), ("negative", "positive")),
    ],
)
def test_labels_in_one_order_go_together(tmp_path: Path, student: Any, teacher: Any) -> None:
    assert bert_trainer(tmp_path, named(*student), teacher_model=named(*teacher)).teacher_model is not None


def test_the_tokenizers_are_compared_where_the_teachers_is_beside_it(tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "teacher", tiny.bert(2))
    assert bert_trainer(tmp_path, teacher_model=folder).teacher_model is not None
    # more rows of embeddings than tokens, as for a rounded size, do not matter
    padded = tiny.model_folder(tmp_path / "padded", tiny.bert(2, vocab_size=96))
    assert bert_trainer(tmp_path, teacher_model=padded).teacher_model is not None
    swapped = tiny.tokenizer([tiny.WORDS[1], tiny.WORDS[0], *tiny.WORDS[2:]])
    for teacher in (folder, tiny.bert().from_pretrained(folder)):  # as many tokens, in another order
        with pytest.raises(ValueError, match=r"processing_class has token 'ba' at 6 but teacher_model's tokenizer"):
            bert_trainer(tmp_path, teacher_model=teacher, processing_class=swapped)


def test_a_teacher_without_a_trained_head_is_an_error(tmp_path: Path) -> None:
    tiny.bert(2).bert.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"has no weights for classifier.bias, classifier.weight"):
        bert_trainer(tmp_path, teacher_model=tmp_path / "encoder")
