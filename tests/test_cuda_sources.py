"""Every CUDA source compiles beside this torch without a GPU, keeps everything in registers, and uses only the headers
that make one binary serve many versions of torch."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

SOURCES = sorted((Path(__file__).parents[1] / "csrc" / "cuda").glob("*.cu"))
BY_ARCH = [path for path in SOURCES if path.stem == "kd_ce_loss"]  # the others have the same code for all
STABLE = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize(
    ("source", "arch"),
    [*((path, 90) for path in SOURCES), *((path, 80) for path in BY_ARCH)],
    ids=lambda value: getattr(value, "stem", None),
)
def test_compiles_without_spills(source: Path, arch: int, tmp_path: Path) -> None:
    headers = tmp_path / "headers.d"
    output = "-c" if arch == 90 else "-cubin"  # what the host runs is compiled once
    command = ["nvcc", output, str(source), "-o", str(tmp_path / "object.o"), "-MD", "-MF", str(headers)]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-O3", "-std=c++20", "-Xptxas=-v", *COMMON_NVCC_FLAGS]
    command += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]  # as in setup.py
    command += [f"-isystem={path}" for path in include_paths()]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    memory = re.findall(r"Function properties for (\w+)\n\s*(.*)", result.stderr)
    assert memory, result.stderr
    for kernel, used in memory:
        assert used == "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", f"{kernel}: {used}"

    included = re.findall(r"torch/include/(\S+)", headers.read_text())
    assert included and not [header for header in included if not header.startswith(STABLE)]


def test_there_are_sources() -> None:
    assert len(SOURCES) > 1


def test_others_have_the_same_code_for_every_architecture() -> None:
    by_arch = re.compile(r"__CUDA_ARCH__|#include .(hopper|kd_\w+)\.cuh")
    assert [path for path in SOURCES if by_arch.search(path.read_text())] == BY_ARCH
