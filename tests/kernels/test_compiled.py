"""Every kernel compiles for every architecture without a GPU, and keeps everything in registers."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURES = (80, 90, 100)


@pytest.fixture(scope="module")
def compilers() -> dict[int, Popen[str]]:
    """All at once: each uses one core."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.compiled"]
    return {
        arch: Popen([*command, str(arch)], stdout=PIPE, stderr=PIPE, text=True, cwd=ROOT, env=environment)
        for arch in ARCHITECTURES
    }


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_without_spills(compilers: dict[int, Popen[str]], arch: int) -> None:
    out, errors = compilers[arch].communicate()
    assert compilers[arch].returncode == 0, errors
    kernels: list[dict[str, Any]] = [json.loads(line) for line in out.splitlines()]
    names = {kernel["kernel"] for kernel in kernels}
    assert names == {"_count_kernel", "_reduce_kernel", "_tile_kernel", "_sweep_kernel", "_scale_kernel"}
    for kernel in kernels:
        print(kernel)
        assert kernel["stack"] == kernel["local"] == 0, f"spills: {kernel}"
        assert kernel["registers"] * kernel["warps"] * 32 <= 65536, f"does not fit a multiprocessor: {kernel}"
        weights = 4 if kernel["kernel"] in ("_tile_kernel", "_sweep_kernel") else 0
        assert kernel["double_parameters"] == weights, f"weights passed in less than float64: {kernel}"
    small = [kernel["kernel"] for kernel in kernels if kernel["case"].startswith("32x2 ")]
    assert small == ["_tile_kernel", "_scale_kernel", "_scale_kernel"] * 2, "a small batch takes one launch each way"
