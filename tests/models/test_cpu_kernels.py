from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fastdistill import cpu_kernels, first_token_only
from fastdistill.models import attention, fast_linear, fused_residuals
from fastdistill.models.hooks import hooks_of
from fastdistill.ops.library import has_kernel
from fastdistill.ops.linear import by_onednn
from fastdistill.ops.native import NATIVE
from tests.accuracy import assert_accurate
from tests.models.known import batch_of, model_of

SHAPE = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 2}


def run(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Logits and gradients."""
    model.zero_grad()
    logits = model(**batch).logits
    logits.square().sum().backward()
    return [logits.detach(), *(weight.grad for weight in model.parameters() if weight.grad is not None)]


def asked(model: Any, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[int]]:
    """And how often each kernel was asked."""
    places = (attention, "gated_attention"), (fused_residuals, "dropout_add_layer_norm"), (fast_linear, "linear")
    patches = [patch.object(where, name, wraps=getattr(where, name)) for where, name in places]
    spies = [each.start() for each in patches]
    try:
        return run(model, batch), [spy.call_count for spy in spies]
    finally:
        for each in patches:
            each.stop()


def test_models_compute_the_same_by_kernels() -> None:
    model, batch = model_of("bert", **SHAPE).train(), batch_of("bert")
    exact = run(copy.deepcopy(model).double(), batch)
    plain = run(copy.deepcopy(model), batch)
    with cpu_kernels(model, None):
        found, calls = asked(model, batch)
    short = NATIVE.cpu is not None and NATIVE.cpu.short_keys > 0
    fused = has_kernel("dropout_add_layer_norm", "CPU")
    assert calls == [2 * short, 4 * fused, 14 * by_onednn()]
    for ours, theirs, eager in zip(found, exact, plain, strict=True):
        assert_accurate(ours, theirs, eager)
    assert not hooks_of(model) and model.config._attn_implementation == "sdpa"
    assert asked(model, batch)[1] == [0, 0, 0]


def test_with_the_first_token_alone() -> None:
    model, batch = model_of("bert", **SHAPE).double(), batch_of("bert")
    expected = run(model, batch)
    with cpu_kernels(model), first_token_only(model):
        torch.testing.assert_close(run(model, batch), expected)


@pytest.mark.skipif(not has_kernel("dropout_add_layer_norm", "CPU"), reason="there are no kernels")
def test_a_model_within_it_already() -> None:
    model = model_of("bert", **SHAPE)
    with cpu_kernels(model), pytest.raises(ValueError, match="is within fastdistill"), cpu_kernels(model):
        pass
    assert not hooks_of(model)


def test_models_on_other_devices() -> None:
    """On a GPU's host, too, it costs nothing."""
    model = model_of("bert", **SHAPE).to("meta")
    with cpu_kernels(model):
        assert not any("forward" in vars(module) for module in model.modules())
        assert model.config._attn_implementation == "sdpa"
