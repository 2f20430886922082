from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from fastdistill.models import packed
from fastdistill.teachers.outputs import TeacherOutputs, gather, rows_of, run, stored_outputs
from tests import tiny

LENGTHS = [9, 4, 12, 2, 6]


def features(*, left: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    for row, length in zip(mask, LENGTHS, strict=True):
        row[-length if left else 0 : None if left else length] = 1
    ids = torch.randint(5, 60, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True}


class Watched(nn.Module):
    """Notes the shapes that a model is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.seen = tiny.bert(2, layers=3).eval(), []

    def forward(self, **inputs: Any) -> Any:
        self.seen.append(tuple(inputs["input_ids"].shape))
        assert not torch.is_grad_enabled()
        return self.model(**inputs)


def test_a_teacher_sees_the_rows_that_it_is_asked_for() -> None:
    teacher, inputs = Watched(), features()
    outputs = TeacherOutputs(teacher, inputs)
    assert teacher.seen == []  # nothing is asked yet
    rows = torch.tensor([4, 1])
    found = outputs.rows(rows)
    assert teacher.seen == [(2, 6)]  # of the tokens, as many as the longest of them has
    with torch.no_grad():
        whole = teacher.model(**inputs)
    torch.testing.assert_close(found.logits, whole.logits[rows])
    for layer, expected in zip(found.hidden_states, whole.hidden_states, strict=True):
        torch.testing.assert_close(layer[:, 0], expected[rows, 0])


def test_padding_on_the_left_stays() -> None:
    teacher = Watched()
    TeacherOutputs(teacher, features(left=True)).rows(torch.tensor([4, 1]))
    assert teacher.seen == [(2, 12)]


def test_what_is_not_of_each_row_stays() -> None:
    teacher, inputs = tiny.bert(2).eval(), features() | {"position_ids": torch.arange(max(LENGTHS)).unsqueeze(0)}
    with torch.no_grad():
        expected = teacher(**inputs).logits
    for order in (inputs, dict(reversed(inputs.items()))):
        rows = torch.tensor([4, 1])
        torch.testing.assert_close(TeacherOutputs(teacher, order).rows(rows).logits, expected[rows])


def test_what_is_no_text_is_not_cut() -> None:
    seen = {}

    def model(**inputs: Any) -> str:
        seen.update(inputs)
        return "said"

    pixels = torch.rand(5, 3, 8, 8)
    outputs = TeacherOutputs(model, {"pixel_values": pixels, "scale": torch.tensor(2.0), "interpolate": True})
    assert outputs.rows(torch.tensor([3, 0])) == "said"
    torch.testing.assert_close(seen["pixel_values"], pixels[[3, 0]])
    assert (seen["scale"], seen["interpolate"]) == (2.0, True)


def test_the_whole_batch_is_run_once() -> None:
    teacher, inputs = Watched(), features()
    outputs = TeacherOutputs(teacher, inputs)
    assert outputs.run() is run(outputs) is run({"a": outputs})["a"]
    assert len(outputs.run().hidden_states) == 4
    assert teacher.seen == [(5, 12)]
    assert run(outputs.run()) is outputs.run()  # what has been run stays what it is


def test_a_failing_teacher_says_why() -> None:
    def model(**inputs: Any) -> Any:
        return None.logits  # type: ignore[attr-defined]

    with pytest.raises(AttributeError):
        TeacherOutputs(model, {}).run()


def test_stored_outputs_stand_for_the_model() -> None:
    batch = {"teacher_logits": torch.randn(5, 2), "teacher_hidden_states": torch.randn(5, 4, 8), "labels": None}
    stored = stored_outputs("teacher", batch)
    assert stored_outputs("assistant", batch) is None
    found = TeacherOutputs(None, {}, stored=stored).rows(torch.tensor([3, 0]))
    torch.testing.assert_close(found.logits, batch["teacher_logits"][[3, 0]])
    for layer, states in enumerate(found.hidden_states):
        torch.testing.assert_close(states[:, 0], batch["teacher_hidden_states"][[3, 0], layer])
    only_logits = stored_outputs("teacher", {"teacher_logits": batch["teacher_logits"]})
    assert gather(only_logits, torch.tensor([1])).hidden_states is None
    with pytest.raises(ValueError, match="model and stored are both None"):
        TeacherOutputs(None, {})


def test_outputs_that_are_there_are_taken_from() -> None:
    outputs = SequenceClassifierOutput(logits=torch.arange(6.0).reshape(3, 2), hidden_states=(torch.rand(3, 4, 5),))
    found = rows_of(outputs, torch.tensor([2, 0]))
    expected: Tensor = outputs.logits[[2, 0]]
    torch.testing.assert_close(found.logits, expected)
    torch.testing.assert_close(found.hidden_states[0], outputs.hidden_states[0][[2, 0]])


def test_much_padding_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny.bert(2, layers=3).eval(), features()
    del inputs["output_hidden_states"]
    times, inner = [], packed.packed
    monkeypatch.setattr(packed, "packed", lambda *given: times.append(given) or inner(*given))
    found = TeacherOutputs(model, inputs).run().logits
    assert len(times) == 1
    with torch.no_grad():
        torch.testing.assert_close(found, model(**inputs).logits)
