"""Checkpoints that can be relied on: each has a list of its files' digests, written last."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]
from rich.console import Console

from fastdistill.files import damage, digests, replacing

SEAL = "files.json"
"""Is beside a checkpoint's files, and names them all with their digests."""


def seal(checkpoint: Path) -> None:
    """Say that a checkpoint is whole: from here on it counts. Its files are on the disk before."""
    found = digests(checkpoint, _names(checkpoint))
    with replacing(checkpoint / SEAL) as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n")


def fault(checkpoint: Path) -> str:
    """Why a checkpoint is not as it was sealed; nothing if it is."""
    try:
        expected = json.loads((checkpoint / SEAL).read_text())
        if not isinstance(expected, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        return f"{SEAL} is missing or damaged: {error}"
    if foreign := _names(checkpoint) - expected.keys():
        return f"{min(foreign)} was not saved with it"
    return damage(checkpoint, expected)


def last_whole(folder: Path) -> str | None:
    """The latest checkpoint within a folder that is as it was written.

    A line tells of each that is damaged; one that was cut off while it was written was none yet. The main process looks
    for all.
    """
    [found] = broadcast_object_list([_last_whole(folder) if PartialState().is_main_process else None])
    return None if found is None else str(found)


def _last_whole(folder: Path) -> str | None:
    for checkpoint in checkpoints(folder):
        if not (wrong := fault(checkpoint)):
            return str(checkpoint)
        if is_sealed(checkpoint):
            told = f"{folder.name}: {checkpoint.name} is damaged ({wrong}); left for what was before it"
            Console(stderr=True).print(told, highlight=False, soft_wrap=True)
    return None


def is_sealed(checkpoint: Path) -> bool:
    """Whether it was written to its end."""
    return (checkpoint / SEAL).exists()


def checkpoints(folder: Path) -> Iterator[Path]:
    """The latest first."""
    found = [(path.name.rpartition("-")[2], path) for path in folder.glob("checkpoint-*") if path.is_dir()]
    yield from (path for _, path in sorted((-int(number), path) for number, path in found if number.isdecimal()))


def _names(checkpoint: Path) -> set[str]:
    files = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    return {name for name in files if name not in (SEAL, f".{SEAL}.part")}
