"""What a model computes otherwise for a while, and is then as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HOOKED = "_fastdistill_hooked"


def uncompiled(model: Any) -> Any:
    """The model itself where `torch.compile(model)` is given."""
    return getattr(model, "_orig_mod", model)


@contextmanager
def hooked(model: PreTrainedModel, by: str) -> Iterator[None]:
    """Marks a model that has hooks for a while, with which it must neither be copied nor get the same once more."""
    model = uncompiled(model)
    marks: set[str] = model.__dict__.setdefault(_HOOKED, set())
    if by in marks:
        raise ValueError(f"model is within fastdistill.{by} already; expected one that is not")
    marks.add(by)
    try:
        yield
    finally:
        marks.remove(by)
        if not marks:
            delattr(model, _HOOKED)


@contextmanager
def inputs_changed(module: nn.Module, change: Callable[..., tuple[Any, ...]]) -> Iterator[None]:
    """Within it the module computes with the positional inputs that `change` makes of those it is given.

    By a `forward` of its own and not by a hook, since a compiled model does not notice hooks that come or go later.
    """
    forward, before = module.forward, module.__dict__.get("forward")
    module.forward = lambda *inputs, **others: forward(*change(*inputs), **others)
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def refuse_hooked(model: object) -> None:
    """Raises ValueError for a model whose copy would keep its hooks for ever."""
    if marks := getattr(model, _HOOKED, None):
        raise ValueError(f"model is within fastdistill.{', '.join(sorted(marks))}; expected one that is not")
