from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForSequenceClassification, MPNetConfig, MPNetForSequenceClassification

from fastdistill.models.attention_scores import call
from fastdistill.models.students import shuffled_sharing
from tests import tiny

SMALL = {
    "vocab_size": 65, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 40,
}  # fmt: skip


def batch() -> dict[str, Tensor]:
    return {name: value for name, value in tiny.batches((4,))[0].items() if name != "labels"}


def real(inputs: dict[str, Tensor]) -> Tensor:
    """Which pairs of tokens are no padding, ``[B, 1, S, S]``."""
    mask = inputs["attention_mask"].bool()
    return (mask[:, :, None] & mask[:, None])[:, None]


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "fastdistill"])
def test_they_are_query_times_key(implementation: str) -> None:
    model, inputs, seen = tiny.bert(layers=2).eval().double(), batch(), []
    model.set_attn_implementation(implementation)
    for layer in model.bert.encoder.layer:
        of = layer.attention.self
        for one in (of.query, of.key):
            one.register_forward_hook(lambda module, given, found: seen.append(found.unflatten(-1, (2, 8))))
    plain = model(**inputs).logits
    seen.clear()
    outputs = call(model, inputs | {"output_attentions": True})
    torch.testing.assert_close(outputs.logits, plain)
    assert len(outputs.attentions) == 2
    for layer, scores in enumerate(outputs.attentions):
        query, key = (one.transpose(1, 2) for one in seen[2 * layer : 2 * layer + 2])
        expected = query @ key.mT / 8**0.5
        torch.testing.assert_close(scores[real(inputs).expand_as(scores)], expected[real(inputs).expand_as(scores)])
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {
        implementation
    }
    assert call(model, inputs).attentions is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: MPNetForSequenceClassification(MPNetConfig(**SMALL)),  # whose attention is its own
        lambda: AlbertForSequenceClassification(AlbertConfig(**SMALL, embedding_size=8)),  # one layer, applied twice
        lambda: torch.compile(tiny.bert(layers=2)),
    ],
)
def test_of_any_encoder_their_softmax_is_its_attention(make: Any) -> None:
    torch.manual_seed(0)
    model, inputs = make().eval(), batch()
    found = call(model, inputs | {"output_attentions": True}).attentions
    plain = copy.deepcopy(getattr(model, "_orig_mod", model))
    plain.set_attn_implementation("eager")
    wanted = plain(**inputs, output_attentions=True).attentions
    assert len(found) == len(wanted) == 2
    for scores, probabilities in zip(found, wanted, strict=True):
        torch.testing.assert_close(scores.softmax(-1), probabilities)
        assert scores.requires_grad


def test_layers_that_are_applied_again_have_their_own() -> None:
    found = call(shuffled_sharing(tiny.bert(layers=1)).eval(), batch() | {"output_attentions": True}).attentions
    assert len(found) == 2 and not torch.equal(*found)


def test_dropout_is_not_on_them() -> None:
    torch.manual_seed(0)
    model, inputs = tiny.bert(layers=1, dropout=0.9).train(), batch()
    model.bert.embeddings.dropout.p = 0.0
    first, second = (call(model, inputs | {"output_attentions": True}) for _ in range(2))
    torch.testing.assert_close(first.attentions, second.attentions)
    assert not torch.equal(first.logits, second.logits)


def test_what_has_none_is_named() -> None:
    asked = batch() | {"output_attentions": True}
    model = tiny.bert(layers=2).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="BertForSequenceClassification with gradient checkpointing"):
        call(model, asked)

    class Plain(nn.Module):
        config = tiny.bert(layers=2).config

        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny.bert(layers=1)

        def forward(self, **inputs: Any) -> Any:
            return self.inner(**inputs)

    with pytest.raises(ValueError, match="a Plain, of whose 2 layers 1 have attention scores"):
        call(Plain(), asked)
