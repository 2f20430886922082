"""The convolution of PWCN in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def proximity_conv(
    states: Tensor,
    proximity: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    r""":math:`\max_i (W * (p \odot h))_i + b` over the words i.

    Args:
        states: ``[B, S, D]``; proximity: ``[B, S]``; weight: ``[C, D, K]``, K odd; bias: ``[C]``.
        attention_mask: ``[B, S]``, 0 for padding, which is neither convolved nor among the words.

    Returns ``[B, C]``.
    """
    weighted = states * proximity.unsqueeze(-1)
    if attention_mask is None:
        return F.conv1d(weighted.mT, weight, bias, padding=weight.shape[2] // 2).amax(2)
    padding = (attention_mask == 0).unsqueeze(1)
    convolved = F.conv1d(weighted.mT.masked_fill(padding, 0), weight, bias, padding=weight.shape[2] // 2)
    return convolved.masked_fill(padding, -float("inf")).amax(2)
