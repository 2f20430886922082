from __future__ import annotations

from unittest.mock import Mock, patch

import pytest
import torch
from torch import Tensor, nn

from fastdistill import first_layers
from fastdistill.models import packed
from fastdistill.models.fast_linear import fast_linear
from fastdistill.models.first_token import first_token_only
from fastdistill.models.frozen import frozen
from fastdistill.models.packed import packed_forward
from tests.models.known import batch_of, model_of

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.mark.parametrize("kind", ["bert", "distilbert", "mpnet", "vit", "llama"])
def test_models_say_and_learn_the_same(kind: str, onednn: Mock) -> None:
    model, batch = model_of(kind), batch_of(kind)

    def run() -> list[Tensor]:
        model.zero_grad()
        logits = model(**batch).logits
        logits.square().sum().backward()
        return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = run()
    with fast_linear(model, None, model):
        found = run()
    assert onednn.called
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert all("forward" not in vars(module) for module in model.modules())


@torch.no_grad()
def test_packed_and_for_the_first_token(onednn: Mock) -> None:
    """What asks for plain linear layers finds them."""
    model, batch = model_of("bert").eval(), batch_of("bert")
    batch["attention_mask"][0, 3:] = 0
    expected = model(**batch).logits
    with patch.object(packed, "packed", wraps=packed.packed) as packs:
        with fast_linear(model), first_token_only(model), frozen(model):
            torch.testing.assert_close(packed_forward(model, batch).logits, expected)
        assert packs.called
    weights = [call.args[1] for call in onednn.call_args_list]
    assert weights and all(weight.is_mkldnn for weight in weights)  # those that `frozen` packed


def test_a_copy_would_keep_the_original_s_weights(onednn: Mock) -> None:
    model = model_of("bert")
    with fast_linear(model), pytest.raises(ValueError, match="within fastdistill.fast_linear"):
        first_layers(model, 1)


def test_what_stays_as_it_is(onednn: Mock) -> None:
    """Compiled models, layers with hooks and those of a class of their own."""

    class Own(nn.Linear):
        pass

    watched, compiled = nn.Linear(4, 4), torch.compile(nn.Sequential(nn.Linear(4, 4)))
    watched.register_forward_hook(lambda *_: None)
    model = nn.Sequential(watched, Own(4, 4))
    with fast_linear(model, compiled):  # type: ignore[arg-type]
        model(torch.randn(64, 4))
    assert not onednn.called
