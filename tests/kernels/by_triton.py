"""What CUDA tensors are computed by, for tensors on any device: on a CPU by Triton's interpreter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastdistill.ops  # noqa: F401 (defines them)

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def gated_attention(*args: Any) -> tuple[Tensor, ...]:
    return torch.ops.fastdistill.gated_attention.default.redispatch(CUDA, *args)


def gated_attention_backward(*args: Any) -> tuple[Tensor, ...]:
    return torch.ops.fastdistill.gated_attention_backward.default.redispatch(CUDA, *args)
