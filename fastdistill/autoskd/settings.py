"""What a search is asked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from fastdistill.ops.checks import check_choice, check_number

Method = Literal["sswo", "cr"]
METHODS = ("sswo", "cr")
ThetaOptimizer = Literal["sgd", "adam"]
THETA_OPTIMIZERS = ("sgd", "adam")
Optimizer = Literal["adam", "sgd"]
Schedule = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True)
class Settings:
    """A search's settings.

    Args:
        method: "sswo" or "cr".
        order: 2, or 1 for none of the look-ahead's second derivative (alpha = 0).
        drop: teachers that selection drops, m.
        candidates: snapshots of theta in phase 2, evenly spaced; the last is the end's.
        epochs: passes over the training half, both phases together.
        batch_size: examples of each half in a step.
        learning_rate: the student's peak.
        optimizer: the student's, "adam" or "sgd", with this `weight_decay` and, of the latter, `momentum`.
        lr_scheduler_type: how the student's rate falls from its peak to 0: "linear", or "cosine", or not at all:
            "constant"; before, it rises over `warmup` steps or, below 1, that share of them.
        max_grad_norm: the student's gradients are clipped to this norm; 0 for none.
        theta_optimizer: "sgd", whose steps are as long as the gradient; or the paper's "adam" (weight decay 1e-3),
            which moves the sampled teacher by about its rate however much better or worse it is: theta then follows the
            draws (see `Found.correlation`).
        theta_learning_rate: of it; the paper's are 3e-4 to 1e-3.
        theta_baseline: subtract from the sampled teacher's gradient the mean over the team of what each teacher's was
            when it was last sampled; the average teacher then does not move. The paper does not: where the student
            agrees with all, all are pushed up, the more often the more often they are drawn. For "sswo" alone.
        look_ahead: alpha; by default theta's learning rate, as the paper has it.
        temperature: of the loss; the paper's has none (1).
        seed: of the halves, batches, draws and dropout.
    """

    method: Method = "sswo"
    order: int = 2
    drop: int = 0
    candidates: int = 25
    epochs: float = 15.0
    batch_size: int = 32
    learning_rate: float = 3e-5
    optimizer: Optimizer = "adam"
    weight_decay: float = 1e-4
    momentum: float = 0.0
    lr_scheduler_type: Schedule = "linear"
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    theta_optimizer: ThetaOptimizer = "sgd"
    theta_learning_rate: float = 3e-2
    theta_baseline: bool = True
    look_ahead: float | None = None
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_choice("theta_optimizer", self.theta_optimizer, THETA_OPTIMIZERS)
        check_choice("optimizer", self.optimizer, get_args(Optimizer))
        check_choice("lr_scheduler_type", self.lr_scheduler_type, get_args(Schedule))
        for name in ("weight_decay", "momentum", "warmup", "max_grad_norm"):
            check_number(name, getattr(self, name), minimum=0)
        if not isinstance(self.theta_baseline, bool):
            raise TypeError(f"theta_baseline is {self.theta_baseline!r}; expected True or False")
        if self.order not in (1, 2):
            raise ValueError(f"order is {self.order!r}; expected 1 or 2")
        if self.order == 1 and self.look_ahead is not None:
            raise ValueError(f"look_ahead is {self.look_ahead}, but order 1 does not look ahead; expected None")
        for name, low in (("drop", 0), ("candidates", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name} is {value!r}; expected an integer of at least {low}")
        for name in ("epochs", "learning_rate", "theta_learning_rate", "temperature"):
            check_number(name, getattr(self, name), above=0)
        if self.look_ahead is not None:
            check_number("look_ahead", self.look_ahead, above=0)

    def rate(self, step: int, steps: int) -> float:
        """The student's learning rate at a step, from 0, of so many."""
        warm = max(1, int(self.warmup if self.warmup >= 1 else self.warmup * steps)) if self.warmup else 0
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        left = (steps - step) / max(1, steps - warm)
        falling = {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}
        return self.learning_rate * falling[self.lr_scheduler_type]

    @property
    def alpha(self) -> float:
        if self.order == 1:
            return 0.0
        return self.theta_learning_rate if self.look_ahead is None else self.look_ahead

    def schedule(self, examples: int) -> tuple[int, int, list[int]]:
        """The steps that so many examples (both halves) make, those of phase 1, and those after which candidates are
        taken. Raises ValueError if phase 2 has fewer steps than candidates."""
        steps = max(1, round(self.epochs * -(-(examples // 2) // self.batch_size)))
        first = -(-steps // 2)
        second = steps - first
        if second < self.candidates:
            raise ValueError(
                f"candidates is {self.candidates}, but phase 2 has {second} of the {steps} steps; "
                "expected fewer candidates, or more epochs"
            )
        return steps, first, [first + round(second * (i + 1) / self.candidates) for i in range(self.candidates)]
