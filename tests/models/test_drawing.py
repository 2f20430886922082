"""Weights that no file has, drawn by each training's own seed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import fastdistill
from fastdistill.models.drawing import draw_anew, drawn_anew
from fastdistill.models.loading import load_classifier
from tests import tiny
from tests.encoders import classifier


@pytest.mark.parametrize("kind", ["bert", "mpnet", "roberta"])
def test_what_is_not_pretrained_is_drawn(kind: str, tmp_path: Path) -> None:
    classifier(kind).base_model.save_pretrained(tmp_path)
    model = fastdistill.first_layers(load_classifier(str(tmp_path), tiny.TASK, seed=1), 2)
    assert drawn_anew(model) and all("classifier" in name or "pooler" in name for name in drawn_anew(model))
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    draw_anew(model, 2)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    weights = {name for name in drawn_anew(model) if name.endswith("weight")}  # biases begin with 0
    assert changed == weights and "classifier" in " ".join(changed)
    other = load_classifier(str(tmp_path), tiny.TASK, seed=3)  # of four layers
    draw_anew(other, 2)
    for name in drawn_anew(model):
        torch.testing.assert_close(other.state_dict()[name], model.state_dict()[name], rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_nothing_of_a_classifier_is_drawn(tmp_path: Path) -> None:
    """Nor of one that was trained: its files have all of it."""
    tiny.bert().save_pretrained(tmp_path)
    model = load_classifier(str(tmp_path), tiny.TASK)
    before = copy.deepcopy(model.state_dict())
    draw_anew(model, 5)
    assert drawn_anew(model) == ()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
