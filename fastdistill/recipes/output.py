"""The folder that a run writes to: no other run's at the same time, and no other recipe's."""

from __future__ import annotations

import functools
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]
from filelock import FileLock, Timeout

from fastdistill.processes import join
from fastdistill.recipes.report import Report, write_json
from fastdistill.recipes.settings import RecipeSettings

Asked = TypeVar("Asked", bound=RecipeSettings)

RESULTS = "results.json"
LOCK, HOLDER = ".lock", ".run.json"
"""There while a run goes on; what a killed one leaves of them is no hindrance."""


@contextmanager
def claimed(output: Path, recipe: str, *, overwrite: bool = False) -> Iterator[None]:
    """Within it the folder, which is made, is this run's.

    The lock is the kernel's: one of a process that has died is free. Of several processes (torchrun) the main one holds
    it for all. Raises ValueError where another run has it; where `output` is a file, or a link to nothing; and where
    it has results.json of another recipe or program, unless they may be written over.
    """
    processes = join()
    with ExitStack() as held:
        refusal = _claim(output, recipe, overwrite, held) if processes.is_main_process else ""
        [refusal] = broadcast_object_list([refusal])
        if refusal:
            raise ValueError(refusal)
        yield


def of_one_run(recipe: Callable[[Asked], Report]) -> Callable[[Asked], Report]:
    """The recipe, but within its folder, `claimed`."""

    @functools.wraps(recipe)
    def run(settings: Asked) -> Report:
        with claimed(settings.folder, settings.command, overwrite=settings.overwrite):
            return recipe(settings)

    return run


def _claim(output: Path, recipe: str, overwrite: bool, held: ExitStack) -> str:
    """Take the folder until `held` is left; or why it cannot be."""
    if not output.is_dir() and os.path.lexists(output):
        what = f"a link to {os.readlink(output)}, which is not there" if output.is_symlink() else "a file"
        return f"--output is {output}, {what}; expected a folder, or the name of a new one"
    if not output.exists():
        output.mkdir(parents=True)
        held.callback(_remove_empty, output)
    lock = FileLock(output / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return f"another run uses {output}{_holder(output)}; expected another --output, or wait until it ends"
    held.callback(lock.release)
    for file in (LOCK, HOLDER):
        held.callback((output / file).unlink, missing_ok=True)
    results = output / RESULTS
    if results.exists() and not overwrite and (other := _recipe_of(results)) != recipe:
        whose = f"of {other}" if other else "no results of fastdistill"
        return f"{results} is {whose}, and would be written over; expected another --output, or --overwrite"
    since = datetime.now().isoformat(" ", "seconds")
    write_json(output / HOLDER, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
    return ""


def _holder(output: Path) -> str:
    with suppress(OSError, ValueError, KeyError, TypeError):  # it is just being written
        found = json.loads((output / HOLDER).read_text())
        return f" (pid {found['pid']} on {found['host']}, since {found['since']})"
    return ""


def _recipe_of(results: Path) -> Any:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads(results.read_text())["settings"]["command"]
    return None


def _remove_empty(output: Path) -> None:
    with suppress(OSError):  # of a run that was refused; else there is something in it
        output.rmdir()
