"""The rows whose predictions are the least certain."""

from __future__ import annotations

import atexit
import sys
import warnings
from pathlib import Path

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
    :func:`round`) in the order of :func:`uncertainty` without normalization. Equals go by lower index, so that equal
    scores give the same indices on every device. That many indices there are whatever the logits, and nothing waits
    for the device. On CUDA scoring is one kernel and ranking PyTorch's stable sort. Nothing is differentiable here.

    Rows whose uncertainty is NaN come first, so that they are not overlooked, and a warning says so, once a process.
    On CUDA, where looking would wait for the device, it comes with a later call or at the process's end, and not of
    calls inside a CUDA graph; on devices that are neither CPU nor CUDA nobody looks.

    Args:
        logits: ``[..., C]``, as in :func:`uncertainty`, with at least one row; rows are numbered as after
            ``logits.flatten(0, -2)``. On CPU fewer than 2^32 rows.
        ratio: 0 < ratio <= 1.
        kind: as in :func:`uncertainty`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: no rows, fewer than two classes, or a ratio or kind out of its range.
    """
    check_logits("logits", logits)
    check_choice("kind", kind, KINDS)
    check_number("ratio", ratio, above=0)
    if ratio > 1:
        raise ValueError(f"ratio is {ratio!r}; expected a number > 0 and <= 1")
    rows = logits.numel() // logits.shape[-1]
    if rows == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; expected at least one row")
    indices: Tensor = _op(logits.detach(), max(1, round(rows * ratio)), kind)
    return indices


def _score_and_rank(logits: Tensor, count: int, kind: str) -> Tensor:
    """On a device where no kernel does both at once: each by what serves it there."""
    scores, indices = reference.rank(score(logits, kind, False), count)
    _watch.look(scores[:1])
    return indices


class _NaNWatch:
    """Warns, once, that the highest score is NaN. A score on CUDA is copied, and looked at when the next one comes and
    the copy is done, or at the process's end, so that nobody waits."""

    def __init__(self) -> None:
        self.warned = False
        self.copy: Tensor | None = None
        self.copied: torch.cuda.Event | None = None

    def look(self, highest: Tensor) -> None:
        if self.warned:
            return
        if highest.device.type == "cpu":
            self._warn_of(highest)
        elif highest.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            self._look_later(highest)

    def _look_later(self, highest: Tensor) -> None:
        if self.copied is not None and self.copy is not None:
            if not self.copied.query():
                return
            self._warn_of(self.copy)
        else:
            atexit.register(self.look_at_last)
        self.copy = torch.empty(1, dtype=highest.dtype, pin_memory=True)
        with torch.cuda.device_of(highest):
            self.copied = torch.cuda.Event()
            self.copy.copy_(highest, non_blocking=True)
            self.copied.record()

    def look_at_last(self) -> None:
        """At the copy that no call came to look at."""
        if not self.warned and self.copied is not None and self.copy is not None:
            self.copied.synchronize()
            self._warn_of(self.copy)

    def _warn_of(self, highest: Tensor) -> None:
        if highest.isnan():
            self.warned = True
            said = "select_uncertain: logits has rows of which the uncertainty is NaN; they rank first"
            warnings.warn(said, stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """For a warning: how far up from who asks is the first frame outside this file and torch."""
    ours = (__file__, str(Path(torch.__file__).parent))
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        frame, level = frame.f_back, level + 1
    return level


_watch = _NaNWatch()

_op = define(
    "select_uncertain(Tensor logits, SymInt count, str kind) -> Tensor",
    _score_and_rank,
    lambda logits, count, kind: logits.new_empty(count, dtype=torch.int64),
)
