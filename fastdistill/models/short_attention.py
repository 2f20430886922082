"""Attention of encoders in training on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from fastdistill.models.architectures import configs
from fastdistill.models.attention import IMPLEMENTATION
from fastdistill.models.packed import PACKABLE
from fastdistill.ops.gate_rules import short_keys


@contextmanager
def short_attention(*models: object) -> Iterator[None]:
    """Within it models on a CPU whose attention is PyTorch's have "fastdistill"'s in its place.

    That is a kernel for short sequences there, of the same result within rounding but for dropout, whose numbers are
    others; with it 12 to 128 tokens take .40 to .62 of the time (docs/cpu.md). Longer ones with dropout are PyTorch's.

    Args:
        models: encoders in `fastdistill.models.packed.PACKABLE`, with ``attn_implementation="sdpa"``; any other stays
            as it is.
    """
    changed = [
        config
        for model in models
        if isinstance(model, PreTrainedModel) and model.device.type == "cpu" and model.config.model_type in PACKABLE
        for config in configs(model)
        if config._attn_implementation == "sdpa" and short_keys()
    ]
    for config in changed:
        config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        for config in changed:
            config._attn_implementation = "sdpa"
