"""With `bf16` every model of a recipe computes in bfloat16: trained, evaluated, stored, scored and timed."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification

from fastdistill import LogitsKD
from fastdistill.recipes.measuring import Scoring
from tests import tiny
from tests.recipes.test_best import stages, training


@pytest.mark.parametrize("bf16, dtype", [(False, torch.float32), (True, torch.bfloat16)])
def test_what_models_compute_in(
    tmp_path: Path, bf16: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, own = set(), BertForSequenceClassification.forward

    @functools.wraps(own)
    def noted(self: Any, *inputs: Any, **others: Any) -> Any:
        found = own(self, *inputs, **others)
        seen.add(found.logits.dtype)
        return found

    monkeypatch.setattr(BertForSequenceClassification, "forward", noted)
    kept, teacher, student = stages(tmp_path, bf16=bf16), tiny.bert(2, layers=2), tiny.bert(1)
    called = []
    for name, scoring in (
        ("trained", None),
        ("scores", Scoring(name="scores", teacher=teacher, student=student)),
        ("weights", Scoring(name="weights", teacher=teacher, student=student, of_weights=True)),
        ("importance", Scoring(name="importance", teacher=teacher, dynabert=True)),
    ):
        if scoring is None:
            kept.train(replace(training(), objective=LogitsKD(), teacher=teacher))
        else:
            kept.score(scoring)
        called.append((name, set(seen)))
        seen.clear()
    assert called == [(name, {dtype}) for name in ("trained", "scores", "weights", "importance")]


def test_scores_of_weights_are_of_each_batch(tmp_path: Path) -> None:
    """Under autocast a cast that is kept from one batch to the next would keep the first one's graph."""
    found = {}
    for bf16 in (False, True):
        kept = stages(tmp_path / str(bf16), bf16=bf16)
        scoring = Scoring(name="weights", teacher=tiny.bert(2, layers=2), of_weights=True, reduce="batch")
        found[bf16] = kept.score(scoring).expressiveness.matrices
    for name, exact in found[False].items():
        error = torch.linalg.vector_norm(found[True][name] - exact)
        assert 0 < error < 0.05 * torch.linalg.vector_norm(exact)
