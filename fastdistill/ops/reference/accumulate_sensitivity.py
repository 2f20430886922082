"""Sensitivities, summed over many tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.ops.reference.dtypes import accumulation_dtype


def accumulate_sensitivity_(totals: list[Tensor], grads: list[Tensor], weights: list[Tensor] | None) -> None:
    """``totals[i] += |grads[i] * weights[i]|``, or ``|grads[i]|`` without weights."""
    if not totals:
        return
    dtypes = [accumulation_dtype(*tensors) for tensors in zip(totals, grads, weights or grads, strict=True)]
    products = [grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]
    if weights is not None:
        factors = [weight.to(dtype) for weight, dtype in zip(weights, dtypes, strict=True)]
        products = list(torch._foreach_mul(products, factors))
    torch._foreach_add_(totals, torch._foreach_abs(products))
