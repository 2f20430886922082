"""A stand-in for CUDA graphs: what is captured runs again, into the tensors that it was in the first time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdistill.cuda_graphs import as_if_captured

T = TypeVar("T")

WAITING = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::lift_fresh",  # of torch.tensor: from the host
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave.Tensor",
    "aten::unique_dim",
}
"""What waits for a CUDA device, and breaks off a capture there."""


class WithoutWaiting(TorchDispatchMode):
    """Raises for operations that no graph can have."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_flags = func.name().startswith("aten::index") and any(
            isinstance(one, Tensor) and one.dtype == torch.bool for one in tree_leaves(args[1:2])
        )
        if func.name() in WAITING or by_flags:
            raise AssertionError(f"{func.name()} would wait for the device")
        return func(*args, **(kwargs or {}))


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
            with (
                as_if_captured(),
                patch("fastdistill.models.packed.worth_packing", lambda mask: False),  # whose mask is on the CPU
                WithoutWaiting(),
            ):
                found = run()
            if not static:
                static.append(found)
            for kept, new in zip(tree_leaves(static[0]), tree_leaves(found), strict=True):
                if isinstance(kept, Tensor):
                    kept.copy_(new)
            return static[0]

        return replay
