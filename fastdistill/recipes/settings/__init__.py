"""What recipes are asked: a frozen dataclass each, of which the command line is made. PyTorch is not imported."""

from fastdistill.recipes.settings.autoskd import AutoSKDSettings
from fastdistill.recipes.settings.dekd import DeKDSettings
from fastdistill.recipes.settings.kd import KDSettings
from fastdistill.recipes.settings.peakd import PeaKDSettings
from fastdistill.recipes.settings.pwcn import PWCNSettings
from fastdistill.recipes.settings.shared import RecipeSettings
from fastdistill.recipes.settings.stark import StarkSettings

__all__ = [
    "RECIPES",
    "AutoSKDSettings",
    "DeKDSettings",
    "KDSettings",
    "PWCNSettings",
    "PeaKDSettings",
    "RecipeSettings",
    "StarkSettings",
]

RECIPES: dict[str, type[RecipeSettings]] = {
    settings.command: settings
    for settings in (KDSettings, StarkSettings, DeKDSettings, AutoSKDSettings, PeaKDSettings, PWCNSettings)
}
