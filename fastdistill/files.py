"""Files that are written whole or not at all, and told from damaged ones."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which at the end takes the place of `path`: that is at any moment, and after any crash,
    the old file or the new one. What a cut-off writing has left is written over by the next."""
    temporary = path.with_name(f".{path.name}.part")
    yield temporary
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Return when the disk has what was written to a file, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(*([OSError] if path.is_dir() else [])):  # some file systems cannot, of folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of these files of a folder, by name; each is on the disk when it is told."""
    found = {}
    for name in sorted(names):
        sync(folder / name)
        found[name] = _sha256(folder / name)
    sync(folder)
    return found


def damage(folder: Path, expected: Mapping[str, str]) -> str:
    """What is wrong with files of which `digests` told this before; nothing if they are as they were."""
    for name, digest in expected.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _sha256(folder / name) != digest:
            return f"{name} is not as it was written"
    return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors and metadata; ValueError if it is damaged, OSError if there is none."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or damaged: {error}") from None
