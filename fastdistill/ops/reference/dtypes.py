"""In what ops compute."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor has it, else float32: what a loss is computed in and returned as."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
