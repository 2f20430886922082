"""The gradients of kd_ce_loss, multiplied by that of its result."""

from __future__ import annotations

import math

import pytest
import torch
import triton
from fastdistill.kernels import scale_rows as module

from tests.kernels.conftest import DEVICE
from tests.kernels.interpreter import interpreted

pytestmark = interpreted


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(700, 3), (2, 3, 1500), (5, 1), (4,), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_scale_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    lead = shape[:-1]
    upstreams = [
        torch.tensor(0.3, dtype=torch.float64),
        torch.tensor(1.0),
        torch.tensor(-2.0).expand(lead),
        torch.linspace(-1, 1, math.prod(lead)).view(lead),
        torch.linspace(-1, 1, 2 * math.prod(lead)).view(*lead, 2)[..., 0],
        torch.ones(lead).index_fill(0, torch.tensor([0]), 2.0) if lead and lead[0] else torch.ones(lead),
    ]
    for upstream in (u.to(DEVICE) for u in upstreams):
        expected = (grad.double() * upstream.double().unsqueeze(-1)).to(dtype)
        scaled = module.scale_rows(grad, upstream)
        assert scaled.dtype == dtype
        torch.testing.assert_close(scaled, expected)
        in_place = grad.clone()
        assert module.scale_rows_(in_place, upstream) is None
        assert torch.equal(in_place, scaled)
        strided = torch.stack([grad, grad], -1)[..., 0]
        module.scale_rows_(strided, upstream)
        torch.testing.assert_close(strided, expected)


def test_scaling_in_place_by_one_writes_nothing() -> None:
    """Seen by giving the kernel another place to write to: only the program with a row of another scale does."""
    grad = torch.ones(8, 4, device=DEVICE)
    upstream = torch.ones(8, device=DEVICE)
    upstream[5] = 3
    out = torch.full_like(grad, -1)
    module._scale_kernel[(4,)](grad, upstream, out, 8, 4, 1, triton.language.float32, True, 4, 2, 4)
    expected = torch.full_like(grad, -1)
    expected[4:6] = torch.tensor([[1.0], [3.0]])
    assert torch.equal(out, expected)
