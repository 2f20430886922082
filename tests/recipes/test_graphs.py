"""Recipes ask for CUDA graphs, for trainings and scores, unless they are told not to."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdistill import cuda_graphs
from fastdistill.recipes.begin import stages_of
from fastdistill.recipes.measuring import Scoring
from fastdistill.recipes.settings import KDSettings
from tests import tiny
from tests.recipes.test_best import stages, training
from tests.rerun import Rerun


@pytest.mark.parametrize("flags", [{}, {"no_cuda_graphs": True}], ids=str)
def test_what_is_asked_for_reaches_training_and_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, bool]
) -> None:
    graphs = Rerun()
    monkeypatch.setattr(cuda_graphs, "capturing", lambda device: graphs)
    examples = stages(tmp_path / "made").examples
    asked = KDSettings(task="tiny", teacher="minilm", student_layers=1, output=tmp_path / "run", batch_size=4, **flags)
    kept = stages_of(asked, examples)
    kept.train(training())
    trained = graphs.replayed
    kept.score(Scoring(name="scores", teacher=tiny.bert(layers=1)))
    scored = graphs.replayed
    kept.score(Scoring(name="weights", teacher=tiny.bert(layers=1), of_weights=True))
    assert (trained > 0) == (scored > trained) == (graphs.replayed > scored) == (not flags)
