"""Calls of proximity_conv and its gradient, for `tests.kernels.compiled`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from fastdistill.kernels import proximity_conv as module

PWCN = (64, 80, 600, 600, 3)
CASES: list[tuple[tuple[int, int, int, int, int], bool, torch.dtype]] = [  # sizes, whether masked
    (PWCN, True, torch.bfloat16),
    (PWCN, False, torch.float16),
    (PWCN, True, torch.float32),
    ((3, 7, 20, 5, 1), True, torch.float32),
    ((1, 1, 1, 1, 1), False, torch.float16),
    ((9, 300, 768, 768, 5), False, torch.bfloat16),
    ((4, 70, 301, 99, 3), True, torch.float16),
    ((4, 70, 301, 99, 3), True, torch.float32),
]
FEW = CASES[:3]


def launches(cases: list[Any]) -> Iterator[str]:
    for sizes, masked, dtype in cases:
        batch, length, width, channels, taps = sizes
        states, proximity = torch.zeros(batch, length, width, dtype=dtype), torch.zeros(batch, length)
        weight, bias = torch.zeros(channels, width, taps, dtype=dtype), torch.zeros(channels, dtype=dtype)
        mask = torch.ones(batch, length, dtype=torch.bool) if masked else None
        output, positions = module.proximity_conv(states, proximity, weight, bias, mask)
        for wanted in ((True, True, True, True), (True, False, True, False)):
            module.proximity_conv_backward(output, states, proximity, weight, mask, positions, *wanted)
        yield f"{sizes} {masked} {dtype}"
