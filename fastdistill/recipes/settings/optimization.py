"""How weights are moved: names and values are those of transformers' TrainingArguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fastdistill.recipes.settings.fields import Choice, Number, Settings, option


@dataclass(frozen=True, kw_only=True)
class OptimizationSettings(Settings):
    """Of teachers and students; what is None is as `fastdistill.recipes.optimization` has it, for texts or images."""

    title: ClassVar[str] = "optimization"

    optim: Literal["adamw_torch_fused", "adamw_torch", "sgd"] | None = option(
        None,
        kind=Choice(("adamw_torch_fused", "adamw_torch", "sgd")),
        help="AdamW, its step in one sweep (fused) or not, or stochastic gradient descent (default: adamw_torch_fused; "
        "sgd for images)",
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant"] | None = option(
        None,
        kind=Choice(("linear", "cosine", "constant")),
        help="how the learning rate falls from its peak (default: linear; cosine for images)",
    )
    warmup_steps: float | None = option(
        None,
        kind=Number(low=0),
        metavar="N",
        help="steps, or below 1 the share of them, in which the rate rises (default: 0.1; 0 for images)",
    )
    weight_decay: float | None = option(None, kind=Number(low=0), metavar="X", help="(default: 0.01; 5e-4 for images)")
    momentum: float | None = option(None, kind=Number(low=0, below=1), metavar="X", help="of sgd (default: 0.9)")
    max_grad_norm: float | None = option(
        None,
        kind=Number(low=0),
        metavar="X",
        help="norm that gradients are clipped to, 0 for none (default: 1; 0 for images)",
    )
