"""Logits to be uncertain about."""

from __future__ import annotations

import math

import torch
from torch import Tensor

KINDS = ("entropy", "least_confidence", "margin")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INF = math.inf


def make(
    *shape: int, device: str = "cpu", dtype: torch.dtype = torch.float64, scale: float = 3.0, seed: int = 0
) -> Tensor:
    """Logits whose two largest in a row are no equals of any other, also once they are rounded."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, generator=g, dtype=torch.float64) * scale
    rows = logits.view(-1, shape[-1])
    top = rows.topk(2, -1)
    rows.scatter_(-1, top.indices, top.values[:, :1] + torch.tensor([1.0, 0.5], dtype=torch.float64))
    return logits.to(device, dtype)
