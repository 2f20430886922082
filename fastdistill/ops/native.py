"""Loads the compiled kernels that fit this machine and this PyTorch, or says in one line why none were loaded.

Environment: ``FASTDISTILL_NATIVE=0`` leaves the C++ and CUDA kernels out, so that plain PyTorch computes every op.
"""

from __future__ import annotations

import importlib
import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

PACKAGE = Path(__file__).parent.parent


@dataclass
class Native:
    """What was found: the C++ module in use, whether CUDA kernels loaded, and why not where they did not."""

    cpu: ModuleType | None = None
    cuda: bool = False
    build: dict[str, Any] = field(default_factory=dict)
    why_no_cpu: str = ""
    why_no_cuda: str = ""


def load() -> Native:
    """Import the C++ module for PyTorch's own CPU capability, and the CUDA library if one was built."""
    native = Native()
    reason = _unfit(native)
    if reason:
        native.why_no_cpu = native.why_no_cuda = reason
        return native
    isa = torch.backends.cpu.get_cpu_capability()
    built = [name.rpartition("_C_")[2] for name in native.build["modules"] if "_C_" in name]
    if isa.lower() not in built:
        native.why_no_cpu = f"this machine runs {isa}; built for {', '.join(built) or 'nothing'}"
    else:
        try:
            native.cpu = importlib.import_module(f"fastdistill._C_{isa.lower()}")
        except ImportError as error:
            native.why_no_cpu = f"the {isa} module does not load: {str(error).splitlines()[0]}"
            warnings.warn(f"fastdistill: {native.why_no_cpu}; PyTorch computes instead", stacklevel=2)
    if "fastdistill._cuda" not in native.build["modules"]:
        native.why_no_cuda = "built without CUDA"
    elif not torch.version.cuda:
        native.why_no_cuda = "this PyTorch has no CUDA"
    else:
        try:
            torch.ops.load_library(next(PACKAGE.glob("_cuda*.so")))
            native.cuda = True
        except (OSError, StopIteration) as error:
            native.why_no_cuda = f"the CUDA library does not load: {str(error).splitlines()[0]}"
            warnings.warn(f"fastdistill: {native.why_no_cuda}; PyTorch computes instead", stacklevel=2)
    return native


def _unfit(native: Native) -> str:
    """Why nothing compiled can be loaded, or an empty string."""
    if os.environ.get("FASTDISTILL_NATIVE") == "0":
        return "FASTDISTILL_NATIVE=0"
    try:
        native.build = json.loads((PACKAGE / "_build.json").read_text())
    except FileNotFoundError:
        return "built without a compiler or without torch (use pip install --no-build-isolation)"
    if _series(native.build["torch"]) != _series(torch.__version__):
        reason = (
            f"built for torch {native.build['torch']} but torch {torch.__version__} is running; "
            "rebuild with pip install --no-build-isolation --force-reinstall --no-deps fastdistill"
        )
        warnings.warn(f"fastdistill: {reason}. PyTorch computes instead", stacklevel=3)
        return reason
    return ""


def _series(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


NATIVE = load()
