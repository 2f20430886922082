"""Compiles, with no GPU, every kernel that a call of the launcher would launch, and prints what each needs.

``python -m tests.kernels.compiled ARCH`` prints one JSON object a kernel: its name, what it was compiled for, warps,
registers a thread, bytes of stack and of local memory (where a compiler puts what does not fit in registers), and how
many parameters are float64.
A process of its own: Triton compiles only where it does not interpret, and one process does one of the two.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import triton
from fastdistill.kernels import kd_ce_loss as module
from triton.backends.compiler import GPUTarget

OPTIONS = {
    "temperature": 2.0, "kd_weight": 0.5, "ce_weight": 0.5, "divergence": "forward_kl", "scale_by_temperature": True,
    "ignore_index": -100, "label_smoothing": 0.0, "reduction": "mean", "student_grad": True, "teacher_grad": False,
}  # fmt: skip
HALF, SINGLE, DOUBLE = (torch.bfloat16,) * 2, (torch.float32,) * 2, (torch.float64,) * 2
EVERYTHING = {"teacher_grad": True, "label_smoothing": 0.1, "temperature": 3.7}
CASES: list[tuple[int, int, tuple[torch.dtype, torch.dtype], dict[str, Any]]] = [
    (32, 2, HALF, {}),
    (32, 2, SINGLE, {}),
    (4096, 3, HALF, {}),
    (4096, 3, SINGLE, {}),
    (8, 1000, HALF, EVERYTHING),
    (2, 32000, HALF, {}),
    (2, 32000, SINGLE, {}),
    (2, 50257, HALF, {}),
    (2, 128256, HALF, {}),
    (2, 128256, HALF, {"student_grad": False}),
    (2, 128256, HALF, {"kd_weight": 0.0}),
    (2, 128256, HALF, {"divergence": "reverse_kl", "temperature": 3.7}),
    (2, 128256, HALF, EVERYTHING),
    (2, 128256, (torch.bfloat16, torch.float32), {"divergence": "soft_ce", "temperature": 3.7}),
    (2, 128256, SINGLE, {}),
    (2, 128256, DOUBLE, EVERYTHING),
]


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
    """Stands where a kernel stood: compiles instead of launching."""

    def __init__(self, kernel: Any, compiled: list[Any]) -> None:
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile(*args: Any, **options: Any) -> None:
            self.compiled.append(self.kernel.warmup(*args, grid=grid, **options))

        return compile


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(usage["REG"]), "stack": int(usage["STACK"]), "local": int(usage["LOCAL"])}


def main(arch: int) -> None:
    triton.runtime.driver.set_active(Offline(arch))
    compiled: list[Any] = []
    for name in [n for n in vars(module) if n.endswith("_kernel")]:
        setattr(module, name, Recorder(getattr(module, name), compiled))
    for rows, classes, dtypes, changes in CASES:
        compiled.clear()
        student, teacher = (torch.zeros(rows, classes, dtype=dtype) for dtype in dtypes)
        labels = torch.zeros(rows, dtype=torch.int64)
        _, grad, _ = module.kd_ce_loss(student, teacher, labels, **{**OPTIONS, **changes})
        if grad.numel():
            module.scale_rows_(grad, torch.ones(()))
            module.scale_rows(grad, torch.ones(rows))
        for kernel in compiled:
            what = f"{rows}x{classes} {' '.join(str(d)[6:] for d in dtypes)} {changes or ''}"
            print(json.dumps({
                "kernel": kernel.metadata.name, "case": what, "warps": kernel.metadata.num_warps,
                **resources(kernel.asm["cubin"]), "double_parameters": kernel.asm["ptx"].count(".param .f64"),
            }))  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]))
