"""Plots of a run, as SVG. matplotlib is imported when one is drawn; `require_matplotlib` says beforehand if it is not
there."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Log = Sequence[Mapping[str, float]]


def require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("plots need matplotlib, which an extra brings: pip install 'fastdistill[bench]'")


def metric_by_ratio(
    path: Path, metric: str, curves: Mapping[str, Mapping[float, tuple[float, float]]], lines: Mapping[str, float]
) -> None:
    """A curve a strategy: from the share of examples that are kept to (metric, its spread). `lines` are levels."""
    figure, axes = _figure("share of the examples that query a teacher", metric)
    for name, points in curves.items():
        ratios = sorted(points)
        means, spreads = zip(*(points[ratio] for ratio in ratios), strict=True)
        axes.errorbar(ratios, means, yerr=spreads if any(spreads) else None, marker="o", capsize=3, label=name)
    for place, (name, level) in enumerate(lines.items()):
        axes.axhline(level, color="grey", linestyle=("--", ":", "-.")[place % 3], label=name)
    axes.legend()
    _save(figure, path)


def shares_over_time(path: Path, log: Log, prefix: str, label: str, ticks: Sequence[str]) -> None:
    """A map of the logged shares "`prefix`/0", "`prefix`/1", ... (one row each, named by `ticks`) over the epochs."""
    entries = [entry for entry in log if any(key.startswith(prefix + "/") for key in entry)]
    names = sorted({key for entry in entries for key in entry if key.startswith(prefix + "/")}, key=_number)
    figure, axes = _figure("epoch", label)
    times = [entry["epoch"] for entry in entries]
    edges = [0.0, *times]  # an entry is of the time since the one before
    shares = [[entry.get(name, 0.0) for entry in entries] for name in names]
    colours = axes.pcolormesh(edges, range(len(names) + 1), shares, cmap="viridis", vmin=0)
    axes.set_yticks([place + 0.5 for place in range(len(names))], [ticks[place] for place in range(len(names))])
    figure.colorbar(colours, label="share")
    _save(figure, path)


def _number(name: str) -> int:
    return int(name.rpartition("/")[2])


def _figure(x: str, y: str) -> tuple[Figure, Any]:
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(temporary, format="svg")
    os.replace(temporary, path)
