"""A model's outputs with its attention scores as they are before the softmax, which transformers does not give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

from fastdistill.models.hooks import unwrapped

ASKED = "output_attentions"

_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


def call(model: nn.Module, features: Mapping[str, Any]) -> Any:
    """The model's outputs. Where `ASKED` is among the features, ``attentions`` are each layer's scores before the
    softmax, ``[B, H, S, S]``, with the mask added, in place of probabilities, on which dropout has been.

    Attention is then computed by PyTorch's plain operations, whatever the model's is otherwise, and not compiled.
    Raises ValueError for a model of which they cannot be had so, and for one trained with gradient checkpointing.
    """
    if not features.get(ASKED):
        return model(**features)
    plain = unwrapped(getattr(model, "module", model))  # of DistributedDataParallel's
    name, layers = type(plain).__name__, getattr(getattr(plain, "config", None), "num_hidden_layers", None)
    if plain.training and any(getattr(module, "gradient_checkpointing", False) for module in plain.modules()):
        raise ValueError(
            f"model is a {name} with gradient checkpointing, which does not keep attention scores; expected "
            "model.gradient_checkpointing_disable()"
        )
    with _eager(plain), torch.compiler.set_stance("force_eager"), _Scores() as scores:
        outputs = model(**{name: value for name, value in features.items() if name != ASKED})
    if len(scores.found) != layers:
        raise ValueError(
            f"model is a {name}, of whose {layers} layers {len(scores.found)} have attention scores that can be seen; "
            "expected one whose layers each take a softmax of [B, H, S, S]"
        )
    outputs.attentions = tuple(scores.found)
    return outputs


class _Scores(TorchFunctionMode):
    """Keeps what any softmax of four dimensions is given."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _SOFTMAX and args and args[0].dim() == 4:
            self.found.append(args[0])
        return function(*args, **(kwargs or {}))


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Within it attention is transformers' own of plain operations."""
    found = (getattr(module, "config", None) for module in model.modules())
    configs: list[Any] = list({id(one): one for one in found if isinstance(one, PreTrainedConfig)}.values())
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
