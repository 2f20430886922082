"""Calls of gated_attention and its gradient, for `tests.kernels.compiled`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from fastdistill.kernels import gated_attention as kernels

from tests.kernels import by_triton

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PADDING = {"attn_mask": torch.ones(2, 1, 1, 2048, dtype=torch.bool)}
ROWS = {"attn_mask": torch.ones(2, 1, 2048, 2048, dtype=torch.bool)}  # as transformers has it
UNEVEN_ROWS = {"attn_mask": torch.ones(2, 1, 1999, 1999, dtype=torch.bool)}
SHORT_PADDING = {"attn_mask": torch.ones(2, 1, 1, 128, dtype=torch.bool)}
SHORT_ROWS = {"attn_mask": torch.ones(2, 1, 128, 128, dtype=torch.bool)}
BIAS = {"attn_mask": torch.zeros(1, 4, 2000, 2000)}
HALF_BIAS = {"attn_mask": BIAS["attn_mask"].bfloat16()}
DROPOUT = {"seed": torch.tensor(1), "dropout_p": 0.1}
CAUSAL = {"is_causal": True}
PLAIN: dict[str, Any] = {"attn_mask": None, "seed": None, "dropout_p": 0.0, "is_causal": False, "groups": 4}
GROUPS = {"groups": 2}
# Size of a head, length, dtype, whether the gate needs a gradient (None: no gate), options. Among them each kind of
# mask, dtype, gate, dropout and tile, in the combinations that need the most registers.
CASES: list[tuple[int, int, torch.dtype, bool | None, dict[str, Any]]] = [
    (64, 2048, BF16, True, PADDING),
    (64, 2048, BF16, True, PADDING | DROPOUT),
    (16, 2048, BF16, True, CAUSAL),
    (80, 1999, BF16, False, CAUSAL),
    (128, 32, BF16, True, CAUSAL),
    (128, 64, BF16, True, DROPOUT),
    (64, 128, BF16, True, SHORT_PADDING),
    (64, 128, BF16, True, SHORT_ROWS | GROUPS),
    (128, 2048, BF16, True, CAUSAL | GROUPS),
    (64, 128, FP16, True, SHORT_ROWS | DROPOUT),
    (32, 1999, BF16, None, UNEVEN_ROWS),
    (64, 2048, FP16, False, ROWS | DROPOUT),
    (128, 1999, BF16, True, UNEVEN_ROWS | DROPOUT),
    (64, 2000, BF16, None, HALF_BIAS | DROPOUT),
    (32, 2048, FP32, False, ROWS),
    (64, 2048, FP32, True, ROWS | DROPOUT),
    (128, 1999, FP32, True, UNEVEN_ROWS | DROPOUT),
    (128, 2048, FP32, False, PADDING | GROUPS),
    (80, 2000, FP32, True, BIAS | DROPOUT),
    (64, 128, BF16, None, DROPOUT),
    (128, 2048, BF16, True, PADDING | DROPOUT),
]
FEW = [CASES[i] for i in (0, 4, 8, 11, 14, 17)]


def launches(cases: list[Any]) -> Iterator[str]:
    for size, length, dtype, gate_grad, changes in cases:
        mask, seed, *numbers, groups = {**PLAIN, **changes}.values()
        x, kv = (torch.zeros(2, length, heads, size, dtype=dtype).transpose(1, 2) for heads in (4, groups))
        gate = None if gate_grad is None else torch.zeros(4)
        options = (gate, mask, seed, *numbers, 0.1, gate_grad is True)
        output, _, logsumexp = by_triton.gated_attention(x, kv, kv, *options)
        by_triton.gated_attention_backward(x, x, kv, kv, *options[:3], output, logsumexp, *options[3:])
        yield f"{size} {length} {dtype} gate_grad={gate_grad} {[name for name in changes if name != 'dropout_p']}"
    for size in (80, 128):  # what cuDNN, which is of CUDA alone, leaves to do
        x, gate = torch.zeros(2, 2048, 4, size, dtype=BF16).transpose(1, 2), torch.zeros(2, 4)
        rest = ([gate, x, x], (4, 2048, 2048), (0.1, 0.0), (size, 1, True, True, 0, False, False, False), 2048, 8)
        kernels.launch("gate", [x, x, *rest[0]], (3, 3, 2, 4, 0), *rest[1:])
        kernels.launch("gate_gradient", [x, x, x, torch.zeros(2, 4, 32), *rest[0]], (3, 3, 3, 0, 2, 4, 0), *rest[1:])
        yield f"{size} by cuDNN"
