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


LEAST_SPAN = 0.1
"""Of a metric's axis: what is noise must not look like more."""

MOST_TICKS = 12
"""So many places of curves are told each by itself."""

Levels = tuple[float, float, float]
"""A metric, and its interval."""


def metric_by_share(
    path: Path,
    share: str,
    metric: str,
    curves: Mapping[str, Mapping[float, Levels]],
    lines: Mapping[str, Levels],
    caption: str,
) -> Path:
    """Curves by name: from a share, as of the examples that are kept, to a metric and its interval, a band. `lines` are
    levels, of which the first two have bands, too."""
    figure, axes = _figure(share, f"{metric} %")
    for place, (name, points) in enumerate(curves.items()):
        shares = sorted(points)
        values, *band = ([100 * level for level in of] for of in zip(*(points[x] for x in shares), strict=True))
        axes.plot(shares, values, marker="o", color=f"C{place}", label=name)
        if len(shares) > 1:
            axes.fill_between(shares, *band, color=f"C{place}", alpha=0.2, linewidth=0)
        else:
            axes.vlines(shares, *band, color=f"C{place}")
    for place, (name, (value, low, high)) in enumerate(lines.items()):
        axes.axhline(100 * value, color="grey", linestyle=("--", ":", "-.", (0, (1, 4)))[place % 4], label=name)
        if place < 2:
            axes.axhspan(100 * low, 100 * high, color="grey", alpha=0.1, linewidth=0)
    bottom, top = axes.get_ylim()
    more = max(0.0, 100 * LEAST_SPAN - (top - bottom)) / 2
    above = max(0.0, top + more - 100)  # of which there is nothing
    axes.set_ylim(bottom - more - above, top + more - above)
    places = sorted({share for points in curves.values() for share in points})
    if len(places) <= MOST_TICKS:
        axes.set_xticks(places, [f"{place:g}" for place in places])
    _legend(axes)
    _caption(figure, f"{caption}; bands hold 95 % of resamples")
    return _save(figure, path)


def levels(path: Path, metric: str, of: Mapping[str, Levels], caption: str) -> Path:
    """A model a row, the first above: its metric, and its interval, a bar."""
    figure, axes = _figure(f"{metric} %", "")
    for place, (value, low, high) in enumerate(of.values()):
        axes.hlines(place, 100 * low, 100 * high, color="grey")
        axes.plot(100 * value, place, marker="o", color="C0")
    axes.set_yticks(range(len(of)), list(of))
    axes.set_ylim(len(of) - 0.5, -0.5)
    left, right = axes.get_xlim()
    more = max(0.0, 100 * LEAST_SPAN - (right - left)) / 2
    axes.set_xlim(left - more, right + more)
    _caption(figure, f"{caption}; bars hold 95 % of resamples")
    return _save(figure, path)


def heat_map(path: Path, layers: Sequence[Tensor], label: str, caption: str) -> Path:
    """A layer a row, the first at the bottom, and a head a column; heads that are not there are left out."""
    figure, axes = _figure("head", "layer")
    width = max(len(layer) for layer in layers)
    values = [[*layer.tolist(), *[float("nan")] * (width - len(layer))] for layer in layers]
    colours = axes.pcolormesh(range(1, width + 2), range(1, len(layers) + 2), values, cmap="viridis")
    axes.set_xticks([place + 0.5 for place in range(1, width + 1)], [str(n) for n in range(1, width + 1)])
    axes.set_yticks([place + 0.5 for place in range(1, len(layers) + 1)], [str(n) for n in range(1, len(layers) + 1)])
    figure.colorbar(colours, label=label)
    _caption(figure, caption)
    return _save(figure, path)


def densities(path: Path, values: Mapping[str, Tensor], of: str, caption: str) -> Path:
    """The densities of scores by name and, of the first, the first peak and the share of them up to each number."""
    figure, axes = _figure(f"score of {of}, of length 1 in each layer", "density")
    for name, numbers in values.items():
        axes.plot(*density(numbers), label=name)
    main = next(iter(values.values()))
    axes.axvline(first_peak(main), color="grey", linestyle="--", label="first peak")
    shares = axes.twinx()
    shares.set_ylabel("share at or below")
    shares.set_ylim(0, 1)
    steps = [(place + 1) / len(main) for place in range(len(main))]
    axes.plot([], [], color="C0", linestyle=":", label="share at or below")
    shares.plot(main.sort().values, steps, color="C0", linestyle=":")
    axes.set_ylim(bottom=0)
    _legend(axes)
    _caption(figure, caption)
    return _save(figure, path)


def shares_over_time(
    path: Path, log: Log, prefix: str, label: str, ticks: Sequence[str], caption: str, *, at_once: int = 1
) -> Path:
    """A map of the `shares` of what was counted as "`prefix`/0", "`prefix`/1", ... (one row each, named by `ticks`)
    over the epochs."""
    figure, axes = _figure("epoch", label)
    edges = [0.0, *(entry["epoch"] for entry in log if "loss" in entry)]  # an entry is of the time since the one before
    rows = shares(log, prefix, at_once)
    colours = axes.pcolormesh(edges, range(len(rows) + 1), rows, cmap="viridis", vmin=0)
    axes.set_yticks([place + 0.5 for place in range(len(rows))], [ticks[place] for place in range(len(rows))])
    figure.colorbar(colours, label="share")
    _caption(figure, caption)
    return _save(figure, path)


def shares(log: Log, prefix: str, at_once: int = 1) -> list[list[float]]:
    """For each of "`prefix`/0", "`prefix`/1", ..., in each log of training, how often it was counted, of the times that
    anything was; `at_once` are counted each time, to which the shares sum. NaN where nothing was."""
    entries = [entry for entry in log if "loss" in entry]
    names = sorted({key for entry in entries for key in entry if key.startswith(prefix + "/")}, key=_number)
    totals = [sum(entry.get(name, 0.0) for name in names) / at_once or float("nan") for entry in entries]
    return [[entry.get(name, 0.0) / total for entry, total in zip(entries, totals, strict=True)] for name in names]


def probabilities_over_steps(path: Path, names: Sequence[str], theta: Tensor, selected_at: int, caption: str) -> Path:
    """Probabilities ``[steps + 1, n]``, a line for each of n teachers; a mark where teachers were selected."""
    figure, axes = _figure("step", "probability")
    for place, name in enumerate(names):
        axes.plot(theta[:, place], color=f"C{place % 10}", linestyle=("-", "--", ":")[place // 10 % 3], label=name)
    axes.axvline(selected_at, color="grey", linestyle="--", label="teacher selection")
    axes.set_ylim(bottom=0)
    _legend(axes)
    _caption(figure, caption)
    return _save(figure, path)


def _number(name: str) -> int:
    return int(name.rpartition("/")[2])


def _figure(x: str, y: str) -> tuple[Figure, Any]:
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    return figure, axes


def _legend(axes: Any) -> None:
    """Above, where it covers nothing."""
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize="small")


def _caption(figure: Figure, text: str) -> None:
    """Below: of how many seeds and examples it is."""
    figure.text(0.5, -0.02, text, ha="center", va="top", fontsize="small")


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg", bbox_inches="tight")
    return path
