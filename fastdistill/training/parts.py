"""What a step tells beside its loss: parts, which are logged, and whether a teacher gave NaN, which is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from torch import Tensor, nn

from fastdistill.objectives.base import Objective
from fastdistill.training.checks import TEACHER, nan_told
from fastdistill.training.graphed import Told
from fastdistill.training.resumable import ResumableTrainer


class PartsTrainer(ResumableTrainer):
    """Notes on the device what steps tell, and looks at it when Trainer logs or saves."""

    objective: Objective

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._parts: dict[str, Tensor] = {}
        self._parts_since = 0
        self._nan: dict[str, Tensor] = {}

    def _note(self, told: Told) -> None:
        """What is logged and looked at when Trainer logs or saves."""
        _, parts, is_nan = told
        self.count(parts)
        for name, one in is_nan.items():
            self._nan[name] = self._nan[name] | one if name in self._nan else one

    def count(self, parts: dict[str, Tensor]) -> None:
        """What is logged with the next loss, of one more step."""
        if not self._parts:
            self._parts_since = self.state.global_step
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, 0) + value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_loss" in logs:
            self._refuse_nan()
        mine = [(name, is_mean(part)) for name, part in self._parts.items()]
        kinds = dict(gather_object(mine)) if "loss" in logs else {}
        if kinds:  # a process may have had other parts than another
            zero = torch.zeros((), device=self.args.device)
            sums = torch.stack([self._parts.get(name, zero).float().mean() for name in kinds])
            totals = zip(kinds.items(), self.accelerator.reduce(sums, "sum").tolist(), strict=True)
            steps = (self.state.global_step - self._parts_since) * self.accelerator.num_processes
            logs = {**logs, **{name: total / steps if is_mean else total for (name, is_mean), total in totals}}
        if "loss" in logs or "train_loss" in logs:  # a log of training, or its end
            self._parts = {}
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._refuse_nan()
        super()._save_checkpoint(model, trial)

    def _refuse_nan(self) -> None:
        found = gather_object([name for name, is_nan in self._nan.items() if is_nan])
        self._nan = {}
        if found:
            raise ValueError(nan_told(min(found), self.objective.needs.teachers, self.train_dataset))


def nan_of(teacher: Any, loss: Tensor) -> dict[str, Tensor]:
    """By name of a teacher whether it gave NaN that counts, as the loss then shows."""
    found = ((name, one) for name, one in (teacher if isinstance(teacher, Mapping) else {TEACHER: teacher}).items())
    # of examples that do not count a loss is a number
    return {
        name: one.is_nan & loss.detach().isnan().any()
        for name, one in found
        if one is not None and one.is_nan is not None
    }


def weighted(value: Tensor, share: Tensor) -> Tensor:
    """A mean over a micro-batch by its share of a step: of no examples, where it may be NaN, it is 0."""
    return torch.where(share > 0, value * share, 0.0)


def is_mean(part: Tensor) -> bool:
    return part.is_floating_point()
