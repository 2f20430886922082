"""Attention by the kernels, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.ops import reference
from fastdistill.ops.native import NATIVE
from tests.accuracy import relative_error
from tests.kernels import by_triton

pytestmark = pytest.mark.skipif(NATIVE.cpu is None, reason=f"launched from C++: {NATIVE.why_no_cpu}")

HALF = torch.float16  # the interpreter has no products in bfloat16


def both(
    inputs: list[Tensor], gate: Tensor | None, mask: Tensor | None, seed: Tensor | None = None, p: float = 0.0,
    causal: bool = False, scale: float = 0.3, gate_grad: bool = False, by: Any = by_triton,
) -> list[Tensor]:  # fmt: skip
    """Everything that the two ops return, computed by the kernels or by another module of their interface."""
    *qkv, upstream = inputs
    options = (p, causal, scale, gate_grad)
    output, ungated, logsumexp = by.gated_attention(*qkv, gate, mask, seed, *options)
    saved = ungated if gate_grad else output
    grads = by.gated_attention_backward(upstream, *qkv, gate, mask, seed, saved, logsumexp, *options)
    return [output, ungated, logsumexp, *grads]


def check(inputs: list[Tensor], gate: Tensor | None = None, mask: Tensor | None = None, **options: Any) -> None:
    """The reference in float64 is right; half precision may err as much as rounding its weights to it does."""
    ours = both(inputs, gate, mask, **options)
    wide = [x.double() for x in inputs]
    exact = both(wide, gate if gate is None else gate.double(), mask, by=reference, **options)
    dtype = inputs[0].dtype
    plain = both(inputs, gate, mask, by=reference, **options)
    names = ("output", "ungated", "logsumexp", "query", "key", "value", "gate")
    for name, value, answer, ordinary in zip(names, ours, exact, plain, strict=True):
        assert value.shape == answer.shape and value.dtype == ordinary.dtype
        assert value.dim() != 4 or value.transpose(1, 2).is_contiguous()
        limit = (4 if dtype == HALF else 2) * relative_error(ordinary, answer) + 2 * torch.finfo(dtype).eps
        assert relative_error(value, answer) <= limit, name
