"""Which examples a student learns from: the ones it is least certain of, batch by batch or epoch by epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from fastdistill.ops import select_uncertain
from fastdistill.ops.checks import check_choice, check_number
from fastdistill.ops.select_uncertain import STRATEGIES

if TYPE_CHECKING:
    pass

Strategy = Literal["entropy", "least_confidence", "margin", "random"]

EXAMPLE = "example"
"""The dataset column that holds an example's number, 0 to N-1, for a choice made over the whole data."""


def select(
    logits: Tensor, ratio: float, strategy: Strategy = "entropy", *, generator: torch.Generator | None = None
) -> Tensor:
    """The max(1, round(N·ratio)) examples that a strategy chooses of N, as int64 indices.

    Args:
        logits: ``[N, C]``.
        ratio: in (0, 1].
        strategy: "entropy", "least_confidence" and "margin" are the kinds of `fastdistill.uncertainty`, and give the
            most uncertain first; "random" gives any, in any order, whatever the logits are.
        generator: for "random" only; on the logits' device.

    Raises ValueError for a ratio or strategy out of its range. Nothing waits for the device.
    """
    check_choice("strategy", strategy, STRATEGIES)
    if strategy != "random":
        return select_uncertain(logits, ratio, strategy)
    check_ratio(ratio)
    order = torch.randperm(len(logits), generator=generator, device=logits.device)
    return order[: max(1, round(len(logits) * ratio))]


def check_ratio(ratio: float) -> None:
    check_number("ratio", ratio, above=0)
    if ratio > 1:
        raise ValueError(f"ratio is {ratio!r}; expected a number > 0 and <= 1")


class Chosen(nn.Module):
    """A choice of examples that lasts an epoch: a flag for each, saved with the weights."""

    flags: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("flags", torch.zeros(0, dtype=torch.bool), persistent=False)

    def choose(self, number: int, indices: Tensor) -> None:
        """Of `number` examples choose those, and no others."""
        self.flags = torch.zeros(number, dtype=torch.bool, device=indices.device)
        self.flags[indices] = True

    def among(self, examples: Tensor) -> Tensor:
        """The places in a batch of those that are chosen; it waits for the device, to know how many they are.

        On the CPU it raises ValueError for a number that no example has."""
        if not len(self.flags):
            raise ValueError(
                "no examples are chosen yet; give the trainer callbacks=[SelectEachEpoch(objective)], "
                "or call objective.choose(logits) before each epoch"
            )
        number = len(self.flags)
        if examples.device.type == "cpu" and len(unknown := examples[(examples < 0) | (examples >= number)]):
            raise ValueError(f"{EXAMPLE} holds {int(unknown[0])}; expected numbers from 0 to {number - 1}")
        return self.flags[examples].nonzero().squeeze(1)

    def get_extra_state(self) -> Tensor:  # a buffer would have to have the checkpoint's size already
        return self.flags

    def set_extra_state(self, state: Tensor) -> None:
        self.flags = state.to(self.flags.device)
