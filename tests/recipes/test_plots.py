"""What plots say: no more than the tables do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill.recipes import plots
from fastdistill.recipes.report import Told, against

pytest.importorskip("matplotlib")
TOLD = Told(seeds=3, select_on="train", select_examples=400, report_on="validation", report_examples=872)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    figures: list[Any] = []

    def save(figure: Any, path: Path) -> Path:
        figure.draw_without_rendering()
        figures.append(figure)
        return path

    monkeypatch.setattr(plots, "_save", save)
    return figures


def covered(figure: Any) -> bool:
    """Whether the legend lies over the axes."""
    axes, legend = figure.axes[0].get_window_extent(), figure.legends[0].get_window_extent()
    return bool(legend.y0 < axes.y1 and legend.x0 < axes.x1)


def test_noise_looks_like_noise(drawn: list[Any]) -> None:
    """Curves within one point do not fill the axis; intervals are bands, and the caption says of what they are."""
    curves = {"stark": {0.1: (0.811, 0.80, 0.82), 0.5: (0.805, 0.795, 0.815), 0.9: (0.81, 0.80, 0.82)}}
    lines = {"finetuned": (0.805, 0.80, 0.81), "kd": (0.808, 0.80, 0.815), "takd": (0.81, 0.80, 0.82)}
    plots.metric_by_share(Path("x.svg"), "sparsity", "accuracy", curves, lines, str(TOLD))
    (figure,) = drawn
    bottom, top = figure.axes[0].get_ylim()
    assert top - bottom >= 10
    assert bottom < 79.5
    assert top > 82
    assert len(figure.axes[0].collections) == 1
    assert not covered(figure)
    caption = figure.texts[0].get_text()
    assert "validation, 872 examples, 3 seeds; selected on 400 examples held out of train" in caption
    assert "95 %" in caption


def test_legends_cover_nothing(drawn: list[Any]) -> None:
    scores = {"I, knowledgeable": torch.rand(40), "P, expressiveness": torch.rand(40)}
    plots.densities(Path("x.svg"), scores, "heads")
    plots.probabilities_over_steps(Path("x.svg"), ("a", "b"), torch.full((9, 2), 0.5), 5)
    assert not any(covered(figure) for figure in drawn)
    assert {text.get_text() for text in drawn[0].legends[0].get_texts()} >= scores.keys()


@pytest.mark.parametrize(
    "low, high, verdict, told",
    [
        (0.004, 0.03, "better", "+1.5 [0.4, 3.0] better"),
        (-0.004, 0.03, "no difference shown", "+1.5 [-0.4, 3.0]"),
    ],
)
def test_better_is_said_where_the_interval_excludes_zero(low: float, high: float, verdict: str, told: str) -> None:
    found = {"difference": 0.015, "low": low, "high": high, "verdict": verdict}
    assert against({"against": {"kd": found}}, "kd") == told
    assert against({}, "kd") == ""
