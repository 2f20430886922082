"""What cannot be stored."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertForTokenClassification

import fastdistill
from tests import tiny
from tests.teachers.storing import keep


def tokens() -> Any:
    return BertForTokenClassification(tiny.bert().config)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"data": [1]}, TypeError, "dataset is a list; expected a datasets.Dataset"),
        ({"data": tiny.dataset(4).select([])}, ValueError, "dataset has no rows"),
        ({"data": tiny.dataset(4).remove_columns("input_ids")}, ValueError, "expected 'input_ids' among them"),
        (
            {"data": tiny.dataset(4).add_column("teacher_logits", [[0.0]] * 4)},
            ValueError,
            "dataset has a column 'teacher_logits' already",
        ),
        ({"model": torch.nn.Linear(1, 1)}, TypeError, "model is a Linear; expected a transformers.PreTrainedModel"),
        ({"model": tokens()}, ValueError, "is for token_classification, with logits of every token"),
        ({"name": "a/b"}, ValueError, "name is 'a/b'; expected"),
        ({"name": 3}, ValueError, "name is 3; expected"),
        ({"collate": None}, TypeError, "collate is None; expected a function"),
        ({"batch_size": 0}, ValueError, "batch_size is 0; expected 1 or more"),
        ({"batch_size": 2.0}, TypeError, "batch_size is 2.0; expected an integer"),
        ({"bf16": 1}, TypeError, "bf16 is 1; expected True or False"),
        ({"hidden_states": "yes"}, TypeError, "hidden_states is 'yes'; expected True or False"),
        ({"cache_file": "x/teacher"}, ValueError, "cache_file is 'x/teacher'; expected a name that ends in .arrow"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        keep(tmp_path, **options)


def test_a_model_with_gates_is_refused(tmp_path: Path) -> None:
    """What it says would be kept as what it says without them."""
    model = tiny.bert(2)
    with fastdistill.gate(model), pytest.raises(ValueError, match="model is within fastdistill.gate"):
        keep(tmp_path, model=model)


def test_a_model_without_hidden_states_is_named(tmp_path: Path) -> None:
    model = tiny.bert(2)
    model.register_forward_hook(
        lambda module, args, outputs: SimpleNamespace(logits=outputs.logits, hidden_states=None)
    )
    with pytest.raises(ValueError, match="model has no hidden_states"):
        keep(tmp_path, model=model, hidden_states=True)
