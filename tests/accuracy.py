"""The rule for error: no more than twice what the same computation costs in plain PyTorch, plus two ulp."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(value: Tensor, exact: Tensor) -> float:
    """||value - exact|| / ||exact|| in float64."""
    value, exact = value.detach(), exact.detach()
    difference = torch.linalg.vector_norm(value.double() - exact)
    return float(difference / torch.linalg.vector_norm(exact).clamp_min(torch.finfo(torch.float64).tiny))


def assert_accurate(value: Tensor, exact: Tensor, eager: Tensor, what: str = "value") -> None:
    """``exact`` is the float64 answer, ``eager`` plain PyTorch's in the dtype that ``value`` was computed from."""
    assert value.shape == exact.shape, f"{what} has shape {tuple(value.shape)}, expected {tuple(exact.shape)}"
    error, allowed = relative_error(value, exact), relative_error(eager, exact)
    limit = 2 * allowed + 2 * torch.finfo(value.dtype).eps
    if eager.dtype == torch.float64:  # the oracle is no better than this
        limit = 1e-13
    assert error <= limit, f"{what}: relative error {error:.3g} > {limit:.3g} (plain PyTorch: {allowed:.3g})"
