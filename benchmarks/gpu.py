"""What `make gpu` runs once the package is built: the tests that need a GPU, the benchmarks, a run of every recipe.

    python -m benchmarks.gpu [--only OP] [--output FOLDER] [--stages tests,benchmarks,recipes] [--minutes 7]

Prints one table, writes FOLDER/gpu-NAME.{json,md,svg}, NAME from the card, and ends with 1 if anything failed. Nothing
that fails or hangs keeps the rest from running. On a machine without a GPU it does the same on the CPU (there
FASTDISTILL_BENCHMARK_SIZES=tiny is a rehearsal in little time).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

import torch

from benchmarks import recipes, report
from benchmarks.goals import judge
from benchmarks.harness import DEVICE
from benchmarks.plugin import read

ROOT = Path(__file__).parent.parent
CORES = len(os.sched_getaffinity(0))
STAGES = ("tests", "benchmarks", "recipes")
BENCHMARKS = (
    "kd_ce_loss",
    "dkd_loss",
    "uncertainty",
    "accumulate_sensitivity",
    "gated_attention",
    "gated_ffn",
    "proximity_conv",
    "dropout_add_layer_norm",
    "train_step",
    "score",
)
SECONDS = {"tests": 240, "alone": 60, "side by side": 120, "quiet": 110, "recipes": 90}  # at most
MINUTES = 7  # at most, for all of it
WANTED = {"Liger-Kernel": "liger_kernel", "flash-linear-attention": "fla", "pytest-xdist": "xdist", "triton": "triton"}
ALIASES = {"select_uncertain": "uncertainty", "hidden_entropy": "uncertainty"}
SAVED = 10.0  # seconds after which what has been measured is written again
LATE = "not reached in time"
MUCH_MEMORY = "(32_bits or billion)"  # in the names of tests that need most of the card: such run one at a time


def missing() -> list[str]:
    return [name for name, module in WANTED.items() if importlib.util.find_spec(module) is None]


GRACE = 10.0  # seconds that a command which is interrupted has to end


def run(command: Sequence[str], seconds: float, said: IO[str] | None = None, **environment: str) -> int:
    """Its exit status; 124 where it was stopped for the time it took."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}  # which it is not
    process = subprocess.Popen(
        command, cwd=ROOT, env={**inherited, **environment}, start_new_session=True, stdout=said, stderr=said
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # pytest then still writes what it has
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return 124


def test_files(only: str | None) -> list[Path]:
    """Tests with something for a GPU; of one op, those of its name and of what captures all ops in graphs."""
    chosen = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        kernels = path.parent.name == "kernels" and path.name != "test_compiled.py"
        if kernels or "mark.gpu" in text or "device: str" in text:
            mine = only is None or path.stem.startswith(f"test_{only}") or (path.parent.name == "cuda" and only in text)
            chosen += [path.relative_to(ROOT)] if mine else []
    return chosen


Limit = Callable[[str], float]  # the seconds that a part may take now


def tests(only: str | None, folder: Path, limit: Limit) -> dict[str, Any]:
    """Counts, seconds and what failed. Tests that need most of the card's memory run after the others, one by one."""
    workers = ["-n", str(CORES)] if "pytest-xdist" not in missing() else []
    start, files = time.monotonic(), [str(path) for path in test_files(only)]
    found: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": {}}
    for name, names, more in (("alone", MUCH_MEMORY, []), ("tests", f"not {MUCH_MEMORY}", workers))[::-1]:
        result = folder / f"{name}.xml"
        command = ["-m", "pytest", "-q", "--tb=short", "-m", "gpu", "-k", names, f"--junitxml={result}", *more, *files]
        quick = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        status = run([sys.executable, *command], limit(name), None, **quick)
        if not result.exists():
            found["failed"][f"pytest -k {names!r}"] = f"ended with {status} and without a result"
            continue
        for case in ElementTree.parse(result).iter("testcase"):
            bad = case.find("failure") if case.find("failure") is not None else case.find("error")
            if bad is not None:
                found["failed"][f"{case.get('classname')}::{case.get('name')}"] = (bad.get("message") or "")[:500]
            else:
                found["skipped" if case.find("skipped") is not None else "passed"] += 1
    return {**found, "seconds": round(time.monotonic() - start, 1)}


def benchmark_files(only: str | None) -> list[str]:
    there = {path.stem.removeprefix("test_"): path for path in sorted((ROOT / "benchmarks").glob("test_*.py"))}
    if only is None:
        return [str(there[name].relative_to(ROOT)) for name in BENCHMARKS]
    if only not in there:
        raise SystemExit(f"ONLY is {only!r}; expected one of {', '.join(sorted({*there, *ALIASES}))}")
    return [str(there[only].relative_to(ROOT))]


def benchmarks(targets: Sequence[str], folder: Path, processes: int, limit: Limit) -> dict[str, str]:
    """Measures what `measured` finds in the folder; the errors of what failed twice.

    First shares of the cases side by side: what is large is timed, under a lock, and what is small is compiled. Then,
    in one process and with nothing beside it, what is small, and again what failed.
    """
    with ThreadPoolExecutor(processes) as pool:
        shares = [["--share", f"{i}/{processes}", "--defer-small", *targets] for i in range(processes)]
        logs = [folder / f"share-{i}.jsonl" for i in range(processes)]
        list(pool.map(lambda share, log: attempt(share, log, limit("side by side")), shares, logs))
    first = [line for log in logs for line in read(log)]
    begun = {line.get("begun") for line in first}
    again = [line["deferred"] for line in first if "deferred" in line]
    again += [line["failed"] for line in first if "failed" in line]
    again += [id for line in first for id in line.get("collected", ()) if id not in begun]
    if not all(any("collected" in line for line in read(log)) for log in logs):
        again += targets
    last: list[dict[str, Any]] = []
    if again:
        attempt(list(dict.fromkeys(again)), folder / "quiet.jsonl", limit("quiet"))
        last = read(folder / "quiet.jsonl")
    begun = {line.get("begun") for line in last}
    errors = {id: LATE for id in again if ("::" in id or not last) and id not in begun}
    return errors | {line["failed"]: line["error"] for line in last if "failed" in line}


def measured(folder: Path) -> report.Rows:
    """So far."""
    return [line["row"] for log in sorted(folder.glob("*.jsonl")) for line in read(log) if "row" in line]


@contextmanager
def every(seconds: float, do: Callable[[], object]) -> Iterator[None]:
    """Beside what is within."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(seconds):
            do()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def attempt(arguments: Sequence[str], log: Path, seconds: float) -> None:
    """pytest, and after a crash again from the next test on."""
    end = time.monotonic() + seconds
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.plugin", "-p", "no:cacheprovider"]
    command += ["--benchmark-only", "--benchmark-quiet", "--tb=no", "--no-header", "--continue-on-collection-errors"]
    command += ["--log", str(log), *arguments]
    quick = {"TORCHINDUCTOR_COMPILE_THREADS": "1", **({"OMP_NUM_THREADS": "1"} if DEVICE == "cuda" else {})}
    while True:
        before = len(read(log))
        with log.with_suffix(".out").open("a") as said:
            status = run(command, max(1, end - time.monotonic()), said, **quick)
        lines = read(log)
        finished = {line.get("finished") for line in lines} | {line.get("failed") for line in lines}
        cut = [line["begun"] for line in lines if "begun" in line and line["begun"] not in finished]
        with log.open("a") as file:
            for id in cut:
                why = "took too long" if status == 124 else f"the process ended with {status}"
                file.write(json.dumps({"failed": id, "error": why}) + "\n")
        if status in (0, 1, 5, 124) or len(lines) == before:
            return


def limits() -> dict[str, float]:
    """What shares are of: bytes of a copy and operations of a product of matrices, a second."""
    from benchmarks.harness import copy_bandwidth, gemm_rate

    if DEVICE == "cpu":
        return {}
    found = {"copy_bytes_per_s": copy_bandwidth(2**32), "gemm_flops_per_s": gemm_rate(torch.bfloat16)}
    torch.cuda.empty_cache()  # other processes use the memory, too
    return found


def card() -> str:
    """h100, a100-sxm4-80gb, rtx-4090: the card's name without its maker and its memory."""
    if DEVICE == "cpu":
        return "none"
    words = torch.cuda.get_device_name().split()
    said = [word for word in words if not re.fullmatch(r"NVIDIA|AMD|GeForce|\d+GB|HBM\w*|PCIe|SXM\w*", word)]
    return "-".join(said).lower()


def summary(kept: dict[str, Any]) -> Iterator[str]:
    """What the table does not say, the most important last."""
    yield from (f"{name}: not installed" for name in kept["left_out"])
    if limits := kept.get("limits"):
        copy, gemm = limits["copy_bytes_per_s"] / 1e12, limits["gemm_flops_per_s"] / 1e12
        yield f"limits: copy {copy:.2f} TB/s, bf16 GEMM {gemm:.0f} TFLOP/s"
    if kept.get("recipes"):
        yield recipes.show(kept["recipes"])
    cases = report.by_case(kept["rows"])
    verdicts = [(op, case, judge(op, case, cases)) for op, case in cases if _ours_on_gpu(cases[op, case])]
    judged = [(op, case, verdict) for op, case, verdict in verdicts if verdict is not None]
    yield from (f"goal missed: {op} {case}: {v.says} ({v.value})" for op, case, v in judged if not v.met)
    yield f"goals met: {sum(v.met for *_, v in judged)} of {len(judged)}"
    late = [id for id, error in kept["errors"].items() if error == LATE]
    yield from (f"benchmark failed: {id}: {error[:300]}" for id, error in kept["errors"].items() if error != LATE)
    if late:
        yield f"{len(late)} benchmarks not reached in time: {', '.join(late[:5])}{', …' if late[5:] else ''}"
    if "tests" in kept:
        yield from (f"test failed: {id}: {error[:200]}" for id, error in kept["tests"]["failed"].items())
        counts = f"{kept['tests']['passed']} passed, {len(kept['tests']['failed'])} failed"
        yield f"tests: {counts}, {kept['tests']['skipped']} skipped, {kept['tests']['seconds']:.0f} s"
    yield ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in kept["seconds"].items())


def _ours_on_gpu(measured: Any) -> bool:
    return bool(measured.get("fastdistill", {}).get("device") == "cuda")


@contextmanager
def clocked(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[stage] = round(time.monotonic() - start, 1)


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one op, or one benchmark by its file's name")
    parser.add_argument("--output", type=Path, help="folder (default: benchmarks/results; runs with --only)")
    parser.add_argument("--stages", default=None, help=f"default: {','.join(STAGES)}; no recipes with --only")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"at most (default: {MINUTES})")
    parser.add_argument("--processes", type=int, default=max(1, min(8, CORES // 2)), help="of benchmarks")
    options = parser.parse_args(None if arguments is None else list(arguments))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored, by children too
    only = options.only and ALIASES.get(options.only, options.only.rstrip("_"))
    stages = options.stages.split(",") if options.stages else STAGES[:2] if only else STAGES
    targets = benchmark_files(only)
    output = options.output or (ROOT / "runs" if only else report.RESULTS)
    output.mkdir(parents=True, exist_ok=True)
    folder, seconds = Path(tempfile.mkdtemp()), dict[str, float]()
    results: dict[str, Any] = {"errors": {}}

    end: float = time.monotonic() + 60 * options.minutes
    name = f"gpu-{card()}" + (f"-{only}" if only else "")

    def limit(part: str) -> float:
        return max(1.0, min(SECONDS[part], end - time.monotonic()))

    def save() -> dict[str, Any]:
        kept = report.keep(measured(folder), left_out=missing(), seconds=seconds, **results)
        report.write(output / f"{name}.json", json.dumps(kept, indent=1) + "\n")
        return kept

    if "tests" in stages:
        with clocked(seconds, "tests"):
            results["tests"] = tests(only, folder, limit)
        save()
    if "benchmarks" in stages:
        with clocked(seconds, "benchmarks"):
            results["limits"] = limits()
            with every(SAVED, save):  # whoever stops this, or lends no more time, has what there is by then
                results["errors"] = benchmarks(targets, folder, options.processes, limit)
        save()
    if "recipes" in stages:
        with clocked(seconds, "recipes"):
            results["recipes"] = recipes.run(folder, limit("recipes"))

    kept = save()
    if kept["rows"]:
        print(report.show(kept, name, output))
    print("\n".join(summary(kept)))
    failed = results.get("tests", {}).get("failed") or results["errors"]
    return int(bool(failed) or any(one["status"] for one in results.get("recipes", {}).values()))


if __name__ == "__main__":
    sys.exit(main())
