"""How weights are moved in every training of a run, texts' or images'."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from fastdistill.recipes.settings import RecipeSettings

Optim = Literal["adamw_torch_fused", "adamw_torch", "sgd"]
Schedule = Literal["linear", "cosine", "constant"]

MOMENTUM = 0.9


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """By TrainingArguments' names. `warmup_steps` below 1 are a share of all; `momentum` is None but for "sgd".

    AdamW is the fused one, of one sweep, on CPUs too: 3.6 ms a step for a 1-layer MiniLM and 6,000 rows of its
    embeddings, on one thread, where the other takes 12.4."""

    optim: Optim = "adamw_torch_fused"
    lr_scheduler_type: Schedule = "linear"
    warmup_steps: float = 0.1
    weight_decay: float = 0.01
    momentum: float | None = None
    max_grad_norm: float = 1.0

    def arguments(self) -> dict[str, Any]:
        """For TrainingArguments, which knows momentum among an optimizer's own."""
        asked = asdict(self)
        momentum = asked.pop("momentum")
        return asked if momentum is None else {**asked, "optim_args": f"momentum={momentum}"}


TEXT = Optimization()
IMAGES = Optimization(
    optim="sgd", lr_scheduler_type="cosine", warmup_steps=0.0, weight_decay=5e-4, momentum=MOMENTUM, max_grad_norm=0.0
)
"""AutoSKDBERT's of images (section B), which are CRD's (Tian et al. 2020)."""


def optimization_of(settings: RecipeSettings, *, is_of_images: bool = False) -> Optimization:
    """What is asked for and, where nothing is, `TEXT` or `IMAGES`. Raises ValueError for momentum without sgd."""
    default = IMAGES if is_of_images else TEXT
    given = {name: value for name in vars(default) if (value := getattr(settings, name)) is not None}
    optim = given.get("optim", default.optim)
    if optim == "sgd":
        return replace(default, **{"momentum": MOMENTUM} | given)
    if settings.momentum is not None:
        raise ValueError(f"--momentum is {settings.momentum:g}, but --optim is {optim}; expected none, or sgd")
    return replace(default, **given, momentum=None)
