"""What a CPU computes of encoders in training by kernels that are faster than PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastdistill.models.fast_linear import fast_linear
from fastdistill.models.fused_residuals import fused_residuals
from fastdistill.models.short_attention import short_attention


@contextmanager
def cpu_kernels(*models: nn.Module | None) -> Iterator[None]:
    """Within it models on a CPU compute by kernels what these are known to do faster there, in any training loop:

    - attention of short sequences, of BERT-like encoders with ``attn_implementation="sdpa"``
      (`fastdistill.gated_attention`, up to 256 keys with AVX-512, 64 with AVX2);
    - the ends of BERT's half layers, by `fastdistill.dropout_add_layer_norm`;
    - linear layers in float32 on AMD's processors with AVX-512, by oneDNN's products, as `fastdistill.doctor` says.

    Logits and gradients are the same within rounding, but for dropout, whose numbers are others, though still set by
    PyTorch's seed. There are no gradients of gradients. Recipes train so.

    Args:
        models: any, each once; compiled ones, those on other devices, None, and layers of other kinds stay as they are.
            `fastdistill.first_token_only` comes within it, not around it.

    Raises ValueError for a model within it already.
    """
    with fast_linear(*models), fused_residuals(*models), short_attention(*models):
        yield
