"""Compiles, with no GPU, every kernel that an op's launcher would launch, and prints what each needs.

``python -m tests.kernels.compiled OP ARCH`` makes the calls of `tests.kernels.compiled_OP`, for sm_90 all of them and
for others a few that launch every kernel, and prints one JSON object a kernel: its name, what it was compiled for,
warps, registers a thread, bytes of stack and of local memory (where a compiler puts what does not fit in registers), of
shared memory, and how many parameters are float64.
A process of its own: Triton compiles only where it does not interpret, and one process does one of the two.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import triton
from triton.backends.compiler import GPUTarget


class Offline:
    """A driver for a device that is not there."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Recorder:
    """Stands where a kernel stood: compiles instead of launching, unless its launcher has compiled it first."""

    def __init__(self, kernel: Any, compiled: list[Any]) -> None:
        self.kernel, self.compiled, self.warm = kernel, compiled, False

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            if not self.warm:
                self.compiled.append(self.kernel.warmup(*args, grid=grid, **options))

        return launch

    def warmup(self, *args: Any, **options: Any) -> None:
        self.compiled.append(self.kernel.warmup(*args, **options))
        self.warm = True


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(usage["REG"]), "stack": int(usage["STACK"]), "local": int(usage["LOCAL"])}


def main(op: str, arch: int) -> None:
    triton.runtime.driver.set_active(Offline(arch))
    module, calls = (
        importlib.import_module(f"fastdistill.kernels.{op}"),
        importlib.import_module(f"{__package__}.compiled_{op}"),
    )
    compiled: list[Any] = []
    for name in [n for n in vars(module) if n.endswith("_kernel")]:
        setattr(module, name, Recorder(getattr(module, name), compiled))
    for case in calls.launches(calls.CASES if arch == 90 else calls.FEW):
        for kernel in compiled:
            print(json.dumps({
                "kernel": kernel.metadata.name, "case": case, "warps": kernel.metadata.num_warps,
                "shared": kernel.metadata.shared, **resources(kernel.asm["cubin"]),
                "double_parameters": kernel.asm["ptx"].count(".param .f64"),
            }), flush=True)  # fmt: skip
        compiled.clear()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
