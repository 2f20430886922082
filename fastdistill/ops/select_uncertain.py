"""The rows whose predictions are the least certain."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.ops import reference
from fastdistill.ops.checks import check_choice, check_number
from fastdistill.ops.library import define
from fastdistill.ops.uncertainty import KINDS, Kind, check_logits, score

STRATEGIES = (*KINDS, "random")
"""How examples can be selected: the most uncertain by one of these kinds, or any."""


def select_uncertain(logits: Tensor, ratio: float, kind: Kind = "entropy") -> Tensor:
    r"""The indices of the share ``ratio`` of all rows that are most uncertain, the most uncertain first.

    They are the first :math:`\max(1, \mathrm{round}(N \cdot \mathrm{ratio}))` of N rows (halves round to even, as by
    :func:`round`) in the order of :func:`uncertainty` without normalization. Rows whose uncertainty is NaN come first,
    so that they are not overlooked; equals go by lower index, so that equal scores give the same indices on every
    device. That many indices there are whatever the logits: nothing waits for the device, and a CUDA graph can capture
    it. On CUDA the rows are scored by one kernel, the last score that is chosen is found by radix selection, and only
    what is chosen is sorted. Nothing is differentiable here;
    torch.vmap calls it once for each example of its batch.

    Args:
        logits: ``[..., C]``, as in :func:`uncertainty`, with at least one row and fewer than 2^32; rows are numbered as
            after ``logits.flatten(0, -2)``.
        ratio: 0 < ratio <= 1.
        kind: as in :func:`uncertainty`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: no rows or too many, fewer than two classes, or a ratio or kind out of its range.
    """
    check_logits("logits", logits)
    check_choice("kind", kind, KINDS)
    check_number("ratio", ratio, above=0)
    if ratio > 1:
        raise ValueError(f"ratio is {ratio!r}; expected a number > 0 and <= 1")
    rows = logits.numel() // logits.shape[-1]
    if rows == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; expected at least one row")
    if rows >= 1 << 32:
        raise ValueError(f"logits has {rows} rows; expected fewer than 2^32")
    indices: Tensor = _op(logits.detach(), max(1, round(rows * ratio)), kind)
    return indices


def _score_and_rank(logits: Tensor, count: int, kind: str) -> Tensor:
    return reference.rank(score(logits, kind, False), count)


_op = define(
    "select_uncertain(Tensor logits, SymInt count, str kind) -> Tensor",
    _score_and_rank,
    lambda logits, count, kind: logits.new_empty(count, dtype=torch.int64),
)
