"""Models whose weights do not change for a while: they compute with copies of them, cast and laid out for matrix
products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdistill.models.architectures import ARCHITECTURES, blocks
from fastdistill.models.hooks import forward_changed, is_plain
from fastdistill.ops.checks import autocast_dtype
from fastdistill.ops.linear import linear, pack_weight

MULTIPLE = 16
"""Neurons. In float32 (MKL, one thread with AVX-512) 1,600 tokens by 1,499 neurons of 384 inputs took 27.2 ms, by 1,504
19.0; a GPU's matrix units take rows of 16 bits where each begins at a multiple of 16 bytes."""

ROWS = 1024
"""Tokens of a batch, about. Weights packed for 64 to 2,048 serve either as well."""


@contextmanager
def frozen(*models: nn.Module | None, autocast: torch.dtype | None = None) -> Iterator[None]:
    """Within it a model computes, without gradients, with copies of its weights: of pruned layers with neurons whose
    weights are 0 beside their own, up to the next multiple of 16, and of all linear layers in the order that oneDNN's
    products read them in, where these are faster, and in autocast's dtype, in which else each batch casts them anew.
    What the model says is the same, within rounding.

    Args:
        models: layers whose weights are changed within it are computed as they are then. What is None, compiled,
            wrapped, or of an unknown architecture is computed as it is, and so are linear maps that are no plain ones.
        autocast: the dtype of the autocast that they run under, if they do; without it they are computed as they are.
    """
    with ExitStack() as leave:
        for model in models:
            if not isinstance(model, PreTrainedModel) or model.config.model_type not in ARCHITECTURES:
                continue
            added = _added(model)
            linears = [module for module in model.modules() if is_plain(module, nn.Linear)]
            for module in linears:
                copy = _Copy(module, autocast, *added.get(module, (0, 0)))
                if copy.is_other:
                    leave.enter_context(forward_changed(module, copy.forward, same=copy.is_whole))
        yield


def _added(model: PreTrainedModel) -> dict[nn.Module, tuple[int, int]]:
    """The rows and columns of zeros that fill up a layer's neurons, by its linear maps."""
    added: dict[nn.Module, tuple[int, int]] = {}
    for block in blocks(model):
        linears = *block.neuron_in, block.neuron_out
        is_known = block.names.neuron_parts == 1 and all(is_plain(each, nn.Linear) for each in linears)
        if is_known and (missing := -block.neurons % MULTIPLE):
            added |= dict.fromkeys(block.neuron_in, (missing, 0)) | {block.neuron_out: (0, missing)}
    return added


class _Copy:
    """A linear layer's weight and bias, with zeros beyond their own, in autocast's dtype, and that weight packed."""

    def __init__(self, module: Any, autocast: torch.dtype | None, rows: int, columns: int) -> None:
        weight, self.bias = module.weight.detach(), module.bias
        self.module, self.of = module, _state(module)
        self.is_whole = not (rows or columns)
        dtype = autocast if autocast and _is_cast(weight.dtype) else weight.dtype
        self.weight = (weight if self.is_whole else F.pad(weight, (0, columns, 0, rows))).to(dtype)
        if self.bias is not None and (rows or self.bias.dtype != dtype):
            self.bias = F.pad(self.bias.detach(), (0, rows)).to(dtype)
        self.packed = pack_weight(self.weight, ROWS)

    @property
    def is_other(self) -> bool:
        """Whether it is anything but the layer's own."""
        return not self.is_whole or self.packed is not None or self.weight.dtype != self.module.weight.dtype

    def forward(self, own: Any, x: Tensor) -> Any:
        to = autocast_dtype(x.device)
        dtype = to if to and _is_cast(x.dtype) else x.dtype
        is_known = (x.shape[-1], dtype) == (self.weight.shape[1], self.weight.dtype)
        if is_known and not torch.is_grad_enabled() and _state(self.module) == self.of:
            return linear(x.to(dtype), self.weight, self.bias, self.packed)
        return own(x[..., : self.module.weight.shape[1]])  # without what another layer's copy added


def _is_cast(dtype: torch.dtype) -> bool:
    """Whether autocast changes it."""
    return dtype.is_floating_point and dtype != torch.float64


def _state(module: Any) -> list[tuple[int, ...]]:
    """Another where weight or bias was replaced, moved, or changed."""
    own: list[Tensor] = [one for one in (module.weight, module.bias) if one is not None]
    return [(id(one), one.data_ptr(), 0 if one.is_inference() else one._version) for one in own]
