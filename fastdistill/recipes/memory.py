"""How much memory a stage takes at most."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


def reset_peak() -> None:
    """From here on `peak` counts."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # not Linux, or not allowed
            (PROCESS / "clear_refs").write_text("5")


def peak() -> int | None:
    """Bytes: of this process's tensors on the GPU where there is one, else of all that the process has in memory. None
    where the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with suppress(OSError):
        for line in (PROCESS / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
