"""Stages train the embeddings of the data's tokens alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastdistill
from fastdistill.cli import main
from fastdistill.recipes import fitting
from tests import tiny
from tests.commands import command
from tests.records import record

ENCODER = {"layers": 2, "vocab_size": 300, "dropout": 0.0}
EMBEDDINGS = "bert.embeddings.word_embeddings.weight"


def test_models_are_those_of_whole_trainings(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    compact_vocabulary = fitting.compact_vocabulary

    def compact(model: torch.nn.Module, tokens: torch.Tensor) -> object:
        trained.append(len(tokens))
        return compact_vocabulary(model, tokens)

    monkeypatch.setattr(fitting, "compact_vocabulary", compact)
    more = ("--student-layers", "1")
    assert main(command("kd", sources, tmp_path / "compact", *more)) == 0
    monkeypatch.setattr(fitting, "can_compact", lambda model: False)
    assert main(command("kd", sources, tmp_path / "whole", *more)) == 0
    used = len(tiny.SPECIAL) + len(tiny.WORDS)
    assert len(trained) > 1 and all(0 < tokens <= used for tokens in trained)
    ours, expected = (record(tmp_path / name)["results"]["distilled"] for name in ("compact", "whole"))
    assert ours["accuracy"] == expected["accuracy"] and ours["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    for stage in ("teacher", "distilled"):
        ours, expected = (
            fastdistill.from_pretrained(tmp_path / name / stage).state_dict()[EMBEDDINGS]
            for name in ("compact", "whole")
        )
        assert ours.shape == (300, 16)
        torch.testing.assert_close(ours[used:], expected[used:], rtol=1e-5, atol=0)  # which decay alone has changed
        torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-3)
