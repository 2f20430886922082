"""What is asked of kd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastdistill.recipes.settings.shared import DistillationSettings, FirstLayersSettings


@dataclass(frozen=True, kw_only=True)
class KDSettings(FirstLayersSettings, DistillationSettings):
    """Settings of plain distillation, `fastdistill.recipes.kd`."""

    command: ClassVar[str] = "kd"
    does: ClassVar[str] = (
        "fine-tune a teacher and distil it into its own first layers, beside a student that has no teacher"
    )

    def check(self) -> None:
        super().check()
        if self.kd_temperature is not None and not self.distils:
            raise ValueError("--kd-temperature would have no effect without --baselines or --chain; leave it out")
