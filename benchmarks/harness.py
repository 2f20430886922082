"""How everything here is timed: the same work by several implementations, in one run, medians, with what it allocates
and what share of the machine's copy bandwidth or rate of matrix products it reaches."""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.clocks import alone, device_clock, host_clock, spread

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = os.environ.get("FASTDISTILL_BENCHMARK_SIZES") == "tiny"  # to try the benchmarks, not to measure
SECONDS = 0.01 if TINY else 1.5  # spent on one measurement, about
OURS = "fastdistill"
LARGE = 2**26  # bytes: from here on, well out of the caches, a share of the copy bandwidth means something

T = TypeVar("T")


def sizes(*, tiny: T, cpu: T, cuda: T) -> T:
    """What to measure here."""
    return tiny if TINY else cuda if DEVICE == "cuda" else cpu


class Recorder:
    """Where each row goes the moment it is measured, and what is left for later; ``benchmarks.plugin`` has its own."""

    def row(self, benchmark: Any, row: dict[str, Any]) -> None:
        pass

    def defer(self, benchmark: Any) -> None:
        """Called for small work, which is compiled by then; may skip the test."""


recorder = Recorder()


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(function: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def measure(
    benchmark: Any,
    function: Callable[[], Any],
    *,
    op: str,
    case: str,
    implementation: str,
    dtype: torch.dtype = torch.float32,
    bytes_moved: int = 0,
    flops: float = 0,
    small: bool | None = None,
) -> None:
    """Time ``function`` and note beside its median what the report needs.

    On a GPU small work is timed by the host's clock over many calls in a row, the rest by the device's; on a CPU
    pytest-benchmark times it.

    ``bytes_moved``: the fewest bytes the work can move, for its share of the copy bandwidth. ``flops``: the fewest
    operations, for its share of the rate at which large matrices are multiplied. ``small``: whether launching may take
    longer than the work; all implementations of a case must say the same (default: moves less than 64 MiB).
    """
    small = bytes_moved < LARGE if small is None else small
    for _ in range(2):  # compiles, allocates, warms caches
        function()
    synchronize()
    if small:
        recorder.defer(benchmark)
    benchmark.group = f"{op} {case}"
    row: dict[str, Any] = {
        "op": op, "case": case, "implementation": implementation, "device": DEVICE,
        "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    with alone():
        row["peak_extra_bytes"] = peak_extra_bytes(function)
        _on_gpu(benchmark, function, row, small) if DEVICE == "cuda" else _on_cpu(benchmark, function, row)
        if implementation.startswith(OURS) and "median_s" in row:
            if bytes_moved >= LARGE:
                row["copy_share"] = bytes_moved / row["median_s"] / copy_bandwidth(bytes_moved)
            if flops and DEVICE == "cuda":
                row["gemm_share"] = flops / row["median_s"] / gemm_rate(dtype)
    benchmark.extra_info.update(row)
    if "median_s" in row:
        recorder.row(benchmark, row)


def measure_recipe(
    benchmark: Any, run: Callable[[int, Path], float], seeds: Sequence[int], folder: Path, **row: Any
) -> None:
    """Time a recipe once for each seed; what it gives, the accuracy, is noted with the times."""
    accuracies = []

    def once(seed: int) -> None:
        start = time.perf_counter()
        accuracies.append(run(seed, folder / str(seed)))
        seconds = time.perf_counter() - start
        print(f"{row['implementation']}, seed {seed}: {accuracies[-1]:.4f}, {seconds:.0f} s")

    left = iter(seeds)
    benchmark.pedantic(lambda: once(next(left)), iterations=1, rounds=len(seeds))
    benchmark.extra_info.update(row, device=DEVICE, peak_extra_bytes=None, accuracies=accuracies)


def _on_gpu(benchmark: Any, function: Callable[[], Any], row: dict[str, Any], small: bool) -> None:
    times = (host_clock if small else device_clock)(function)
    row["clock"] = "host" if small else "device"
    row.update(median_s=statistics.median(times), iqr_s=spread(times), rounds=len(times))
    benchmark.pedantic(lambda: timed(function), rounds=3)  # pytest-benchmark's own table, of single calls


def _on_cpu(benchmark: Any, function: Callable[[], Any], row: dict[str, Any]) -> None:
    once = statistics.median(timed(function) for _ in range(3))
    iterations = max(1, int(2e-3 / once))
    rounds = max(5, min(200, int(SECONDS / (once * iterations))))
    benchmark.pedantic(function, iterations=iterations, rounds=rounds, warmup_rounds=1)
    if benchmark.stats is not None:
        stats = benchmark.stats.stats
        row.update(median_s=stats.median, iqr_s=stats.iqr, rounds=stats.rounds)


@functools.cache
def copy_bandwidth(bytes_moved: int) -> float:
    """Bytes a second, read and written, of copying a tensor. On a CPU the move as a whole is as large as the work's; on
    a GPU it is 4 GiB, the card's best, whatever the work's."""
    if DEVICE == "cuda" and bytes_moved != 2**32:
        return copy_bandwidth(2**32)
    source = torch.ones(bytes_moved // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.zeros_like(source)
    target.copy_(source)
    times = device_clock(lambda: target.copy_(source)) if DEVICE == "cuda" else None
    return bytes_moved / statistics.median(times or [timed(lambda: target.copy_(source)) for _ in range(9)])


@functools.cache
def gemm_rate(dtype: torch.dtype, size: int = 8192) -> float:
    """Operations a second of a product of two large matrices of random numbers."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * size**3 / statistics.median(device_clock(lambda: a @ b))


def peak_extra_bytes(function: Callable[[], Any]) -> int | None:
    """The most memory held at once during a call beyond what was held before it; None where it cannot be told."""
    if DEVICE == "cuda":
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory starts anew
    except OSError:
        return None
    before = _resident("VmRSS")
    function()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024
