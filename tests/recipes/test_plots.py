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
    plots.densities(Path("x.svg"), scores, "heads", "90 examples")
    plots.probabilities_over_steps(Path("x.svg"), [f"layers_{n}" for n in range(14)], torch.rand(9, 14), 5, "a seed")
    assert not any(covered(figure) for figure in drawn)
    assert drawn[0].axes[0].get_ylim()[0] == 0
    assert {text.get_text() for text in drawn[0].legends[0].get_texts()} >= scores.keys()


def test_every_plot_says_of_what_it_is(drawn: list[Any]) -> None:
    """Below its axes, where it covers nothing."""
    log = [{"loss": 1.0, "epoch": epoch, "layer/0": 3.0, "layer/1": 1.0} for epoch in (0.5, 1.0)]
    plots.heat_map(Path("x.svg"), [torch.rand(4), torch.rand(3)], "score", TOLD.first_seed)
    plots.densities(Path("x.svg"), {"I": torch.rand(40)}, "heads", TOLD.first_seed)
    plots.shares_over_time(Path("x.svg"), log, "layer", "layer", ["1", "2"], TOLD.first_seed)
    plots.probabilities_over_steps(Path("x.svg"), ("a", "b"), torch.full((9, 2), 0.5), 5, TOLD.first_seed)
    for figure in drawn:
        (caption,) = figure.texts
        assert caption.get_text() == "the first of 3 seeds"
        assert caption.get_window_extent().y1 <= min(axes.get_tightbbox().y0 for axes in figure.axes)


def test_no_percentage_is_above_100(drawn: list[Any]) -> None:
    plots.metric_by_share(Path("x.svg"), "rank", "accuracy", {"learned": {1: (0.99, 0.98, 1.0)}}, {}, str(TOLD))
    (axes,) = drawn[0].axes
    assert axes.get_ylim()[1] == pytest.approx(100)
    assert axes.get_ylim()[0] <= 90
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1"]


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
