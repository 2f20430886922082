"""Linear layers of models on a CPU by oneDNN's matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastdistill.models.hooks import device_type, forward_changed, hooked, is_plain, uncompiled
from fastdistill.ops.linear import by_onednn, linear


@contextmanager
def fast_linear(*models: nn.Module | None) -> Iterator[None]:
    """Within it models' linear layers have, on a CPU in float32, oneDNN's products in place of those of PyTorch's BLAS,
    where they are known to be faster (`fastdistill.ops.linear`). What they compute and their gradients are the same
    within rounding; there are no gradients of gradients.

    Args:
        models: any; compiled ones, those on other devices, None, and what is no plain `torch.nn.Linear` stay as they
            are.
    """
    with ExitStack() as leave:
        for model in {id(model): model for model in models if by_onednn() and model is not None}.values():
            if uncompiled(model) is model and device_type(model) == "cpu":
                leave.enter_context(hooked(model, "fast_linear"))
                for module in model.modules():
                    if is_plain(module, nn.Linear):
                        leave.enter_context(forward_changed(module, partial(_forward, module), same=True))
        yield


def _forward(module: Any, _: Any, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)
