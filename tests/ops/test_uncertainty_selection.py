"""select_uncertain: which rows, in which order."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastdistill import select_uncertain, uncertainty
from tests.ops.uncertain import DTYPES, INF, KINDS, make


def by_definition(logits: Tensor, count: int, kind: str) -> Tensor:
    """On scores of the same kernel, so that only the order is in question."""
    scores = uncertainty(logits, kind, normalize=False).flatten().tolist()
    rank = [(not math.isnan(score), -score, row) for row, score in enumerate(scores)]
    return torch.tensor([row for _, _, row in sorted(rank)[:count]], device=logits.device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 2), (9,), (700, 3), (7, 11, 40), (5000, 2)])
def test_selects_by_definition(
    device: str, dtype: torch.dtype, kind: str, shape: tuple[int, ...], nan_filled: None
) -> None:
    rounded = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 4).round() / 2  # many ties
    rounded.view(-1, shape[-1])[::13] *= 20
    for logits in (make(*shape, device=device, dtype=dtype), rounded.to(device, dtype)):
        for poisoned in (False, True):
            rows = logits.view(-1, shape[-1])
            if poisoned:
                rows[len(rows) // 2, 0] = math.nan
                rows[-1] = math.nan
            for ratio in (1e-9, 0.1, 0.5, 0.77, 1.0):
                chosen = select_uncertain(logits, ratio, kind)
                assert chosen.dtype == torch.int64 and chosen.device == logits.device
                assert torch.equal(chosen, by_definition(logits, max(1, round(len(rows) * ratio)), kind))


@pytest.mark.parametrize("classes", [2, 3, 40, 3000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_nan_ranks_first_in_order(device: str, classes: int, dtype: torch.dtype, kind: str, sign: int) -> None:
    """Of either sign and wherever in its row; so do rows with +inf and rows of nothing but -inf."""
    logits = make(400, classes, device=device, dtype=dtype)
    spoilt = [3, 50, 51, 200, 201, 333, 399]
    for row, logit, place in zip(
        spoilt, [math.nan, math.nan, INF, -INF, math.nan, INF, math.nan], [0, -1, 0, slice(None), 1, -1, slice(None)],
        strict=True,
    ):  # fmt: skip
        logits[row, place] = math.copysign(logit, sign * logit) if math.isnan(logit) else logit
    expected = torch.tensor(spoilt, device=device)
    for count in (1, 5, 7, 40, 400):
        chosen = select_uncertain(logits, count / 400, kind)
        assert len(chosen) == count and torch.equal(chosen[:7], expected[:count])
    assert torch.equal(chosen.sort().values, torch.arange(400, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1023, 1024, 1025, 70_001])
def test_selects_the_first_of_equals(device: str, dtype: torch.dtype, kind: str, rows: int) -> None:
    """A few values, so that the last one chosen has equals on both sides of the cut."""
    g = torch.Generator().manual_seed(2)
    logits = torch.randint(0, 3, (rows, 3), generator=g).to(device, dtype)
    scores = uncertainty(logits, kind, normalize=False)
    ranked = scores.cpu().sort(descending=True, stable=True).indices.to(device)
    for count in (1, 2, rows // 3, rows // 2, rows - 1, rows):
        assert torch.equal(select_uncertain(logits, count / rows, kind), ranked[:count])


def test_equal_scores_go_by_lower_index(device: str) -> None:
    logits = torch.zeros(3000, 4, device=device)
    assert torch.equal(select_uncertain(logits, 0.5), torch.arange(1500, device=device))
    logits[::2, 0] = 3
    expected = torch.cat([torch.arange(1, 3000, 2), torch.arange(0, 3000, 2)]).to(device)
    assert torch.equal(select_uncertain(logits, 1.0), expected)
    certain = torch.full((64, 4), -INF, device=device)
    certain[:, 0] = torch.linspace(-2, 2, 64)  # every score is 0, of either sign if of any
    for kind in KINDS:
        assert torch.equal(select_uncertain(certain, 1, kind), torch.arange(64, device=device))


@pytest.mark.parametrize(
    ("rows", "ratio", "count"), [(5, 0.5, 2), (7, 0.5, 4), (10, 0.01, 1), (3, 1, 3), (32, 0.3, 10)]
)
def test_how_many(device: str, rows: int, ratio: float, count: int) -> None:
    assert select_uncertain(make(rows, 3, device=device), ratio).shape == (count,)
    assert select_uncertain(make(1, rows, 1, 3, device=device), ratio).shape == (count,)


def test_selects_from_any_layout(device: str) -> None:
    logits = make(6, 30, 10, device=device)
    for view in (logits.transpose(0, 1), logits[..., :7], logits[:, ::3], logits[:1].expand(6, 30, 10)):
        assert torch.equal(select_uncertain(view, 0.4), select_uncertain(view.contiguous(), 0.4))
