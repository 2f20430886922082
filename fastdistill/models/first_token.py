"""Classifiers look at nothing but the first token's last state: the last layer need not compute the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastdistill.models.architectures import ARCHITECTURES, architecture, blocks
from fastdistill.models.first_token_attention import first_token_attention
from fastdistill.models.heads import is_causal
from fastdistill.models.hooks import hooked, inputs_changed, is_quantized, uncompiled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEADS = ("ForSequenceClassification", "ForImageClassification")


@contextmanager
def first_token_only(*models: PreTrainedModel | None) -> Iterator[None]:
    """Within it a classifier's last layer is computed for the first token alone.

    Logits and gradients stay the same, within rounding. With the first token's query, keys and values of all others
    need not be computed (`fastdistill.models.first_token_attention`), and all that follows attention is computed for it
    alone: a layer's matrix products become about those of one token. The last hidden state has one token, or (ViT) is
    right at the first alone.

    Args:
        models: transformers' sequence and image classifiers of an architecture that `fastdistill.gate` knows, whose
            head takes the first token. Any other model, a decoder among them, or None, stays as it is.
    """
    with ExitStack() as leave:
        for model in models:
            if model is not None and looks_at_the_first_token(model):
                leave.enter_context(hooked(model, "first_token_only"))
                last, names = blocks(model)[-1], architecture(model)
                leave.enter_context(inputs_changed(last.layer.get_submodule(names.alone), _first))
                if len(names.head_in) == 3 and not names.relative:
                    leave.enter_context(first_token_attention(last))
        yield


def looks_at_the_first_token(model: nn.Module) -> bool:
    """Whether it is a classifier whose head is known to look at nothing else."""
    model = uncompiled(model)
    names = ARCHITECTURES.get(getattr(getattr(model, "config", None), "model_type", ""))
    own = type(model).__module__.startswith("transformers.")
    is_classifier = names is not None and bool(names.alone) and own and type(model).__name__.endswith(HEADS)
    # quantized layers round by the range of all tokens
    return is_classifier and not is_causal(model) and not is_quantized(model)


def _first(*inputs: Any) -> tuple[Any, ...]:
    return tuple(value[:, :1] if isinstance(value, Tensor) else value for value in inputs)
