"""What a model computes otherwise for a while, and is then as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HOOKED = "_fastdistill_hooked"
_CAPTURING = "transformers.utils.output_capturing"


def uncompiled(model: Any) -> Any:
    """The model itself where `torch.compile(model)` is given."""
    return getattr(model, "_orig_mod", model)


def device_type(model: nn.Module) -> str:
    """Of the device that a model's weights are on."""
    return next((weight.device.type for weight in model.parameters()), "cpu")


def is_peft(model: object) -> bool:
    """Whether it is a model of PEFT, around one of transformers."""
    return any(kind.__module__.startswith("peft.") for kind in type(model).__mro__) and hasattr(model, "get_base_model")


def unwrapped(model: Any) -> Any:
    """The model of transformers where torch.compile's is given, or PEFT's; with adapters, which are in its layers."""
    model = uncompiled(model)
    return unwrapped(model.get_base_model()) if is_peft(model) else model


def whole(model: Any) -> Any:
    """`unwrapped`, to be called in the model's stead. Raises ValueError for one of PEFT with a learned prompt, which is
    in none of its layers."""
    inner = uncompiled(model)
    if is_peft(inner) and inner.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"model has a prompt that PEFT learned ({inner.active_peft_config.peft_type}), which is in none of its "
            "layers; expected adapters such as LoRA's, or a model without"
        )
    return unwrapped(model)


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


def hooks_of(model: Any) -> set[str]:
    """What a model is within, by the names that `hooked` has of it."""
    return set(uncompiled(model).__dict__.get(_HOOKED, ()))


@contextmanager
def recomputed_within(model: nn.Module, by: str) -> Iterator[None]:
    """Within it gradient checkpointing computes a layer anew as it was computed. A backward pass that would do so
    afterwards, without what was changed for a while, raises RuntimeError."""
    modules = [module for module in model.modules() if "_gradient_checkpointing_func" in vars(module)]
    before: list[Any] = [module._gradient_checkpointing_func for module in modules]
    ended = False

    def checkpoint(run: Any, function: Any, *inputs: Any, **options: Any) -> Any:
        def again(*args: Any, **kwargs: Any) -> Any:
            if ended:
                raise RuntimeError(
                    f"a backward pass outside of fastdistill.{by} computes a layer anew, by gradient checkpointing, "
                    f"which was computed within it; expected backward() within the `with` block, or "
                    "model.gradient_checkpointing_disable()"
                )
            return function(*args, **kwargs)

        return run(again, *inputs, **options)

    for module, run in zip(modules, before, strict=True):
        module._gradient_checkpointing_func = partial(checkpoint, run)  # type: ignore[assignment]
    try:
        yield
    finally:
        ended = True
        for module, run in zip(modules, before, strict=True):
            module._gradient_checkpointing_func = run


@contextmanager
def forward_changed(module: nn.Module, change: Callable[..., Any], *, same: bool = False) -> Iterator[None]:
    """Within it the module computes what `change` makes of its forward and its inputs; with `same` that is what it
    would compute of itself, otherwise.

    By a `forward` of its own and not by a hook, since a compiled model does not notice hooks that come or go later.
    """
    before = module.__dict__.get("forward")
    module.forward = _Changed(module, change, same)
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class _Changed:
    """A module's forward for a while. A copy of the module has what it had before, on its own weights."""

    def __init__(self, module: nn.Module, change: Callable[..., Any], same: bool) -> None:
        self.module, self.before, self.change, self.same = module, module.forward, change, same

    def __call__(self, *inputs: Any, **others: Any) -> Any:
        return self.change(self.before, *inputs, **others)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        before: Any = self.before
        if isinstance(before, MethodType) and before.__self__ is self.module:
            return MethodType(before.__func__, memo.get(id(self.module), self.module))
        return copy.deepcopy(before, memo)


def inputs_changed(module: nn.Module, change: Callable[..., tuple[Any, ...]]) -> AbstractContextManager[None]:
    """Within it the module computes with the positional inputs that `change` makes of those it is given."""
    return forward_changed(module, lambda forward, *inputs, **others: forward(*change(*inputs), **others))


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether it is of one of these kinds, computes as all of that kind do, and nobody looks at it."""
    forward = vars(module).get("forward")
    is_own = forward is None or getattr(forward, "same", False)
    return type(module) in kinds and is_own and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at what it is given or gives, or at their gradients. Transformers' own hooks do when a
    model is called for its hidden states, and stay."""
    forward = (hook for hook in module._forward_hooks.values() if getattr(hook, "__module__", None) != _CAPTURING)
    return any((
        *forward, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
    ))  # fmt: skip


def refuse_peft(model: object) -> None:
    """Raises ValueError for a model whose weights have adapters beside them."""
    if is_peft(uncompiled(model)):
        raise ValueError(
            "model is PEFT's, with adapters beside its weights; merge them first: model.merge_and_unload()"
        )


def is_quantized(model: nn.Module) -> bool:
    """Whether it has layers that PyTorch quantized: these have no parameters, and round what they are given by its
    range."""
    return any(type(module).__module__.startswith("torch.ao.nn.quantized") for module in model.modules())


def refuse_quantized(model: nn.Module) -> None:
    """Raises ValueError for a model that `is_quantized`."""
    if is_quantized(model):
        raise ValueError("model has quantized layers; expected the model as it was before it was quantized")


def refuse_hooked(model: object) -> None:
    """Raises ValueError for a model whose copy would keep its hooks for ever, or lack its adapters."""
    refuse_peft(model)
    if marks := getattr(model, _HOOKED, None):
        raise ValueError(f"model is within fastdistill.{', '.join(sorted(marks))}; expected one that is not")
