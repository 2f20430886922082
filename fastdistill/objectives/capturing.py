"""What cannot be in a CUDA graph, of an objective and of the models that it is of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fastdistill.models.hooks import hooks_of, uncompiled, unwrapped
from fastdistill.objectives.base import Objective


def obstacle_to_capture(objective: Objective, models: Mapping[str, nn.Module]) -> str | None:
    """Why a step of these models, by the names of arguments, cannot be replayed; None where nothing is known."""
    if objective.on_host is not None:
        return f"objective {objective} {objective.on_host}"
    for name, model in models.items():
        reason = _obstacle(model)
        if reason is not None:
            return f"{name} is a {type(unwrapped(model)).__name__} {reason}"
    return None


def _obstacle(model: nn.Module) -> str | None:
    config = getattr(unwrapped(model), "config", None)
    if uncompiled(model) is not model or any(module._compiled_call_impl is not None for module in model.modules()):
        return "that is compiled"
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "with gradient checkpointing, which saves the generator's state on the host"
    if getattr(model, "hf_device_map", None) is not None:
        return "that is placed by a device map"
    if "gate" in hooks_of(unwrapped(model)):
        return "within fastdistill.gate, whose gates may be replaced"
    dropped = [name for name, value in vars(config).items() if name.endswith("layerdrop") and value] if config else []
    if dropped and any(weight.requires_grad for weight in model.parameters()):  # and not in eval mode
        return f"whose config has {dropped[0]}: the host draws which layers run"
    hooked = next((name for name, hooks in _hooks(model) if any(map(_is_foreign, hooks.values()))), None)
    if hooked is not None:
        return f"with a hook on {hooked or 'itself'}, which a replay does not call"
    return None


def _hooks(model: nn.Module) -> Iterable[tuple[str, Mapping[int, Any]]]:
    for name, module in model.named_modules():
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        yield from ((name, getattr(module, kind)) for kind in kinds)
    for name, weight in model.named_parameters():
        for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            yield name, getattr(weight, kind, None) or {}


def _is_foreign(hook: Any) -> bool:
    """transformers' own keep what modules give, while they do."""
    return not str(getattr(hook, "__module__", "")).startswith(("transformers.", "fastdistill."))
