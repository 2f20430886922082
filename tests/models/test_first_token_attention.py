from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdistill
from fastdistill import first_token_only
from fastdistill.models.architectures import ARCHITECTURES, blocks
from fastdistill.models.narrowing import without
from tests.accuracy import assert_accurate
from tests.models.known import IMAGES, NO_CLASSIFIER, batch_of, model_of

OWN = "markuplm", "megatron-bert", "mpnet", "rembert"
"""Their attention is eager, and can be asked for its weights."""
KINDS = [
    kind
    for kind, names in ARCHITECTURES.items()
    if names.alone and len(names.head_in) == 3 and not names.relative and kind not in NO_CLASSIFIER
]
MASKS = {
    "ragged": [[1] * 9, [1] * 4 + [0] * 5, [1] * 8 + [0]],
    "full": [[1] * 9] * 3,
    "left": [[1] * 9, [0] * 5 + [1] * 4, [0] + [1] * 8],
    "one token": [[1] + [0] * 8, [1] * 9, [1] * 2 + [0] * 7],
    "none": [[1] * 9, [0] * 9, [1] * 3 + [0] * 6],
}


@contextmanager
def keys_seen(model: Any) -> Iterator[list[Any]]:
    """What the last layer's key projection is given."""
    seen: list[Any] = []
    original, (_, key, _) = nn.functional.linear, blocks(model)[-1].head_in

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight is key.weight:
            seen.append(input.shape)
        return original(input, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", linear)
        yield seen


def compare(model: Any, batch: dict[str, Tensor], *, is_used: bool = True) -> None:
    expected = model(**batch).logits
    with first_token_only(model), keys_seen(model) as seen:
        found = model(**batch).logits
    assert (not seen) == is_used
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients(kind: str) -> None:
    model, batch = model_of(kind).double(), batch_of(kind)
    if kind in IMAGES:
        batch = {"pixel_values": batch["pixel_values"].double()}
    is_eager = kind == "layoutlm" and model.config._attn_implementation == "eager"  # in transformers 5.17
    compare(model, batch, is_used=kind not in OWN and not is_eager)

    def gradients() -> dict[str, Tensor | None]:
        model.zero_grad()
        model(**batch).logits.square().sum().backward()
        return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients()
    with first_token_only(model):
        found = gradients()
    for (
        name,
        gradient,
    ) in expected.items():  # the key's bias has one too, of about 0: DistributedDataParallel waits for it
        torch.testing.assert_close(found[name], gradient, msg=lambda said, name=name: f"{name}: {said}")


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "fastdistill"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, implementation: str) -> None:
    model = model_of("bert", attn_implementation=implementation).double()
    batch = {**batch_of("bert"), "attention_mask": torch.tensor(MASKS[mask])}
    if (mask, implementation) == ("none", "fastdistill"):
        batch["attention_mask"][1, 0] = 1  # gated_attention says NaN to a query without keys
    compare(model, batch)


@torch.no_grad()
def test_additive_mask() -> None:
    model, batch = model_of("bert").double(), batch_of("bert")
    mask = batch["attention_mask"][:, None, None].expand(-1, 1, 9, -1)
    added = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask == 0, torch.finfo(torch.float64).min)
    compare(model, {**batch, "attention_mask": added - torch.arange(9.0)})


@torch.no_grad()
def test_pruned_models() -> None:
    model = model_of("bert").double()
    heads, neurons = [torch.tensor([0, 2, 3]), torch.tensor([1])], [torch.arange(24), torch.arange(5)]
    compare(without(model, heads, neurons), batch_of("bert"))
    emptied = without(model, [torch.arange(4), torch.arange(0)], [torch.arange(24), torch.arange(0)])
    expected = emptied(**batch_of("bert")).logits
    with first_token_only(emptied):
        torch.testing.assert_close(emptied(**batch_of("bert")).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accuracy(dtype: torch.dtype) -> None:
    model, batch = model_of("bert"), batch_of("bert")
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(**batch).logits
        low = copy.deepcopy(model).to(dtype)
        eager = low(**batch).logits
        with first_token_only(low):
            assert_accurate(low(**batch).logits, exact, eager)


@torch.no_grad()
def test_autocast() -> None:
    model, batch = model_of("bert"), batch_of("bert")
    exact = copy.deepcopy(model).double()(**batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        eager = model(**batch).logits
        with first_token_only(model):
            assert_accurate(model(**batch).logits, exact, eager)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "distilbert", "vit"])
def test_dropout_is_on_probabilities(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some are dropped as in eager attention, which then has the same numbers."""
    names = ("attention_dropout",) if kind == "distilbert" else ("attention_probs_dropout_prob",)
    model = model_of(kind, attn_implementation="eager", **dict.fromkeys(names, 0.5)).double()
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch_of(kind).items()}
    batch.pop("attention_mask", None)  # whose form is another in eager attention
    seen = []

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        is_first = input.shape[-2:] == (4, input.shape[-1])  # [B, H, S] of ours
        keys = input.shape[-1] if is_first or input.dim() == 4 else 0
        if not training or not p or not keys:
            return input
        seen.append(p)
        return input * (torch.arange(keys) % 2 * 2)

    monkeypatch.setattr(nn.functional, "dropout", dropout)
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p != 0.5:
            module.p = 0.0
    model.train()
    expected = model(**batch).logits
    model.config._attn_implementation = "sdpa"
    last = blocks(model)[-1]
    for block in blocks(model)[:-1]:
        block.attention.config = copy.copy(model.config)
        block.attention.config._attn_implementation = "eager"
    with first_token_only(model), keys_seen(model) as keys:
        found = model(**batch).logits
    assert not keys and seen == [0.5] * 4 and last.attention.training
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_own_attention_where_more_is_asked() -> None:
    batch = batch_of("bert")
    compare(model_of("bert", attn_implementation="eager"), batch, is_used=False)
    model = model_of("bert", attn_implementation="fastdistill")
    with fastdistill.gate(model) as gates:
        gates.heads[-1] = torch.tensor([0.0, 1.0, 0.5, 2.0])
        compare(model, batch, is_used=False)
    compare(model, batch)
    handle = blocks(model)[-1].head_in[2].register_forward_hook(lambda module, args, output: output * 2)
    compare(model, batch, is_used=False)
    handle.remove()


@torch.no_grad()
def test_nan_is_told() -> None:
    model, batch = model_of("bert"), batch_of("bert")
    model.bert.embeddings.word_embeddings.weight[batch["input_ids"][1, 2]] = torch.nan
    with first_token_only(model):
        logits = model(**batch).logits
    assert logits[1].isnan().all()
