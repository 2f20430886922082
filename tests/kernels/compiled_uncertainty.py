"""``python -m tests.kernels.compiled_uncertainty ARCH``: what `compiled` prints, of uncertainty and its gradient."""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import torch
import triton
from fastdistill.kernels import uncertainty as module

from tests.kernels.compiled import Offline, Recorder, resources

SHAPES = [(64, 3), (8, 1000), (2, 128256)]
KINDS = ("entropy", "least_confidence", "margin")
DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def main(arch: int) -> None:
    triton.runtime.driver.set_active(Offline(arch))
    compiled: list[Any] = []
    module._uncertainty_kernel = Recorder(module._uncertainty_kernel, compiled)
    for (rows, classes), kind, dtype in itertools.product(SHAPES, KINDS, DTYPES):
        logits = torch.zeros(rows, classes, dtype=dtype)
        upstream = module.uncertainty(logits, kind, True)
        module.uncertainty_backward(upstream, logits, kind, True)
        for what, kernel in zip(("values", "gradient"), compiled, strict=True):
            case = f"{what} {rows}x{classes} {kind} {dtype}"
            print(json.dumps({"case": case, "warps": kernel.metadata.num_warps, **resources(kernel.asm["cubin"])}))
        compiled.clear()


if __name__ == "__main__":
    main(int(sys.argv[1]))
