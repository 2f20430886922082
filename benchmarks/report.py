"""Turns measurements into a JSON small enough to keep, and that into a Markdown table of ratios and a picture.

    python -m benchmarks.report [runs/benchmarks.json ...] [--name cpu] [--readme README.md]

From pytest-benchmark's JSON, or what this wrote, makes benchmarks/results/NAME.{json,md,svg}; without one, makes all
the tables and pictures there again. With --readme, the part between the README's benchmark markers, too.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.figure import plot
from benchmarks.goals import Cases, judge
from benchmarks.harness import DEVICE, OURS

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"

HEADLINES = {
    "cpu": [
        ("kd_ce_loss", "1024×30522"),
        ("dkd_loss", "1024×30522"),
        ("uncertainty", "1024×30522"),
        ("gated_ffn and gradients", "32×128×384×1536, 50% off"),
        ("score", "32x128, 2 classes"),
        ("STARK", "sst2, 1000 examples, 3 sparsities"),
        ("DeKD", "sst2, 1000 examples, assistant of 4 layers"),
        ("AutoSKD", "sst2, 256 examples, team of 6, 10 candidates"),
        ("STARK", "sst2, 1000 examples, 3 sparsities, bfloat16"),
        ("DeKD", "sst2, 1000 examples, assistant of 4 layers, bfloat16"),
        ("AutoSKD", "sst2, 256 examples, team of 6, 10 candidates, bfloat16"),
    ],
    "cuda": [
        ("kd_ce_loss", "8192×128256"),
        ("dkd_loss", "8192×32000"),
        ("uncertainty", "8192×128256"),
        ("gated_attention", "8×32×4096×128, 50% closed"),
        ("gated_ffn and gradients", "64×512×1024×4096, 50% off"),
        ("train step", "BERT-base 32x128"),
    ],
}
"""The cases that stand in the README, by the device of the run."""

Rows = list[dict[str, Any]]
Kept = dict[str, Any]


def keep(rows: Rows, **more: Any) -> Kept:
    """What is worth keeping of a run on this machine: when, where, by which versions, and its rows."""
    return {
        "date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions(), **more, "rows": rows
    }  # fmt: skip


def machine() -> dict[str, Any]:
    cpu = next((line for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    found = {"cpu": cpu.rpartition(":")[2].strip(), "threads": torch.get_num_threads()}
    found["capability"] = torch.backends.cpu.get_cpu_capability()
    if DEVICE == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cores": os.cpu_count()}
    return found


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "transformers", "liger-kernel", "flash-linear-attention"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if DEVICE == "cuda":
        found |= {"cuDNN": str(torch.backends.cudnn.version())}
    return found


def condense(raw: dict[str, Any]) -> Kept:
    """Of pytest-benchmark's JSON."""
    rows = [
        {
            "median_s": benchmark["stats"]["median"],
            "iqr_s": benchmark["stats"]["iqr"],
            "rounds": benchmark["stats"]["rounds"],
            **benchmark["extra_info"],
        }
        for benchmark in raw["benchmarks"]
        if "op" in benchmark["extra_info"]  # not of what was broken off
    ]
    return {**keep(rows), "date": raw["datetime"][:10]}


def _latest(rows: Iterable[dict[str, Any]]) -> Rows:
    return list({(row["op"], row["case"], row["implementation"]): row for row in rows}.values())


def by_case(rows: Rows) -> Cases:
    cases: dict[tuple[str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        cases[row["op"], row["case"]][row["implementation"]] = row
    return dict(cases)


def table(kept: Kept, only: Sequence[tuple[str, str]] | None = None) -> str:
    """One line a case, of these or of all: our time, how many times as long each peer takes, and the goal on a GPU."""
    cases = by_case(kept["rows"])
    lines = [line for op, case in only or cases for line in _case_lines(op, case, cases)]
    if only:
        lines = [line for line in lines if (line["op"], line["case"]) in only]  # not another way to call it
    used = [name for name in COLUMNS if any(line[name] for line in lines)]
    head = "| " + " | ".join(used) + " |\n|" + "---|" * len(used)
    return "\n".join([head, *("| " + " | ".join(line[name] for name in used) + " |" for line in lines)])


OTHERS = "how many times as long others take"
COLUMNS = ("op", "case", "dtype", OURS, OTHERS, "share of the limit", "peak memory", "goal")


def _case_lines(op: str, case: str, cases: Cases) -> list[dict[str, str]]:
    measured = cases.get((op, case), {})
    peers = {name: row for name, row in measured.items() if not name.startswith(OURS)}
    lines = []
    for name, row in measured.items():
        if name in peers:
            continue
        verdict = judge(op, case, cases) if name == OURS and row["device"] == "cuda" else None
        cells = (
            op + name.removeprefix(OURS), case, row["dtype"], _time(row["median_s"]),
            ", ".join(f"{peer} {_ratio(other, row)}" for peer, other in peers.items()), _share(row), _memory(row),
            str(verdict or ""),
        )  # fmt: skip
        lines.append(dict(zip(COLUMNS, cells, strict=True)))
    return lines


def where(kept: Kept) -> str:
    machine = kept["machine"]
    place = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads, {machine['capability']}"
    versions = ", ".join(f"{name} {version}" for name, version in kept["versions"].items())
    return f"{place}; {versions}; {kept['date']}. Medians; each line of one run."


def _ratio(peer: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    ratio = peer["median_s"] / ours["median_s"]
    return f"{ratio:.1f}×" if ratio >= 2 else f"{ratio:.2f}×"


def _time(seconds: float) -> str:
    unit, scale = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{seconds * scale:.3g} {unit}"


def _share(row: Mapping[str, Any]) -> str:
    shares = {"copy": row.get("copy_share"), "GEMM": row.get("gemm_share")}
    return ", ".join(f"{share:.0%} of {limit}" for limit, share in shares.items() if share)


def _memory(row: Mapping[str, Any]) -> str:
    extra = row.get("peak_extra_bytes")
    return "" if extra is None or extra < 2**20 else f"{extra / 2**20:.0f} MiB"


def write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def show(kept: Kept, name: str, folder: Path = RESULTS) -> str:
    """Writes NAME.md and NAME.svg; returns the table."""
    text = f"{table(kept)}\n\n{where(kept)}\n"
    plot(by_case(kept["rows"]), folder / f"{name}.svg")
    write(folder / f"{name}.md", f"![how many times as long as {OURS} others take]({name}.svg)\n\n{text}")
    return text


def headlines(folder: Path = RESULTS) -> str:
    """For the README: some lines of the run on each kind of device, a picture, and where the rest is."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    runs = dict(sorted(found.items(), key=lambda run: (run[1]["rows"][0]["device"] == "cpu", -len(run[1]["rows"]))))
    parts = []
    for kept in runs.values():
        device = kept["rows"][0]["device"]
        wanted = [line for line in HEADLINES[device] if line in by_case(kept["rows"])]
        if wanted:
            parts.append(f"{table(kept, wanted)}\n\n{where(kept)}")
    shown = next(iter(runs))
    links = ", ".join(f"[{name}](benchmarks/results/{name}.md)" for name in runs)
    picture = f"![how many times as long as {OURS} others take, {shown}](benchmarks/results/{shown}.svg)"
    return "\n\n".join([*parts, picture, f"All that was measured: {links}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "json",
        type=Path,
        nargs="*",
        help="what pytest --benchmark-json or this wrote; of runs on one machine, the last of a case",
    )
    parser.add_argument("--name", default=DEVICE, help=f"of the files in {RESULTS.name}/ (default: the device)")
    parser.add_argument("--readme", type=Path, help="a file whose part between the benchmark markers is replaced")
    options = parser.parse_args()

    RESULTS.mkdir(exist_ok=True)
    if options.json:
        read = [json.loads(path.read_text()) for path in options.json]
        runs = [one if "rows" in one else condense(one) for one in read]
        kept = {**runs[-1], "rows": _latest(row for run in runs for row in run["rows"])}
        write(RESULTS / f"{options.name}.json", json.dumps(kept, indent=1) + "\n")
        print(show(kept, options.name))
    else:
        for path in RESULTS.glob("*.json"):
            show(json.loads(path.read_text()), path.stem)
    if options.readme:
        before, _, rest = options.readme.read_text().partition(BEGIN)
        if END not in rest:
            raise ValueError(f"{options.readme} lacks the markers {BEGIN} and {END}")
        write(options.readme, f"{before}{BEGIN}\n{headlines()}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
