"""Processes beside a test's, forked from one that has imported once what they all need."""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.tiny", "fastdistill.cli", "fastdistill.recipes"])


def start(function: Callable[..., Any], *arguments: Any, said: Path | None = None, **environment: str) -> BaseProcess:
    """Calls it there; what it prints goes to the file `said`."""
    process = FORKS.Process(target=_call, args=(function, arguments, said, environment), daemon=True)
    process.start()
    return process


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], said: Path | None, environment: Any) -> None:
    gc.freeze()  # as in conftest.py
    os.environ |= environment
    with open(said or os.devnull, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    function(*arguments)


def kill_when(is_time: Callable[[], Any], process: BaseProcess) -> None:
    while not is_time():
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()


def run_module(name: str, *arguments: str) -> None:
    """As ``python -m`` does."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
