"""For pytest, as ``-p benchmarks.plugin``: a share of the cases, small ones put off, and a log of what became of each
test that outlives the process.

    python -m pytest -p benchmarks.plugin benchmarks --benchmark-only --log LOG --share 0/8 --defer-small
"""

from __future__ import annotations

import gc
import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness

DEAD = ("CUDA error", "CUDA driver error", "device-side assert")
"""Errors after which a process can do nothing more on its device."""
DEVICE_LOST = 70  # exit status
SLOW = ("torch.compile", "FlexAttention")


class Log(harness.Recorder):
    def __init__(self, path: Path, defer: bool) -> None:
        self.path, self.postpone = path, defer

    def write(self, **line: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def row(self, benchmark: Any, row: dict[str, Any]) -> None:
        self.write(row=row)

    def defer(self, benchmark: Any) -> None:
        if self.postpone:
            self.write(deferred=benchmark.fullname)
            pytest.skip("small: measured when nothing else runs")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks")
    group.addoption("--log", type=Path, required=True, help="file that a JSON line is added to for all that happens")
    group.addoption("--share", default="0/1", help="I/N: every Nth case from the Ith, all its implementations")
    group.addoption("--defer-small", action="store_true", help="compile what is small, and leave measuring it to later")


def pytest_configure(config: pytest.Config) -> None:
    harness.recorder = Log(config.getoption("--log"), config.getoption("--defer-small"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves other processes' cases out, and what the log says was begun. What compiles comes last: should the time
    run out, other measurements are there."""
    part, parts = map(int, config.getoption("--share").split("/"))
    path = config.getoption("--log")
    begun = {line.get("begun") for line in read(path)}
    cases = list(dict.fromkeys(map(_case, items)))
    kept = [item for item in items if cases.index(_case(item)) % parts == part and item.nodeid not in begun]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = sorted(kept, key=lambda item: any(name in item.nodeid for name in SLOW))
    _log().write(collected=[item.nodeid for item in kept])


def read(log: Path) -> list[dict[str, Any]]:
    """The whole lines: another process may be writing one."""
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _case(item: pytest.Item) -> tuple[str, str]:
    parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    parameters.pop("implementation", None)
    return item.nodeid.partition("[")[0], repr(parameters)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _log().write(failed=report.nodeid, error=str(report.longrepr)[-2000:])


def pytest_runtest_logstart(nodeid: str) -> None:
    _log().write(begun=nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        error = f"{type(call.excinfo.value).__name__}: {call.excinfo.value}"[:2000] if call.excinfo else "failed"
        _log().write(failed=item.nodeid, error=error)
        if any(text in error for text in DEAD):
            pytest.exit(error, returncode=DEVICE_LOST)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Gives the device's memory back: other processes use it, too."""
    yield
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pytest_runtest_logfinish(nodeid: str) -> None:
    _log().write(finished=nodeid)


def _log() -> Log:
    assert isinstance(harness.recorder, Log)
    return harness.recorder
