from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fastdistill.models import attention
from fastdistill.models.packed import PACKABLE
from fastdistill.models.short_attention import short_attention
from fastdistill.ops.native import NATIVE
from tests.models.known import batch_of, model_of

pytestmark = pytest.mark.skipif(
    NATIVE.cpu is None or not NATIVE.cpu.short_keys, reason="the kernel is for AVX2 and AVX-512"
)
OWN = "megatron-bert", "rembert"
"""Their attention is their own, and eager; so is LayoutLM's in transformers 5.17."""


def run(model: Any, batch: dict[str, Tensor]) -> tuple[Any, int]:
    """Logits and gradients, and how often the kernel was asked."""
    model.zero_grad()
    with patch.object(attention, "gated_attention", wraps=attention.gated_attention) as asked:
        logits = model(**batch).logits
        logits.square().sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], asked.call_count


@pytest.mark.parametrize("kind", PACKABLE)
def test_says_and_learns_the_same(kind: str) -> None:
    model, batch = model_of(kind).double(), batch_of(kind)
    implementation = model.config._attn_implementation
    expected, _ = run(model, batch)
    with short_attention(model, None):
        found, asked = run(model, batch)
    assert asked == (0 if kind in OWN or implementation != "sdpa" else 2)
    torch.testing.assert_close(found, expected)
    assert model.config._attn_implementation == implementation
    assert run(model, batch)[1] == 0


def test_dropout() -> None:
    """Of the kernel's own numbers, which come again from the same seed."""
    model = model_of("bert", attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0).double().train()
    batch = batch_of("bert")
    with short_attention(model):
        torch.manual_seed(0)
        first, asked = run(model, batch)
        other, _ = run(model, batch)
        torch.manual_seed(0)
        again, _ = run(model, batch)
    assert asked == 2
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("options", [{"attn_implementation": "eager"}, {"attn_implementation": "fastdistill"}])
def test_what_stays_as_it_is(options: Any) -> None:
    model, other = model_of("bert", **options), model_of("llama")
    with short_attention(model, other):
        assert model.config._attn_implementation == options["attn_implementation"]
        assert other.config._attn_implementation == "sdpa"
