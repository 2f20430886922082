"""Recipes, from data set to report: ``report = stark(StarkSettings(task="sst2", ...))``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastdistill.recipes.settings import (
    AutoSKDSettings,
    DeKDSettings,
    KDSettings,
    PeaKDSettings,
    PWCNSettings,
    StarkSettings,
)

if TYPE_CHECKING:
    from fastdistill.recipes.methods.autoskd import autoskd
    from fastdistill.recipes.methods.dekd import dekd
    from fastdistill.recipes.methods.kd import kd
    from fastdistill.recipes.methods.peakd import peakd
    from fastdistill.recipes.methods.pwcn import pwcn
    from fastdistill.recipes.methods.stark import stark
    from fastdistill.recipes.report import Report

__all__ = [
    "AutoSKDSettings",
    "DeKDSettings",
    "KDSettings",
    "PWCNSettings",
    "PeaKDSettings",
    "Report",
    "StarkSettings",
    "autoskd",
    "dekd",
    "kd",
    "peakd",
    "pwcn",
    "stark",
]


def __getattr__(name: str) -> Any:
    """Recipes, imported when first used: they bring PyTorch and transformers with them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "report" if name == "Report" else f"methods.{name}"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
