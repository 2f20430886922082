"""Turns pytest-benchmark's JSON into a Markdown table of ratios, a plot and a JSON small enough to keep.

    python -m benchmarks.report runs/benchmarks.json [more.json ...] [--name cpu] [--readme README.md]

writes benchmarks/results/NAME.{json,md,svg} and, with --readme, the table between the README's benchmark markers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections import defaultdict
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import DEVICE, OURS

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"

HEADLINES = {
    "kd_ce_loss", "uncertainty", "gated_ffn and gradients", "score", "pruned forward", "DeKD step", "STARK",
    "sampled teacher step", "theta's gradient", "AutoSKD",
}  # fmt: skip
"""The ops whose lines stand in the README."""

Rows = list[dict[str, Any]]


def condense(raw: dict[str, Any]) -> dict[str, Any]:
    """What is worth keeping: the machine, the versions, and for each measurement its median and spread."""
    rows = [
        {
            **benchmark["extra_info"],
            "median_s": benchmark["stats"]["median"],
            "iqr_s": benchmark["stats"]["iqr"],
            "rounds": benchmark["stats"]["rounds"],
        }
        for benchmark in raw["benchmarks"]
    ]
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "liger_kernel", "fla"):
        try:
            versions[package] = __import__(package).__version__
        except (ImportError, AttributeError):
            continue
    machine = {"cpu": raw["machine_info"]["cpu"]["brand_raw"], "threads": torch.get_num_threads()}
    machine["capability"] = torch.backends.cpu.get_cpu_capability()
    if DEVICE == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    return {"date": raw["datetime"][:10], "machine": machine, "versions": versions, "rows": rows}


def _latest(rows: Rows) -> Rows:
    return list({(row["op"], row["case"], row["implementation"]): row for row in rows}.values())


def by_case(rows: Rows) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    cases: dict[tuple[str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        cases[row["op"], row["case"]][row["implementation"]] = row
    return cases


def table(kept: dict[str, Any], ops: Container[str] | None = None) -> str:
    """One line a case, of these ops or of all: our time, then how many times as long each peer takes."""
    rows, machine = [row for row in kept["rows"] if ops is None or row["op"] in ops], kept["machine"]
    header = ["op", "case", "dtype", OURS, "how many times as long others take", "copy bandwidth", "peak memory"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for (op, case), measured in by_case(rows).items():
        for name, row in measured.items():
            if name.startswith(OURS):
                label = op + name.removeprefix(OURS)
                peers = {peer: other for peer, other in measured.items() if not peer.startswith(OURS)}
                ratios = ", ".join(f"{peer} {_ratio(other, row)}" for peer, other in peers.items())
                share = f"{row['copy_share']:.0%}" if row.get("copy_share") else ""
                cells = [label, case, row["dtype"], _time(row["median_s"]), ratios, share, _memory(row)]
                lines.append("| " + " | ".join(cells) + " |")
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads, {machine['capability']}"
    versions = ", ".join(f"{name} {version}" for name, version in kept["versions"].items())
    return "\n".join(lines) + f"\n\n{where}; {versions}; {kept['date']}. Medians; each line of one run.\n"


def _ratio(peer: dict[str, Any], ours: dict[str, Any]) -> str:
    ratio = peer["median_s"] / ours["median_s"]
    return f"{ratio:.1f}×" if ratio >= 2 else f"{ratio:.2f}×"


def _time(seconds: float) -> str:
    unit, scale = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{seconds * scale:.3g} {unit}"


def _memory(row: dict[str, Any]) -> str:
    extra = row.get("peak_extra_bytes")
    return "" if extra is None or extra < 2**20 else f"{extra / 2**20:.0f} MiB"


def plot(kept: dict[str, Any], path: Path) -> None:
    """Bars of time relative to ours, a group a case, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    cases = by_case(kept["rows"])
    names = list(dict.fromkeys(r["implementation"] for r in kept["rows"] if "(" not in r["implementation"]))
    figure, axes = plt.subplots(figsize=(9, 1 + 0.28 * sum(len(c) for c in cases.values())))
    position, ticks = 0.0, []
    for (op, case), measured in cases.items():
        if OURS not in measured:
            continue
        start = position
        for name in names:
            if name in measured:
                ratio = measured[name]["median_s"] / measured[OURS]["median_s"]
                axes.barh(position, ratio, color=f"C{names.index(name)}", height=0.9)
                axes.text(ratio, position, f" {ratio:.1f}", va="center", fontsize=8)
                position += 1
        ticks.append(((start + position - 1) / 2, f"{op}\n{case}"))
        position += 0.7
    axes.set_yticks([t for t, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(f"time relative to {OURS} (1 = as fast; larger = slower)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(len(names))]
    axes.legend(handles, names, fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "json",
        type=Path,
        nargs="+",
        help="what pytest --benchmark-json or this wrote; of runs on one machine, the last of a case",
    )
    parser.add_argument("--name", default=DEVICE, help=f"of the files in {RESULTS.name}/ (default: the device)")
    parser.add_argument("--readme", type=Path, help="a file whose part between the benchmark markers is replaced")
    options = parser.parse_args()

    read = [json.loads(path.read_text()) for path in options.json]
    runs = [one if "rows" in one else condense(one) for one in read]
    kept = {**runs[-1], "rows": _latest([row for run in runs for row in run["rows"]])}
    RESULTS.mkdir(exist_ok=True)
    write(RESULTS / f"{options.name}.json", json.dumps(kept, indent=1) + "\n")
    write(RESULTS / f"{options.name}.md", table(kept))
    plot(kept, RESULTS / f"{options.name}.svg")
    if options.readme:
        before, _, rest = options.readme.read_text().partition(BEGIN)
        if END not in rest:
            raise ValueError(f"{options.readme} lacks the markers {BEGIN} and {END}")
        write(options.readme, f"{before}{BEGIN}\n{table(kept, HEADLINES)}{END}{rest.partition(END)[2]}")
    print(table(kept))


if __name__ == "__main__":
    main()
