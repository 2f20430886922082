"""One picture of a run: a panel an op, a line a case, and on it how many times as long as ours each peer takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.goals import OURS, Cases, Measured

COLUMNS, WIDTH = 2, 11.0  # inches
LINE, ABOVE, BELOW, LEFT, BETWEEN = 0.18, 0.34, 0.3, 2.05, 0.25  # inches: a case, a panel's title, its axis, labels
LEGEND = 0.75
MARKERS = "osD^vPX*h<>"


def plot(cases: Cases, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    panels: dict[str, dict[str, Measured]] = {}
    for (op, case), measured in cases.items():
        if OURS in measured and len(_peers(measured)) > 0:
            panels.setdefault(op, {})[case] = measured
    columns = _pack({op: ABOVE + BELOW + LINE * (1 + len(lines)) for op, lines in panels.items()})
    height = LEGEND + max(sum(heights.values()) for heights in columns)
    names = list(dict.fromkeys(name for lines in panels.values() for m in lines.values() for name in _peers(m)))
    looks = {name: {"color": f"C{i % 10}", "marker": MARKERS[i % len(MARKERS)]} for i, name in enumerate(names)}

    with plt.rc_context({"svg.hashsalt": "fastdistill", "font.size": 8, "svg.fonttype": "none"}):
        figure = plt.figure(figsize=(WIDTH, height))
        column_width = WIDTH / COLUMNS
        for number, heights in enumerate(columns):
            top = height - LEGEND
            for op, tall in heights.items():
                low, inside = top - tall + BELOW, tall - ABOVE - BELOW
                box = (number * column_width + LEFT, low, column_width - LEFT - BETWEEN, inside)
                axes = figure.add_axes((box[0] / WIDTH, box[1] / height, box[2] / WIDTH, box[3] / height))
                _panel(axes, op, panels[op], looks)
                axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
                axes.xaxis.set_minor_formatter("")
                top -= tall
        handles = [plt.Line2D([], [], linestyle="", **looks[name]) for name in names]
        handles.append(plt.Line2D([], [], color="black"))
        labels = [*names, f"{OURS} (1×)"]
        figure.legend(handles, labels, loc="upper center", ncols=6, frameon=False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _peers(measured: Measured) -> dict[str, float]:
    """Times as long as ours."""
    ours = measured[OURS]["median_s"]
    return {name: row["median_s"] / ours for name, row in measured.items() if not name.startswith(OURS)}


def _pack(heights: Mapping[str, float]) -> list[dict[str, float]]:
    """In the given order, down one column and then the next, the columns about equally tall."""
    columns: list[dict[str, float]] = [{}]
    for op, tall in heights.items():
        full = sum(columns[-1].values()) + tall / 2 > sum(heights.values()) / COLUMNS
        if full and len(columns) < COLUMNS and columns[-1]:
            columns.append({})
        columns[-1][op] = tall
    return columns


def _panel(axes: Any, op: str, lines: Mapping[str, Measured], looks: Mapping[str, Mapping[str, Any]]) -> None:
    ratios = {case: _peers(measured) for case, measured in lines.items()}
    for y, peers in enumerate(ratios.values()):
        for name, ratio in peers.items():
            axes.plot(ratio, y, markersize=5, alpha=0.85, linestyle="", **looks[name])
    every = [ratio for peers in ratios.values() for ratio in peers.values()]
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(min(0.7, *every) / 1.15, max(2.2, *every) * 1.2)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_yticks(range(len(lines)), [_short(case) for case in lines])
    axes.tick_params(length=0)
    axes.grid(axis="both", linewidth=0.4, alpha=0.6)
    axes.set_title(op, loc="left", fontsize=9, fontweight="bold", pad=4)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xticks(
        [x for x in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if axes.get_xlim()[0] <= x <= axes.get_xlim()[1]]
    )


def _short(case: str, most: int = 30) -> str:
    """What tells cases apart may stand at either end."""
    return case if len(case) <= most else f"{case[: most // 2]}…{case[-most // 2 + 1 :]}"
