"""In what ops compute."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


def promoted_dtype(first: Tensor, *others: Tensor) -> torch.dtype:
    """What all of their dtypes promote to."""
    return reduce(torch.promote_types, (x.dtype for x in others), first.dtype)


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor has it, else float32: what a loss is computed in and returned as."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
