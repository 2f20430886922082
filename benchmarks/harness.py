"""How everything here is timed: the same work by several implementations, in one run, medians, with what it allocates
and what share of the machine's copy bandwidth it reaches."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECONDS = 1.5  # spent on one measurement, about
OURS = "fastdistill"
LARGE = 2**26  # bytes: from here on, well out of the caches, a share of the copy bandwidth means something


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
) -> None:
    """Time ``function`` by pytest-benchmark and note beside it what the report needs.

    ``bytes_moved``: the fewest bytes the work can move, for its share of the copy bandwidth.
    """
    for _ in range(2):  # compiles, allocates, warms caches
        function()
    once = statistics.median(timed(function) for _ in range(3))
    iterations = max(1, int(2e-3 / once))
    rounds = max(5, min(200, int(SECONDS / (once * iterations))))

    def run() -> None:
        function()
        synchronize()

    benchmark.group = f"{op} {case}"
    benchmark.extra_info.update(
        op=op, case=case, implementation=implementation, device=DEVICE, dtype=str(dtype).removeprefix("torch."),
        peak_extra_bytes=peak_extra_bytes(function),
    )  # fmt: skip
    benchmark.pedantic(run, iterations=iterations, rounds=rounds, warmup_rounds=1)
    if bytes_moved >= LARGE and benchmark.stats is not None:
        rate = bytes_moved / benchmark.stats.stats.median
        benchmark.extra_info["copy_share"] = rate / copy_bandwidth(bytes_moved)


@functools.cache
def copy_bandwidth(bytes_moved: int) -> float:
    """Bytes a second, read and written, of copying a tensor, the move as a whole being as large as the work's."""
    source = torch.ones(bytes_moved // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.zeros_like(source)
    target.copy_(source)
    return bytes_moved / statistics.median(timed(lambda: target.copy_(source)) for _ in range(9))


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
