"""Files that are written whole or not at all, and told from damaged ones."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash
from rich.filesize import decimal
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastdistill.digest import digest, tensor_pieces

DIGEST = "xxh3_128"
"""Of all else that a safetensors file holds; among its metadata."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it a disk that is full, or takes no more for another reason, is an OSError that names the path, whichever
    library writes: safetensors and PyTorch raise errors of their own."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in _WRITERS):
            raise
        free = decimal(shutil.disk_usage(path.parent).free)
        told = " ".join(str(error).split())
        raise OSError(f"{path} could not be written, with {free} free on its disk: {told}") from error


_WRITERS = ("inline_container", "PytorchStreamWriter", "file write failed")
"""What a RuntimeError of torch.save says."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which at the end takes the place of `path`: that is at any moment, and after any crash,
    the old file or the new one. What a killed writing has left is written over by the next."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with writing(path):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk needs the room
        raise


def check_file(argument: str, path: str | Path) -> None:
    """Raises ValueError for a path where no file can be written."""
    if Path(path).is_dir():
        raise ValueError(f"{argument} is {path}, a folder; expected a file's name")
    if not Path(path).parent.is_dir():
        raise ValueError(f"{argument} is {path}, in a folder that is not there; expected one that is")


def sync(path: Path) -> None:
    """Return when the disk has what was written to a file, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(*([OSError] if path.is_dir() else [])):  # some file systems cannot, of folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The digests of these files of a folder, by name; each is on the disk when it is told."""
    found = {}
    for name in sorted(names):
        sync(folder / name)
        found[name] = _file_digest(folder / name)
    sync(folder)
    return found


def damage(folder: Path, expected: Mapping[str, str]) -> str:
    """What is wrong with files of which `digests` told this before; nothing if they are as they were."""
    for name, told in expected.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _file_digest(folder / name) != told:
            return f"{name} is not as it was written"
    return ""


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A safetensors file, with a digest of all that it holds."""
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata | {DIGEST: _digest(tensors, metadata)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata that `save_tensors` wrote; ValueError if they are not as they were, OSError if there is
    no such file."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or damaged: {error}") from None
    if metadata.pop(DIGEST, None) != _digest(tensors, metadata):
        raise ValueError(f"{path} is damaged, or of another program: it has not the digest of what it holds")
    return tensors, metadata


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    return digest([json.dumps(metadata, sort_keys=True), *tensor_pieces(tensors)])
