from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertForTokenClassification

from fastdistill import CKD, PKD, DeKD, LogitsKD, WeightedSum, first_token_only
from fastdistill.models.architectures import architecture, encoder_layers
from fastdistill.objectives.base import as_objective
from tests import tiny
from tests.encoders import CONFIGS, classifier, inputs


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_and_gradients_are_the_same(kind: str) -> None:
    model, batch = classifier(kind).double(), inputs(kind, 3)
    if kind == "vit":
        batch = {"pixel_values": batch["pixel_values"].double()}
    else:
        batch["attention_mask"] = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 8 + [0]])
    seen: list[Any] = []
    watched = encoder_layers(model)[-1].get_submodule(architecture(model).neuron_out)
    handle = watched.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))

    def run() -> tuple[torch.Tensor, list[Any]]:
        logits = model(**batch).logits
        return logits, [p.grad for p in _backward(model, logits)]

    expected, gradients = run()
    with first_token_only(model, None):
        logits, found = run()
    again, _ = run()
    handle.remove()
    assert seen == [seen[0], 1, seen[0]] and seen[0] > 1
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(again, expected, rtol=0, atol=0)
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def _backward(model: Any, logits: torch.Tensor) -> list[Any]:
    model.zero_grad()
    logits.square().sum().backward()
    for parameter in model.parameters():
        parameter.grad = None if parameter.grad is None else parameter.grad.clone()
    return [p for p in model.parameters() if p.grad is not None]


def test_other_models_stay_as_they_are() -> None:
    model = BertForTokenClassification(tiny.bert().config).eval()
    batch = inputs("bert")
    with torch.no_grad(), first_token_only(model):
        assert model(**batch).logits.shape == (2, 9, 2)
        assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("kind, wrapped", [("bert", True), ("vit", False)])
def test_compiled_models(kind: str, wrapped: bool) -> None:
    """They were compiled without it, and are without it again."""
    torch.compiler.reset()
    inner, batch = classifier(kind, num_hidden_layers=2), inputs(kind)
    seen: list[int] = []
    watched = encoder_layers(inner)[-1].get_submodule(architecture(inner).neuron_out)
    watched.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    model: Any = torch.compile(inner, backend="eager") if wrapped else inner
    if not wrapped:
        inner.compile(backend="eager")
    with torch.no_grad():
        expected = model(**batch).logits
        with first_token_only(model):
            torch.testing.assert_close(model(**batch).logits, expected)
        torch.testing.assert_close(model(**batch).logits, expected)
    assert seen == [seen[0], 1, seen[0]] and seen[0] > 1


def test_which_objectives_look_at_other_tokens() -> None:
    assert not LogitsKD().needs.all_tokens
    assert not PKD().needs.all_tokens
    assert not DeKD().needs.all_tokens
    assert CKD().needs.all_tokens
    assert WeightedSum({"kd": (1.0, LogitsKD()), "ckd": (1.0, CKD())}).needs.all_tokens
    assert as_objective(lambda student, teacher, labels: student.loss).needs.all_tokens
