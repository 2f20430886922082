from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from fastdistill import first_layers
from fastdistill.models import fused_residuals as module
from fastdistill.models.first_token import first_token_only
from fastdistill.models.frozen import frozen
from fastdistill.models.fused_residuals import fused_residuals
from fastdistill.models.packed import PACKABLE, packed_forward
from fastdistill.models.stacking import Stack
from fastdistill.ops.library import has_kernel
from tests.models.known import batch_of, model_of

pytestmark = pytest.mark.skipif(not has_kernel("dropout_add_layer_norm", "CPU"), reason="nothing was compiled")
OTHERS = ("distilbert", "roberta-prelayernorm", "xlm-roberta-xl", "megatron-bert")
"""Of these the ends of half layers are others, or have no normalisation."""


def run(model: Any, batch: dict[str, Tensor]) -> tuple[list[Tensor], int]:
    """Logits and gradients, and how often the op was asked."""
    model.zero_grad()
    with patch.object(module, "dropout_add_layer_norm", wraps=module.dropout_add_layer_norm) as asked:
        logits = model(**batch).logits
        logits.square().sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], asked.call_count


@pytest.mark.parametrize("kind", [*PACKABLE, "mpnet"])
def test_says_and_learns_the_same(kind: str) -> None:
    model, batch = model_of(kind).double(), batch_of(kind)
    expected, _ = run(model, batch)
    with fused_residuals(model, None, model):
        found, asked = run(model, batch)
    assert asked == (0 if kind in OTHERS else 2 if kind == "mpnet" else 4)
    torch.testing.assert_close(found, expected)
    assert run(model, batch)[1] == 0


def test_of_a_stack_all_are_asked_at_once() -> None:
    model, batch = model_of("bert").double(), batch_of("bert")
    expected = model(**batch).logits
    stack = Stack(model, [model_of("bert").double() for _ in range(2)])
    stack.model.eval()
    twice = {name: torch.cat([one, one]) for name, one in batch.items()}
    op = patch.object(module, "dropout_add_layer_norm", wraps=module.dropout_add_layer_norm)
    with fused_residuals(stack.model), op as asked:
        logits = stack(**twice).logits
    assert asked.call_count == 4
    torch.testing.assert_close(logits, torch.cat([expected, expected]))


def test_a_copy_would_keep_the_original_s_weights() -> None:
    model = model_of("bert")
    with fused_residuals(model), pytest.raises(ValueError, match="within fastdistill.fused_residuals"):
        first_layers(model, 1)


def test_dropout() -> None:
    """Of the op's own numbers, which come again from the same seed, in training alone."""
    model = model_of("bert", attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.5).double()
    batch = batch_of("bert")
    with fused_residuals(model):
        plain, _ = run(model.eval(), batch)
        torch.manual_seed(0)
        first, asked = run(model.train(), batch)
        torch.manual_seed(0)
        again, _ = run(model, batch)
        other, _ = run(model, batch)
    assert asked == 4
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[0], plain[0])


@torch.no_grad()
def test_with_what_else_changes_a_layer() -> None:
    model, batch = model_of("bert").double().eval(), batch_of("bert")
    batch["attention_mask"][0, 3:] = 0
    expected = model(**batch).logits
    with fused_residuals(model), first_token_only(model), frozen(model):
        torch.testing.assert_close(packed_forward(model, batch).logits, expected)


def test_what_stays_as_it_is() -> None:
    """Modules that someone looks at, other normalisations, dropout of all, tangents, and what is compiled."""
    batch = batch_of("bert")
    watched, other, all_left_out = model_of("bert"), model_of("bert"), model_of("bert", hidden_dropout_prob=0.0)
    for layer in watched.bert.encoder.layer:
        layer.attention.output.LayerNorm.register_forward_hook(lambda *_: None)
        layer.output.dropout.register_forward_hook(lambda *_: None)
    for layer in other.bert.encoder.layer:
        layer.attention.output.LayerNorm = nn.RMSNorm(32)
        layer.output.LayerNorm = nn.LayerNorm(32, elementwise_affine=False)
    for layer in all_left_out.bert.encoder.layer:
        layer.attention.output.dropout.p = layer.output.dropout.p = 1.0
    differentiated, exact = model_of("bert"), model_of("bert", layer_norm_eps=0.0)
    for layer in differentiated.bert.encoder.layer:
        layer.attention.output.LayerNorm.register_full_backward_hook(lambda *_: None)
        layer.output.dropout.register_full_backward_pre_hook(lambda *_: None)
    mixed = model_of("bert").bfloat16()
    for norm in (each for each in mixed.modules() if isinstance(each, nn.LayerNorm)):
        norm.float()
    for model in (watched, other, all_left_out.train(), differentiated, exact, mixed):
        with fused_residuals(model):
            assert run(model, batch)[1] == 0
    model = model_of("bert", attn_implementation="eager")
    weights = dict(model.named_parameters())
    tangents = {name: torch.ones_like(weight) for name, weight in weights.items()}

    def logits(given: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, given, kwargs=batch).logits

    expected = torch.func.jvp(logits, (weights,), (tangents,))
    with fused_residuals(model):
        torch.testing.assert_close(torch.func.jvp(logits, (weights,), (tangents,)), expected)
    compiled: Any = torch.compile(model_of("bert"), backend="eager")
    with fused_residuals(compiled):
        assert all("forward" not in vars(each) for each in compiled._orig_mod.modules())
