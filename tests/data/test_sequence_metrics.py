from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from transformers import EvalPrediction

from fastdistill.data.sequence_metrics import _entities, answer_metrics, entity_metrics, text_metrics
from tests import tiny

NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def logits(classes: Any) -> Any:
    return np.eye(len(NAMES))[np.maximum(classes, 0)]


def test_entities_are_right_as_a_whole() -> None:
    labels = np.array([[1, 2, 0, 3, 4, -100], [0, 1, 2, 2, 0, 0]])
    said = np.array(
        [[1, 2, 0, 3, 0, 1], [0, 1, 2, 2, 0, 3]]
    )  # PER right; LOC one token short; PER right; a LOC too many
    found = entity_metrics(NAMES)(EvalPrediction(logits(said), labels))
    assert found == pytest.approx({"precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7, "accuracy": 9 / 11})


@pytest.mark.parametrize(
    "tags, expected",
    [
        ("I-PER I-PER", [("PER", 0, 1)]),
        ("B-PER B-PER", [("PER", 0, 0), ("PER", 1, 1)]),
        ("B-PER I-LOC", [("PER", 0, 0), ("LOC", 1, 1)]),
        ("O I-PER O", [("PER", 1, 1)]),
        ("B-PER I-PER E-PER S-PER", [("PER", 0, 2), ("PER", 3, 3)]),
        ("S-PER I-PER", [("PER", 0, 0), ("PER", 1, 1)]),
        ("O O", []),
    ],
)
def test_where_entities_begin_and_end(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert list(_entities(tags.split())) == expected


def conlleval(tags: list[str]) -> list[tuple[str, int, int]]:
    """seqeval's rules, one by one."""
    found, begin, kind_before, before = [], 0, "", "O"
    for place, tag in enumerate([*tags, "O"]):
        now, kind = tag[0], tag[2:]
        end = before in "ES" or (before in "BI" and now in "BSO") or (before != "O" and kind_before != kind)
        start = now in "BS" or (before in "ESO" and now in "EI") or (now != "O" and kind_before != kind)
        if end and before != "O":
            found.append((kind_before, begin, place - 1))
        if start:
            begin = place
        before, kind_before = now, kind
    return found


def test_every_short_sequence_is_cut_as_conlleval_does() -> None:
    tags = ["O", *(f"{side}-{kind}" for side in "BIES" for kind in "XY")]
    for sequence in product(tags, repeat=3):
        assert list(_entities(sequence)) == conlleval(list(sequence)), sequence


def test_answers() -> None:
    start, end = np.full((3, 6), -5.0), np.full((3, 6), -5.0)
    for row, (s, e) in enumerate([(1, 3), (2, 4), (0, 0)]):
        start[row, s] = end[row, e] = 5.0
    start[1, 5] = 9.0  # the best start lies after every good end: the span (5, 5) is 4, and (2, 4) is 10
    found = answer_metrics()(EvalPrediction((start, end), (np.array([1, 3, 9]), np.array([3, 5, 9]))))
    assert found == pytest.approx({"exact_match": 1 / 2, "f1": (1 + 2 * 2 / 6) / 2})


def test_generated_texts() -> None:
    tokenizer = tiny.tokenizer()

    def ids(*texts: str) -> Any:
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return np.array([row + [-100] * (5 - len(row)) for row in rows])

    found = text_metrics(tokenizer)(EvalPrediction(ids("ba be", "bi bo ba"), ids("ba be", "ba bi bu bo")))
    assert found == pytest.approx({"exact_match": 1 / 2, "f1": (1 + 6 / 7) / 2, "rouge_l": (1 + 4 / 7) / 2})
    with pytest.raises(ValueError, match=r"predictions has shape \[2, 5, 7\]; expected token ids"):
        text_metrics(tokenizer)(EvalPrediction(np.zeros((2, 5, 7)), ids("ba", "be")))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: entity_metrics(["O", "PER"]), "label_names has 'PER'; expected 'O', or a kind after"),
        (
            lambda: entity_metrics(NAMES)(EvalPrediction(np.zeros((2, 3, 4)), np.zeros((2, 3), int))),
            r"predictions has shape \[2, 3, 4\]; expected \[2, 3, 5\]",
        ),
    ],
)
def test_what_is_wrong_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
