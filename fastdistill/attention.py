"""`gated_attention` as an attention implementation of transformers: ``attn_implementation="fastdistill"``."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastdistill.ops.gated_attention import gated_attention

IMPLEMENTATION = "fastdistill"

_GATE = "_fastdistill_head_gate"


@contextmanager
def head_gate(attention: nn.Module, gate: Callable[[], Tensor]) -> Iterator[None]:
    """Within it that attention module's heads have the gates that `gate` gives at each call."""
    setattr(attention, _GATE, gate)
    try:
        yield
    finally:
        delattr(attention, _GATE)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers calls: ``[B, H, S, D]`` in, ``[B, S, H, D]`` out.

    Raises ValueError for what it cannot do: grouped heads, and giving the attention weights.
    """
    if kwargs.get("output_attentions"):
        raise ValueError(f"output_attentions is True, which {IMPLEMENTATION!r} attention cannot give; expected 'eager'")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", False)
    is_causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1  # a mask says all
    gate = getattr(module, _GATE, None)
    context = gated_attention(
        query,
        key,
        value,
        gate and gate(),
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scaling,
    )
    return context.transpose(1, 2).contiguous(), None


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Registers when transformers' models are first imported: who needs none of them does not pay for that."""

    module = "transformers.modeling_utils"

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Make ``attn_implementation="fastdistill"`` known, now or as soon as transformers has been imported."""
    if _AfterImport.module in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport())
