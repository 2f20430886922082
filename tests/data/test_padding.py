from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import BatchEncoding, DataCollatorWithPadding

from fastdistill.data.padding import PaddingCollator, padding_collator
from tests import tiny
from tests.training.trained import bert_trainer


def rows(*lengths: int, **more: Any) -> list[dict[str, Any]]:
    g = np.random.default_rng(0)
    return [
        {
            "input_ids": [int(one) for one in g.integers(5, 20, length)],
            "token_type_ids": [place % 2] * length,
            "attention_mask": [1] * length,
            **{name: values[place % len(values)] for name, values in more.items()},
        }
        for place, length in enumerate(lengths)
    ]


def same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected) and list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)
        else:
            assert found[name] == value, name


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "examples",
    [
        rows(3, 7, 1),
        rows(4, 4),
        rows(5),
        rows(3, 6, labels=[0, 1]),
        rows(3, 6, label=[0.5, 1]),
        rows(3, 6, label_ids=[[0.5, 1.25], [0, -3]]),
        rows(3, 6, teacher_logits=[[0.1, 1e-40], [float("nan"), float("inf")]], is_odd=[True, False]),
        rows(2, 3, hidden=[np.ones((2, 2)), np.zeros((2, 2))], more=[torch.ones(3), torch.zeros(3)]),
        rows(2, 3, wide=[np.float64(0.1), np.float64(0.2)], empty=[[], []]),
        [{"input_ids": [1, 2]}, {"input_ids": [3]}],
        [{"input_ids": torch.tensor([1, 2])}, {"input_ids": torch.tensor([3])}],
        [{"input_ids": np.array([1, 2])}, {"input_ids": np.array([3])}],
        [{"input_ids": []}, {"input_ids": []}],
        list(Dataset.from_list(rows(3, 9, labels=[1]))),
    ],
)
def test_what_transformers_makes(examples: list[dict[str, Any]], side: str) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = side
    for options in (
        {},
        {"pad_to_multiple_of": 8},
        {"padding": "max_length", "max_length": 12},
        {"return_tensors": "np"},
    ):
        expected = said(DataCollatorWithPadding(tokenizer, **options), examples)
        found = said(PaddingCollator(tokenizer, **options), examples)
        if isinstance(expected, str) or "return_tensors" in options:
            assert str(found) == str(expected)
        else:
            same(found, expected)


def said(collate: Any, examples: list[dict[str, Any]]) -> Any:
    """The batch, or the error."""
    try:
        return collate([dict(one) for one in examples])
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    "more", [{"labels": [[1], [2, 3]]}, {"labels": ["a", "b"]}, {"labels": [1, None]}, {"labels": [2**70, 1]}]
)
def test_what_it_does_not_read(more: dict[str, Any]) -> None:
    expected, found = (
        said(kind(tiny.tokenizer()), rows(2, 2, **more)) for kind in (DataCollatorWithPadding, PaddingCollator)
    )
    assert isinstance(expected, str) and found == expected


def test_lists_are_read_by_numpy() -> None:
    """Nothing is left for PyTorch to read one by one."""
    examples = rows(3, 7, labels=[0, 1], teacher_logits=[[0.5, 1.0], [2.0, 3.0]])
    with patch.object(BatchEncoding, "convert_to_tensors", autospec=True, side_effect=lambda batch, *_, **__: batch):
        batch = PaddingCollator(tiny.tokenizer())(examples)
    assert all(isinstance(value, Tensor) for value in batch.values()) and len(batch) == 5


def test_in_the_place_of_transformers_own(tmp_path: Path) -> None:
    class Own(DataCollatorWithPadding):
        pass

    tokenizer = tiny.tokenizer()
    plain = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=4)
    plain.note = "of a user's"  # type: ignore[attr-defined]
    faster = padding_collator(plain)
    assert type(faster) is PaddingCollator and faster.pad_to_multiple_of == 4 and faster.tokenizer is tokenizer
    same(pickle.loads(pickle.dumps(faster))(rows(3, 6)), plain(rows(3, 6)))
    t = bert_trainer(tmp_path, data_collator=plain)
    seen: list[Any] = []
    with patch.object(PaddingCollator, "__call__", lambda self, examples: seen.append(self) or plain(examples)):
        t.train()
    assert seen and t.data_collator is plain
    for other in (faster, Own(tokenizer), None, len):
        assert padding_collator(other) is other
