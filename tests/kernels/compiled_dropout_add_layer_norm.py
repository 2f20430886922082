"""Calls of dropout_add_layer_norm and its gradient, for `tests.kernels.compiled`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from fastdistill.kernels import dropout_add_layer_norm as module

BFLOAT16, FLOAT = torch.bfloat16, torch.float32
CASES: list[tuple[Any, ...]] = [
    (rows, size, x, other)
    for rows, size in ((4096, 768), (4096, 1024), (32, 384), (64, 4096), (8, 8192), (3, 7))
    for x, other in ((BFLOAT16, FLOAT), (BFLOAT16, BFLOAT16), (FLOAT, FLOAT))
]
CASES += [(rows, size, torch.float16, torch.float64) for rows, size in ((4096, 768), (32, 384), (8, 2048))]
CASES += [(9 * 1024, 768, BFLOAT16, FLOAT, 9)]
FEW = [CASES[0], CASES[-1]]


def launches(cases: list[tuple[Any, ...]]) -> Iterator[str]:
    for rows, size, dtype, other, *parts in cases:
        x, residual = torch.zeros(rows, size, dtype=dtype), torch.zeros(rows, size, dtype=other)
        weight, bias = (torch.zeros(*parts, size, dtype=other) for _ in range(2))
        for seed in (None, torch.tensor(3)):
            _, mean, rstd = module.dropout_add_layer_norm(x, residual, weight, bias, seed, 0.1, 1e-12)
            for want_weight in (True, False):
                module.dropout_add_layer_norm_backward(
                    residual, x, residual, weight, mean, rstd, seed, 0.1, want_weight
                )
        yield f"{rows}x{size} {dtype} {other} {parts}"
