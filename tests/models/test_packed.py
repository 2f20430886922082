from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fastdistill
from fastdistill import compact_vocabulary, cpu_kernels, first_token_only
from fastdistill.models import packed
from fastdistill.models.architectures import blocks, encoder_layers
from fastdistill.models.fused_residuals import fused_residuals
from fastdistill.models.narrowing import without
from fastdistill.models.packed import PACKABLE, Packing, packed_attention, packed_forward
from tests.accuracy import assert_accurate
from tests.models.known import model_of

LAYERS = {"num_hidden_layers": 3}


def ragged(kind: str, lengths: tuple[int, ...] = (4, 9, 1, 4, 6, 2)) -> dict[str, Tensor]:
    """A batch whose padding holds tokens like any other, which must make no difference."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(5, 60, (len(lengths), 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    batch = {"input_ids": tokens, "attention_mask": mask}
    if kind in ("roberta", "camembert", "data2vec-text", "xlm-roberta", "xlm-roberta-xl"):
        return batch | {"input_ids": tokens * mask + (1 - mask)}  # positions are counted where there is no padding
    types = {} if kind in ("distilbert", "roberta-prelayernorm") else {"token_type_ids": tokens % 2}
    return batch | types


def seen_by(model: Any, batch: dict[str, Tensor], mask: Tensor | None = None) -> tuple[list[torch.Size], Tensor]:
    """The shapes of what each layer's second linear map is given, and the logits."""
    seen: list[torch.Size] = []
    original = torch.nn.functional.linear
    weights = {id(block.neuron_out.weight) for block in blocks(model)}

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if id(weight) in weights:
            seen.append(input.shape[:-1])
        return original(input, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", linear)
        return seen, packed_forward(model, batch, mask).logits


@torch.no_grad()
@pytest.mark.parametrize("kind", PACKABLE)
def test_logits(kind: str) -> None:
    model, batch = model_of(kind, **LAYERS).double(), ragged(kind)
    expected = model(**batch).logits
    seen, found = seen_by(model, batch)
    assert seen == [(1, 26), (1, 26), (6, 1)]
    is_rounded = kind == "layoutlm" and model.config._attn_implementation == "eager"  # in transformers 5.17, to float32
    rounded = {"rtol": 1e-6, "atol": 1e-6} if is_rounded else {}
    torch.testing.assert_close(found, expected, **rounded)
    with first_token_only(model):
        torch.testing.assert_close(packed_forward(model, batch).logits, expected, **rounded)
    assert not any("forward" in vars(module) for module in model.modules())
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "fastdistill"])
def test_attention_of_any_kind(implementation: str) -> None:
    model, batch = model_of("bert", attn_implementation=implementation, **LAYERS).double(), ragged("bert")
    expected = model(**batch).logits
    seen, found = seen_by(model, batch)
    assert seen[0] == (1, 26)
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_holes_and_one_length() -> None:
    model, batch = model_of("bert", **LAYERS).double(), ragged("bert")
    for mask in (torch.tensor([[1, 0, 1, 0, 1, 1, 0, 0, 1]] * 6), torch.tensor([[1] * 5 + [0] * 4] * 6)):
        asked = batch | {"attention_mask": mask}
        seen, found = seen_by(model, asked)
        assert seen[0] == (1, 30)
        torch.testing.assert_close(found, model(**asked).logits)


@torch.no_grad()
def test_pruned_models() -> None:
    model, batch = model_of("bert", **LAYERS).double(), ragged("bert")
    heads = [torch.tensor([0, 2, 3]), torch.arange(0), torch.tensor([1])]
    neurons = [torch.arange(5), torch.arange(24), torch.arange(0)]
    pruned = without(model, heads, neurons).eval()
    seen, found = seen_by(pruned, batch)
    assert seen[0] == (1, 26)
    torch.testing.assert_close(found, pruned(**batch).logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy(dtype: torch.dtype) -> None:
    model, batch = model_of("bert", **LAYERS), ragged("bert")
    exact = copy.deepcopy(model).double()(**batch).logits
    low = model.to(dtype)
    assert_accurate(packed_forward(low, batch).logits, exact, low(**batch).logits)
    with torch.autocast("cpu", torch.bfloat16):
        found, eager = packed_forward(low, batch).logits, low(**batch).logits
    assert_accurate(found, exact, eager)


def _left(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch | {"attention_mask": batch["attention_mask"].flip(1)}


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        _left,
        lambda batch: batch | {"attention_mask": torch.ones(6, 9)},
        lambda batch: batch | {"attention_mask": batch["attention_mask"] * (torch.arange(6) != 2)[:, None]},
        lambda batch: {name: value for name, value in batch.items() if name != "attention_mask"},
        lambda batch: batch | {"output_hidden_states": True},
    ],
    ids=["left", "full", "an example without tokens", "no mask", "hidden states"],
)
def test_batches_that_are_not_packed(change: Any) -> None:
    model, batch = model_of("bert", **LAYERS), change(ragged("bert"))
    seen, found = seen_by(model, batch)
    assert seen == [(6, 9)] * 3
    torch.testing.assert_close(found, model(**batch).logits, rtol=0, atol=0)


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


def gradients(model: Any, call: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and what each weight gets of a loss of them."""
    model.zero_grad()
    logits = call(batch).logits
    (logits * torch.arange(float(logits.numel())).view_as(logits).sin()).sum().backward()
    return logits, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("kind", PACKABLE)
def test_training(kind: str) -> None:
    model, batch = without_dropout(model_of(kind, **LAYERS).double().train()), ragged(kind)
    is_eager = model.config._attn_implementation == "eager"
    with first_token_only(model):
        expected = gradients(model, lambda batch: model(**batch), batch)
        assert seen_by(model, batch)[0] == ([(6, 9), (6, 9), (6, 1)] if is_eager else [(1, 26), (1, 26), (6, 1)])
        found = gradients(model, partial(packed_forward, model), batch)
    torch.testing.assert_close(found, expected)


def test_gradients_of_gradients() -> None:
    """Of eager attention, as of the model's own forward."""
    model, batch = without_dropout(model_of("bert", attn_implementation="eager", **LAYERS)).double(), ragged("bert")
    weight, found = model.bert.embeddings.word_embeddings.weight, []
    for call in (partial(packed_forward, model), lambda batch: model(**batch)):
        (slope,) = torch.autograd.grad(call(batch).logits.square().sum(), weight, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), weight))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy_of_gradients(dtype: torch.dtype) -> None:
    model, batch = without_dropout(model_of("bert", **LAYERS).train()), ragged("bert")
    high = copy.deepcopy(model).double()
    _, exact = gradients(high, lambda batch: high(**batch), batch)
    low = model.to(dtype)
    _, eager = gradients(low, lambda batch: low(**batch), batch)
    _, found = gradients(low, partial(packed_forward, low), batch)
    assert found.keys() == exact.keys()
    for name, grad in found.items():
        assert_accurate(grad, exact[name], eager[name])


@torch.no_grad()
@pytest.mark.parametrize("kind", PACKABLE)
def test_first_tokens_states(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of embeddings and layers; transformers' hooks, which stay, keep no later batch from being packed."""
    model, batch = model_of(kind, **LAYERS).double(), ragged(kind)
    times, own = [], packed.packed
    monkeypatch.setattr(packed, "packed", lambda *given: times.append(given) or own(*given))
    for rows in (slice(None), slice(1), slice(4, 5)):  # one example alone, of all of its tokens or with padding
        asked = {name: value[rows] for name, value in batch.items()} | {"output_hidden_states": True}
        expected = model(**asked).hidden_states
        found = packed_forward(model, asked, first_states=True).hidden_states
        assert len(found) == len(expected) == 4 and times
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.shape == (len(theirs), 1, 32)
            torch.testing.assert_close(ours, theirs[:, :1], rtol=1e-6, atol=1e-6)
        times.clear()
        assert packed_forward(model, asked).hidden_states[1].shape == expected[1].shape and not times
    assert seen_by(model, batch)[0][0] == (1, 26)


def test_gradients_of_first_tokens_states() -> None:
    model, batch = without_dropout(model_of("bert", **LAYERS).train()).double(), ragged("bert")
    found = []
    for call in (partial(packed_forward, model, first_states=True), lambda batch: model(**batch)):
        states = call(batch | {"output_hidden_states": True}).hidden_states
        loss = sum((layer[:, 0] * (1 + place)).sin().sum() for place, layer in enumerate(states))
        found.append(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout(rate: str) -> None:
    """Its numbers are drawn by PyTorch's seed, and the gradient is that of what was computed with them."""
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0, rate: 0.4}
    model, batch = model_of("bert", **LAYERS, **rates).double().train(), ragged("bert")

    def call(batch: dict[str, Tensor]) -> Any:
        torch.manual_seed(3)
        return packed_forward(model, batch)

    with fused_residuals(model):
        logits, slope = gradients(model, call, batch)
        torch.testing.assert_close(call(batch).logits, logits, rtol=0, atol=0)
        assert not torch.allclose(packed_forward(model, batch).logits, logits)
        generator = torch.Generator().manual_seed(1)
        along = {name: torch.randn(grad.shape, dtype=grad.dtype, generator=generator) for name, grad in slope.items()}
        expected = sum(float((slope[name] * way).sum()) for name, way in along.items())
        weights, h, found = dict(model.named_parameters()), 1e-6, []
        with torch.no_grad():
            for step in (h, -2 * h):
                for name, way in along.items():
                    weights[name] += step * way
                again = call(batch).logits
                found.append(float((again * torch.arange(float(again.numel())).view_as(again).sin()).sum()))
    assert (found[0] - found[1]) / (2 * h) == pytest.approx(expected, rel=1e-5)


def test_within_what_recipes_train_with() -> None:
    model, batch = without_dropout(model_of("bert", **LAYERS).train()), ragged("bert")
    exact = copy.deepcopy(model).double()
    with first_token_only(exact):
        _, expected = gradients(exact, lambda batch: exact(**batch), batch)
    with (
        compact_vocabulary(model, batch["input_ids"]),
        cpu_kernels(model),
        first_token_only(model),
    ):
        assert seen_by(model, batch)[0][0] == (1, 26)
        _, found = gradients(model, partial(packed_forward, model), batch)
        embeddings = next(name for name in found if "word_embeddings" in name)
        used = batch["input_ids"].unique().tolist()
        found[embeddings] = found[embeddings][[row for row, token in enumerate(sorted({0, *used})) if token in used]]
        expected[embeddings] = expected[embeddings][used]
        for name, grad in found.items():
            torch.testing.assert_close(grad, expected[name].float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "why", ["checkpointing", "func", "hook", "gate", "chunks", "config", "compiled", "mpnet", "tokens"]
)
def test_models_that_are_not_packed(why: str) -> None:
    head = "AutoModelForTokenClassification" if why == "tokens" else ""
    model, batch = model_of("mpnet" if why == "mpnet" else "bert", head, **LAYERS), ragged("mpnet")
    batch.pop("token_type_ids", None)
    batch["input_ids"] = batch["input_ids"] * batch["attention_mask"] + (1 - batch["attention_mask"])
    with torch.no_grad(), forward_ad.dual_level() if why == "func" else nullcontext():
        called: Any = model
        if why == "checkpointing":
            without_dropout(model).train().gradient_checkpointing_enable()
        if why == "hook":
            encoder_layers(model)[0].register_forward_hook(lambda module, args, output: output)
        if why == "chunks":
            model.config.chunk_size_feed_forward = 9
        if why == "config":
            model.config.output_hidden_states = True
        if why == "compiled":
            called = torch.compile(model, backend="eager")
        expected = model(**batch)
        if why == "gate":
            with fastdistill.gate(model) as gates:
                gates.heads[0] = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
                expected = model(**batch)
                found = packed_forward(model, batch)
        else:
            found = packed_forward(called, batch)
        if why == "config":
            assert [len(state) for state in found.hidden_states] == [6] * 4
            assert found.hidden_states[1].shape == (6, 9, 32)
        torch.testing.assert_close(found.logits, expected.logits)
        if why not in ("compiled", "gate"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(packed, "packed", None)  # is not called
                packed_forward(called, batch)


def test_an_attention_whose_dropout_is_not_known() -> None:
    model, batch = model_of("bert", **LAYERS).train(), ragged("bert")
    assert packed.can_pack(model, batch)
    blocks(model)[1].attention.dropout = torch.nn.Identity()
    assert not packed.can_pack(model, batch)
    assert packed.can_pack(model.eval(), batch)


def test_a_mask_on_a_device_is_not_read() -> None:
    assert not packed.worth_packing(torch.ones(4, 9, device="meta"))
    assert packed.worth_packing(ragged("bert")["attention_mask"])
    assert not packed.worth_packing(torch.ones(4, 9))


def test_packing() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 1]])
    packing = Packing.of(mask, torch.device("cpu"))
    assert packing.groups == ((2, 2), (1, 3))
    assert packing.starts.tolist() == [0, 2, 4, 7] and packing.starts.dtype == torch.int32
    states = torch.arange(9.0).view(3, 3, 1)
    assert packing.pack(states).flatten().tolist() == [0, 1, 6, 8, 3, 4, 5]
    torch.testing.assert_close(packing.unpack(packing.pack(states), mask.shape), states * mask[..., None])


class _OnCuda(Tensor):
    """Says that it is."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_flash_attention_of_varying_lengths(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of it on CUDA; in float32, which it does not take, PyTorch's attention."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    packing = Packing.of(ragged("bert")["attention_mask"], torch.device("cpu"))
    query, key, value = torch.randn(3, 26, 2, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = packed_attention(query, key, value, packing, 8**-0.5)
    asked: list[Any] = []

    def attention(query: Tensor, key: Tensor, value: Tensor, *where: Any) -> Tensor:
        asked.append(where)
        parts = []
        starts, _, longest, _ = where
        for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            assert end - start <= longest
            q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
            parts.append(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr(varlen, "varlen_attn", attention)
    given = [x.as_subclass(_OnCuda) for x in (query, key, value)]
    found = packed_attention(*given, packing, 8**-0.5).as_subclass(Tensor)
    exact = packed_attention(query.double(), key.double(), value.double(), packing, 8**-0.5)
    assert_accurate(found, exact, expected)
    assert len(asked) == (dtype != torch.float32)
    packed_attention(*given, packing, 1.0)  # it has no scale in all versions
    assert len(asked) == (dtype != torch.float32)
