"""Calls of bias_act_gate and its gradient, for `tests.kernels.compiled`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from fastdistill.kernels import gated_ffn as module

LARGE = (32, 128, 3072)
CASES: list[tuple[tuple[int, ...], tuple[int, ...], str, torch.dtype]] = [  # of h, of the gate's examples
    (LARGE, (), "gelu", torch.bfloat16),
    (LARGE, (32,), "gelu", torch.float32),
    (LARGE, (32,), "gelu_tanh", torch.float64),
    ((32, 1, 1000), (32,), "silu", torch.float16),
    ((9, 3, 7), (), "relu", torch.float32),
]
FEW = CASES[1:2]


def launches(cases: list[Any]) -> Iterator[str]:
    for shape, examples, activation, dtype in cases:
        h = torch.zeros(shape, dtype=dtype)
        bias, gate = torch.zeros(shape[-1], dtype=dtype), torch.zeros(*examples, shape[-1])
        module.bias_act_gate(h, bias, gate, activation)
        module.bias_act_gate_backward(h, h, bias, gate, activation, True, True)
        module.bias_act_gate_backward(h, h, bias, None, activation, False, False)
        yield f"{shape} {examples} {activation} {dtype}"
