"""The backward of a loss whose forward already holds its gradient: rows times their upstream gradient."""

from __future__ import annotations

import torch

from fastdistill.ops import reference
from fastdistill.ops.library import define
from fastdistill.ops.native import NATIVE

scale_rows = define(
    "scale_rows(Tensor grad, Tensor grad_output) -> Tensor",
    reference.scale_rows,
    lambda grad, grad_output: torch.empty_like(grad, memory_format=torch.contiguous_format),
    triton=None if NATIVE.cuda else "scale_rows",
)
scale_rows_ = define(
    "scale_rows_(Tensor(a!) grad, Tensor grad_output) -> ()",
    reference.scale_rows_,
    lambda grad, grad_output: None,
    triton=None if NATIVE.cuda else "scale_rows",
)
