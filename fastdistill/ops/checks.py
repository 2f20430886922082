"""Argument checks shared by the ops: each names the argument, its value and what would be right."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

INFINITY = math.inf
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_tensor(name: str, value: object, dtypes: Collection[torch.dtype]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a torch.Tensor")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {value.dtype}; expected one of {', '.join(map(str, dtypes))}")


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device} but {other_name} is on {other.device}; expected the same device")


def check_number(
    name: str, value: float, *, above: float = -INFINITY, minimum: float = -INFINITY, below: float = INFINITY
) -> None:
    """A finite int or float with ``above < value < below`` and ``value >= minimum``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; expected a number")
    if not (above < value < below and value >= minimum):  # comparisons only: torch.compile may make value symbolic
        limits = ((">", above), (">=", minimum), ("<", below))
        wanted = " and ".join(f"{sign} {limit}" for sign, limit in limits if abs(limit) != INFINITY)
        raise ValueError(f"{name} is {value!r}; expected a finite number {wanted}")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")
