"""A stand-in for CUDA graphs: what is captured runs again, into the tensors that it was in the first time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class Rerun:
    """Breaks off the captures of which `breaks` is true, by their number from 1."""

    device = torch.device("cpu")
    are_whole = True

    def __init__(self, breaks: Callable[[int], bool] = lambda number: False) -> None:
        self.breaks = breaks
        self.warmed = self.captured = self.replayed = 0

    def warm_up(self, run: Callable[[], T]) -> T:
        self.warmed += 1
        return run()

    def capture(self, run: Callable[[], T]) -> Callable[[], T]:
        self.captured += 1
        if self.breaks(self.captured):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        static: list[T] = []

        def replay() -> T:
            self.replayed += 1
            found = run()
            if not static:
                static.append(found)
            for kept, new in zip(tree_leaves(static[0]), tree_leaves(found), strict=True):
                if isinstance(kept, Tensor):
                    kept.copy_(new)
            return static[0]

        return replay
