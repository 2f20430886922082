"""Calls of scale_rows and scale_rows_, for `tests.kernels.compiled`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from fastdistill.kernels import scale_rows as module

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CASES = [(rows, classes, dtype) for rows, classes in ((32, 2), (4096, 3), (2, 50257), (2, 128256)) for dtype in DTYPES]
FEW = CASES[:1]


def launches(cases: list[tuple[int, int, torch.dtype]]) -> Iterator[str]:
    for rows, classes, dtype in cases:
        grad = torch.zeros(rows, classes, dtype=dtype)
        module.scale_rows_(grad, torch.ones(()))
        module.scale_rows(grad, torch.ones(rows))
        yield f"{rows}x{classes} {dtype}"
