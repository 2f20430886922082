"""Argument checks shared by the ops: each names the argument, its value and what would be right.

An op first asks in one condition whether everything is in order, which costs a microsecond, and looks for what is wrong
only if something is.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection

import torch
from torch import Tensor

INFINITY = math.inf
LARGEST = sys.float_info.max
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
NUMBERS = (float, int)
STRIDED = torch.strided
TEMPERATURES = (1e-4, 1e4)
"""The least and the most that a loss at a temperature is computed for; beyond, little but rounding error is left."""


def is_floating(value: object) -> bool:
    """Whether ``value`` is what :func:`check_tensor` accepts for FLOATING."""
    return isinstance(value, Tensor) and value.dtype in FLOATING and value.layout is STRIDED and not value.is_nested


def check_tensor(name: str, value: object, dtypes: Collection[torch.dtype]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a torch.Tensor")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {value.dtype}; expected one of {', '.join(map(str, dtypes))}")
    if value.is_nested:
        raise ValueError(f"{name} is a nested tensor; expected an ordinary one (see Tensor.to_padded_tensor)")
    if value.layout is not STRIDED:
        raise ValueError(f"{name} has layout {value.layout}; expected torch.strided (see Tensor.to_dense)")


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device} but {other_name} is on {other.device}; expected the same device")


def check_number(
    name: str,
    value: float,
    *,
    above: float = -INFINITY,
    minimum: float = -LARGEST,
    below: float = INFINITY,
    maximum: float = LARGEST,
) -> None:
    """An int or float, finite also as a float, with ``above < value < below`` and ``minimum <= value <= maximum``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; expected a number")
    # comparisons only: torch.compile may make value symbolic
    if not (above < value < below and minimum <= value <= maximum):
        limits = ((">", above), (">=", minimum), ("<", below), ("<=", maximum))
        wanted = " and ".join(f"{sign} {limit}" for sign, limit in limits if abs(limit) < LARGEST)
        shown = f"an int of {value.bit_length()} bits" if isinstance(value, int) and abs(value) > LARGEST else value
        raise ValueError(f"{name} is {shown!s}; expected a finite number {wanted}".rstrip())


def check_temperature(name: str, value: float) -> None:
    check_number(name, value, minimum=TEMPERATURES[0], maximum=TEMPERATURES[1])


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected a bool")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast, where it is on, casts to on the device; "meta" has none."""
    kind = device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
