"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which at the end takes the place of `path`: that is at any moment the old file or the
    new one. What a cut-off writing has left is written over by the next."""
    temporary = path.with_name(f".{path.name}.part")
    yield temporary
    os.replace(temporary, path)
