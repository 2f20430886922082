"""Models whose weights do not change for a while: they compute with copies of them, laid out for matrix products."""

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
from fastdistill.ops.linear import by_onednn, linear, pack_weight

MULTIPLE = 16
"""Neurons. In float32 (MKL, one thread with AVX-512) 1,600 tokens by 1,499 neurons of 384 inputs took 27.2 ms, by 1,504
19.0; a GPU's matrix units take rows of 16 bits where each begins at a multiple of 16 bytes."""

ROWS = 1024
"""Tokens of a batch, about. Weights packed for 64 to 2,048 serve either as well."""


@contextmanager
def frozen(*models: nn.Module | None) -> Iterator[None]:
    """Within it a model computes, without gradients, with copies of its weights: of pruned layers with neurons whose
    weights are 0 beside their own, up to the next multiple of 16, and of all linear layers in the order that oneDNN's
    products read them in, where these are faster. What the model says is the same, within rounding.

    Args:
        models: layers whose weights are changed within it are computed as they are then. What is None, compiled,
            wrapped, or of an unknown architecture is computed as it is, and so are linear maps that are no plain ones.
    """
    with ExitStack() as leave:
        for model in models:
            if not isinstance(model, PreTrainedModel) or model.config.model_type not in ARCHITECTURES:
                continue
            copies = {}
            if by_onednn():
                copies = {module: _Copy(module) for module in model.modules() if is_plain(module, nn.Linear)}
            for block in blocks(model):
                linears = *block.neuron_in, block.neuron_out
                is_known = block.names.neuron_parts == 1 and all(is_plain(each, nn.Linear) for each in linears)
                if is_known and (missing := -block.neurons % MULTIPLE):
                    copies |= {module: _Copy(module, rows=missing) for module in block.neuron_in}
                    copies[block.neuron_out] = _Copy(block.neuron_out, columns=missing)
            for module, copy in copies.items():
                leave.enter_context(forward_changed(module, copy.forward, same=copy.is_whole))
        yield


class _Copy:
    """A linear layer's weight and bias, with zeros beyond their own, and that weight packed."""

    def __init__(self, module: Any, rows: int = 0, columns: int = 0) -> None:
        weight, self.bias = module.weight.detach(), module.bias
        self.module, self.of = module, _state(module)
        self.is_whole = not (rows or columns)
        self.weight = weight if self.is_whole else F.pad(weight, (0, columns, 0, rows))
        if rows and self.bias is not None:
            self.bias = F.pad(self.bias.detach(), (0, rows))
        self.packed = pack_weight(self.weight, ROWS)

    def forward(self, own: Any, x: Tensor) -> Any:
        is_known = x.shape[-1] == self.weight.shape[1] and _state(self.module) == self.of
        if is_known and not torch.is_grad_enabled():
            return linear(x, self.weight, self.bias, self.packed)
        return own(x[..., : self.module.weight.shape[1]])  # without what another layer's copy added


def _state(module: Any) -> list[tuple[int, ...]]:
    """Another where weight or bias was replaced, moved, or changed."""
    own: list[Tensor] = [one for one in (module.weight, module.bias) if one is not None]
    return [(id(one), one.data_ptr(), 0 if one.is_inference() else one._version) for one in own]
