"""Where a recipe's many independent trainings run: in turn or side by side here, or as tasks of Ray."""

from __future__ import annotations

import torch
from accelerate import PartialState  # type: ignore[import-untyped]

from fastdistill.recipes.executors.local import Local, Trial
from fastdistill.recipes.executors.ray import Ray
from fastdistill.recipes.executors.stacked import Stacked
from fastdistill.recipes.settings import RecipeSettings

__all__ = ["Local", "Ray", "Stacked", "Trial", "executor_of", "picked"]


def executor_of(settings: RecipeSettings) -> Local:
    """The one that is asked for; nothing is written or started yet."""
    name = picked()[0] if settings.executor == "auto" else settings.executor
    return Ray() if name == "ray" else Stacked() if name == "stacked" else Local()


def picked() -> tuple[str, str]:
    """What "auto" is here, and why."""
    if PartialState().num_processes > 1:
        return "local", "several processes share each training"
    if not torch.cuda.is_available():
        return "local", "there is no GPU, and a CPU gains nothing by training students side by side"
    return "stacked", "a GPU trains several students in little more time than one"
