from __future__ import annotations

import copy
from typing import Any
from unittest.mock import Mock

import torch
from torch import nn

from fastdistill.models.fast_linear import fast_linear
from fastdistill.models.first_token import first_token_only
from fastdistill.models.frozen import frozen
from fastdistill.models.fused_residuals import fused_residuals
from fastdistill.models.hooks import forward_changed
from tests.models.known import batch_of, model_of


@torch.no_grad()
def test_a_copy_computes_with_its_own_weights(onednn: Mock) -> None:
    """As of an average of a model's weights, which a callback keeps."""
    model, batch = model_of("bert").eval(), batch_of("bert")
    with fast_linear(model), fused_residuals(model), first_token_only(model), frozen(model):
        own: Any = copy.deepcopy(model)
        for weight in own.parameters():
            weight.mul_(1.5)
        found = own(**batch).logits
    fresh = model_of("bert").eval()
    fresh.load_state_dict(own.state_dict())
    torch.testing.assert_close(found, fresh(**batch).logits)
    assert not torch.allclose(found, model(**batch).logits)


def test_a_copy_keeps_what_was_there_before() -> None:
    module, seen = nn.Linear(2, 2), []
    plain = module.forward
    module.forward = lambda x: seen.append(len(x)) or plain(x)  # type: ignore[func-returns-value, method-assign]
    with forward_changed(module, lambda forward, x: forward(x) + 1), forward_changed(module, lambda forward, x: x):
        other = copy.deepcopy(module)
    x = torch.ones(3, 2)
    torch.testing.assert_close(other(x), plain(x))
    assert seen == [3]
