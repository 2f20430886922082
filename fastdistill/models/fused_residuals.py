"""Dropout, residual connection and layer normalisation of encoders in one pass."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.models.hooks import device_type, forward_changed, hooked, is_plain, uncompiled
from fastdistill.models.stacking import StackedLayerNorm
from fastdistill.ops.dropout_add_layer_norm import dropout_add_layer_norm
from fastdistill.ops.library import followed, has_kernel

DEVICES = ("cpu",)
"""Where it is known to be faster. On a GPU it was not measured yet."""


@contextmanager
def fused_residuals(*models: nn.Module | None, devices: Collection[str] = DEVICES) -> Iterator[None]:
    """Within it the ends of BERT's half layers, `dropout(dense(x)) + residual` normalised, are computed by
    `fastdistill.dropout_add_layer_norm`, with the same result within rounding, but for dropout, whose numbers are
    others.

    It comes before what changes these modules' inputs, as `first_token_only` does.

    Args:
        models: encoders whose modules compute so as BERT's do, or stacks of such (`fastdistill.models.stacking`); other
            modules, compiled models, those on other devices, and None stay as they are.
        devices: the types of those on which it is done, where the op has a kernel.
    """
    served = {device for device in devices if has_kernel("dropout_add_layer_norm", device.upper())}
    with ExitStack() as leave:
        for model in {id(model): model for model in models if model is not None}.values():
            if uncompiled(model) is model and device_type(model) in served:
                leave.enter_context(hooked(model, "fused_residuals"))
                for module in model.modules():
                    if _ends_half_a_layer(type(module)) and is_plain(module, type(module)):
                        leave.enter_context(forward_changed(module, partial(_forward, module, served)))
        yield


def _ends_half_a_layer(kind: type[nn.Module]) -> bool:
    """Whether its forward is BERT's, which transformers has as a copy in each model that is alike."""
    if not kind.__name__.endswith("Output") or not kind.__module__.startswith("transformers."):
        return False
    from transformers.models.bert.modeling_bert import BertOutput

    code, known = (each.forward.__code__ for each in (kind, BertOutput))
    return bool(code.co_code == known.co_code and code.co_names == known.co_names)


def _forward(module: Any, served: Collection[str], own: Any, hidden_states: Tensor, input_tensor: Tensor) -> Any:
    norm, dropout = module.LayerNorm, module.dropout
    p = dropout.p if dropout.training else 0.0
    if (
        hidden_states.device.type not in served
        or not (is_plain(norm, nn.LayerNorm, StackedLayerNorm) and is_plain(dropout, nn.Dropout))
        or norm.weight is None
        or not (torch.is_autocast_enabled(hidden_states.device.type) or norm.weight.dtype == input_tensor.dtype)
        or not 0 < norm.eps < 1
        or p == 1
        or followed()
    ):
        return own(hidden_states, input_tensor)
    x = module.dense(hidden_states)
    return dropout_add_layer_norm(x, input_tensor, norm.weight, norm.bias, dropout_p=p, eps=norm.eps)
