"""Plots of a run, as SVG. matplotlib is imported when one is drawn; `require_matplotlib` says beforehand if it is not
there."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdistill.files import replacing
from fastdistill.models.scores import density, first_peak

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

Log = Sequence[Mapping[str, float]]


def require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("plots need matplotlib, which an extra brings: pip install 'fastdistill[bench]'")


def metric_by_share(
    path: Path,
    share: str,
    metric: str,
    curves: Mapping[str, Mapping[float, tuple[float, float]]],
    lines: Mapping[str, float],
) -> Path:
    """Curves by name: from a share, as of the examples that are kept, to (metric, its spread). `lines` are levels."""
    figure, axes = _figure(share, metric)
    for name, points in curves.items():
        shares = sorted(points)
        means, spreads = zip(*(points[share] for share in shares), strict=True)
        axes.errorbar(shares, means, yerr=spreads if any(spreads) else None, marker="o", capsize=3, label=name)
    for place, (name, level) in enumerate(lines.items()):
        axes.axhline(level, color="grey", linestyle=("--", ":", "-.")[place % 3], label=name)
    axes.legend()
    return _save(figure, path)


def heat_map(path: Path, layers: Sequence[Tensor], label: str) -> Path:
    """A layer a row, the first at the bottom, and a head a column; heads that are not there are left out."""
    figure, axes = _figure("head", "layer")
    width = max(len(layer) for layer in layers)
    values = [[*layer.tolist(), *[float("nan")] * (width - len(layer))] for layer in layers]
    colours = axes.pcolormesh(range(1, width + 2), range(1, len(layers) + 2), values, cmap="viridis")
    axes.set_xticks([place + 0.5 for place in range(1, width + 1)], [str(n) for n in range(1, width + 1)])
    axes.set_yticks([place + 0.5 for place in range(1, len(layers) + 1)], [str(n) for n in range(1, len(layers) + 1)])
    figure.colorbar(colours, label=label)
    return _save(figure, path)


def densities(path: Path, values: Tensor, label: str) -> Path:
    """The density of these numbers, its first peak, and the share of them up to each number."""
    where, height = density(values)
    peak = first_peak(values)
    figure, axes = _figure(label, "density")
    axes.plot(where, height, label="density")
    axes.axvline(peak, color="grey", linestyle="--", label="first peak")
    shares = axes.twinx()
    shares.set_ylabel("share at or below")
    shares.plot(values.sort().values, [(i + 1) / len(values) for i in range(len(values))], color="C1")
    axes.legend()
    return _save(figure, path)


def shares_over_time(path: Path, log: Log, prefix: str, label: str, ticks: Sequence[str], *, at_once: int = 1) -> Path:
    """A map of the `shares` of what was counted as "`prefix`/0", "`prefix`/1", ... (one row each, named by `ticks`)
    over the epochs."""
    figure, axes = _figure("epoch", label)
    edges = [0.0, *(entry["epoch"] for entry in log if "loss" in entry)]  # an entry is of the time since the one before
    rows = shares(log, prefix, at_once)
    colours = axes.pcolormesh(edges, range(len(rows) + 1), rows, cmap="viridis", vmin=0)
    axes.set_yticks([place + 0.5 for place in range(len(rows))], [ticks[place] for place in range(len(rows))])
    figure.colorbar(colours, label="share")
    return _save(figure, path)


def shares(log: Log, prefix: str, at_once: int = 1) -> list[list[float]]:
    """For each of "`prefix`/0", "`prefix`/1", ..., in each log of training, how often it was counted, of the times that
    anything was; `at_once` are counted each time, to which the shares sum. NaN where nothing was."""
    entries = [entry for entry in log if "loss" in entry]
    names = sorted({key for entry in entries for key in entry if key.startswith(prefix + "/")}, key=_number)
    totals = [sum(entry.get(name, 0.0) for name in names) / at_once or float("nan") for entry in entries]
    return [[entry.get(name, 0.0) / total for entry, total in zip(entries, totals, strict=True)] for name in names]


def probabilities_over_steps(path: Path, names: Sequence[str], theta: Tensor, selected_at: int) -> Path:
    """Probabilities ``[steps + 1, n]``, a line for each of n teachers; a mark where teachers were selected."""
    figure, axes = _figure("step", "probability")
    for place, name in enumerate(names):
        axes.plot(theta[:, place], color=f"C{place % 10}", linestyle=("-", "--", ":")[place // 10 % 3], label=name)
    axes.axvline(selected_at, color="grey", linestyle="--", label="teacher selection")
    axes.set_ylim(bottom=0)
    axes.legend()
    return _save(figure, path)


def _number(name: str) -> int:
    return int(name.rpartition("/")[2])


def _figure(x: str, y: str) -> tuple[Figure, Any]:
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg")
    return path
