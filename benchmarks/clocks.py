"""Two clocks for work on a GPU, and the lock under which either runs: compiling is done side by side, timing alone."""

from __future__ import annotations

import fcntl
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

LOCK = Path(tempfile.gettempdir()) / "fastdistill-benchmarks.lock"
NOISY = 0.1  # of the median: a measurement whose quartiles lie further apart is made again


@contextmanager
def alone() -> Iterator[None]:
    """No other process that asks for this runs meanwhile."""
    with LOCK.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def spread(times: list[float]) -> float:
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return high - low


def device_clock(function: Callable[[], Any]) -> list[float]:
    """Seconds of each of many calls on the device itself, the caches emptied before each."""
    from triton.testing import do_bench

    once = _elapsed(function, 1)
    warmup, repeat = min(10, 1e3 * once + 3), max(50, 8e3 * once)  # ms
    best: list[float] = []
    for _ in range(3):
        times = [1e-3 * ms for ms in do_bench(function, warmup=warmup, rep=repeat, return_mode="all")]
        best = min((times, best or times), key=lambda t: spread(t) / statistics.median(t))
        if spread(best) < NOISY * statistics.median(best):
            break
    return best


def host_clock(function: Callable[[], Any]) -> list[float]:
    """Seconds a call of many calls in a row, as a training loop makes them: where launching takes longer than the work,
    that is what is seen."""
    once = _elapsed(function, 1)
    calls = max(1, int(max(0.02 / once, min(4, 0.2 / once))))
    _elapsed(function, min(calls, 20))
    return [_elapsed(function, calls) for _ in range(7 if once < 0.1 else 3)]


def _elapsed(function: Callable[[], Any], calls: int) -> float:
    """Seconds a call."""
    _synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _synchronize()
    return (time.perf_counter() - start) / calls


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
