"""Attention against what plain PyTorch makes of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill import gated_attention
from tests import eager
from tests.accuracy import assert_accurate

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def with_gradients(
    function: Any,
    inputs: list[Tensor],
    gate: Tensor | None,
    gate_grad: bool,
    mask: Tensor | None = None,
    **options: Any,
) -> list[Tensor]:
    """The output and the gradients to query, key, value and, where there is one to be had, gate."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    wanted = list(inputs)
    if gate is not None:
        gate = gate.detach().requires_grad_(gate_grad)
        wanted += [gate] if gate_grad else []
    output = function(*inputs, gate, mask, **options)
    upstream = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).view(output.shape).to(output)
    return [output, *torch.autograd.grad(output, wanted, upstream)]


def check(
    inputs: list[Tensor], gate: Tensor | None, gate_grad: bool, mask: Tensor | None = None, **options: Any
) -> None:
    gate, mask = (None if x is None else x.to(inputs[0].device) for x in (gate, mask))
    ours = with_gradients(gated_attention, inputs, gate, gate_grad, mask, **options)
    wide = None if gate is None else gate.double()
    exact = with_gradients(eager.gated_attention, [x.double() for x in inputs], wide, gate_grad, mask, **options)
    plain = with_gradients(eager.gated_attention, inputs, gate, gate_grad, mask, **options)
    assert ours[0].transpose(1, 2).is_contiguous()
    for what, *values in zip(("output", "query", "key", "value", "gate"), ours, exact, plain, strict=False):
        assert values[0].dtype == (torch.float32 if what == "gate" else inputs[0].dtype)
        if what == "gate":  # computed from numbers of the inputs' dtype, of which it has the ulp
            values[0] = values[0].to(inputs[0].dtype)
        assert_accurate(*values, what=what)
