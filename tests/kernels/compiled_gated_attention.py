"""Calls of gated_attention and its gradient, for `tests.kernels.compiled`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from fastdistill.kernels import gated_attention as module

PADDING, BIAS = torch.ones(2, 1, 1, 2048, dtype=torch.bool), torch.zeros(1, 2, 2048, 2048)
PLAIN: dict[str, Any] = {"attn_mask": None, "seed": None, "dropout_p": 0.0, "is_causal": False}
UNEVEN = {"attn_mask": BIAS[..., :2000, :2000], "seed": torch.tensor(1), "dropout_p": 0.1}
CASES: list[tuple[int, int, torch.dtype, dict[str, Any]]] = [
    (64, 2048, torch.bfloat16, {"attn_mask": PADDING}),
    (128, 32, torch.bfloat16, {"is_causal": True}),
    (80, 2000, torch.bfloat16, UNEVEN),
    (80, 2000, torch.float32, UNEVEN),
]


def launches() -> Iterator[str]:
    gate = torch.zeros(2)
    for size, length, dtype, changes in CASES:
        x = torch.zeros(2, length, 2, size, dtype=dtype).transpose(1, 2)
        mask, seed, *numbers = {**PLAIN, **changes}.values()
        _, ungated, logsumexp = module.gated_attention(x, x, x, gate, mask, seed, *numbers, 0.1, True)
        module.gated_attention_backward(x, x, x, x, gate, mask, seed, ungated, logsumexp, *numbers, 0.1, True)
        yield f"{size} {length} {dtype} {[name for name in changes if name != 'dropout_p']}"
