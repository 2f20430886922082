"""Calls of uncertainty and its gradient, for `tests.kernels.compiled`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from fastdistill.kernels import uncertainty as module

SHAPES = [(64, 3), (8, 1000), (2, 128256)]
KINDS = [
    ("entropy", torch.bfloat16),
    ("entropy", torch.float32),
    ("entropy", torch.float64),
    ("least_confidence", torch.bfloat16),
    ("margin", torch.bfloat16),
]


def launches() -> Iterator[str]:
    for (rows, classes), (kind, dtype) in itertools.product(SHAPES, KINDS):
        logits = torch.zeros(rows, classes, dtype=dtype)
        upstream = module.uncertainty(logits, kind, True)
        module.uncertainty_backward(upstream, logits, kind, True)
        yield f"{rows}x{classes} {kind} {dtype}"
