"""What a model computes within `fastdistill.gate`, and by what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdistill
from fastdistill.models import attention, gated_layers, gated_values
from fastdistill.models.architectures import ARCHITECTURES, blocks
from fastdistill.models.narrowing import channels
from fastdistill.ops import gate_rules
from tests.encoders import classifier, inputs
from tests.models.known import IMAGES, batch_of, logits_of, model_of
from tests.models.test_architectures import multiplied


def larger(kind: str) -> dict[str, Tensor]:
    """So many examples that it pays to gather weights. Gemma 2 in float64 makes NaN of padding."""
    own = {name: x for name, x in batch_of(kind).items() if (kind, name) != ("gemma2", "attention_mask")}
    return {name: torch.cat([x.double() if x.is_floating_point() else x] * 4) for name, x in own.items()}


def open_and_closed(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The first two of four heads, and five of 24 neurons, one of each by half."""
    layers = blocks(model)
    heads, neurons = [torch.ones(b.heads) for b in layers], [torch.zeros(b.neurons) for b in layers]
    for own in heads:
        own[0], own[2:] = 0.5, 0
    for own in neurons:
        own[3:8] = 1
        own[5] = 0.5
    return heads, neurons


def fill_closed(model: Any, with_heads: bool) -> None:
    """NaN for the weights of closed units."""
    for block in blocks(model):
        closed = torch.tensor([*range(3), *range(8, 24)])
        maps = [(m, closed, block.neurons, block.names.neuron_parts, True) for m in block.neuron_in]
        maps.append((block.neuron_out, closed, block.neurons, 1, False))
        if with_heads:
            own = torch.tensor([2, 3])
            groups = torch.tensor([1]) if block.groups == 2 else own
            for module, is_shared in block.head_rows():
                parts = 1 if is_shared else block.names.head_parts
                maps.append((module, groups if is_shared else own, block.groups if is_shared else 4, parts, True))
            maps.append((block.head_out, own, block.heads, 1, False))
        with torch.no_grad():
            for linear, units, number, parts, rows in maps:
                linear.weight.index_fill_(*channels(linear, units, number, parts, rows=rows), torch.nan)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_closed_units_are_in_no_product(kind: str) -> None:
    """In models whose attention gives no weights of all heads, as PyTorch's."""
    model, batch = model_of(kind).double(), larger(kind)
    if kind not in IMAGES:
        model.config.use_cache = False
    heads, neurons = open_and_closed(model)
    expected = logits_of(multiplied(model, heads, neurons), batch)
    fill_closed(model, with_heads=model.config._attn_implementation == "sdpa")
    with fastdistill.gate(model) as gates:
        gates.heads[:], gates.neurons[:] = heads, neurons
        found = logits_of(model, batch)
        if model.config._attn_implementation == "sdpa":
            gates.heads[0] = torch.zeros_like(heads[0])
            assert logits_of(model, batch).isfinite().all()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_gradients_of_each_examples_gates_are_those_of_multiplications(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = model_of(kind).double(), batch_of(kind)
    batch = {name: x.double() if x.is_floating_point() else x for name, x in batch.items() if name != "attention_mask"}
    found = []
    for kernels in (True, False):
        monkeypatch.setattr(gate_rules, "neurons_by_kernel", lambda h, kernels=kernels: kernels)
        with fastdistill.gate(model) as gates:
            gates.per_example(3)
            torch.manual_seed(5)
            gates.neurons[:] = [(1 + torch.randn_like(g) / 9).detach().requires_grad_() for g in gates.neurons]
            logits = model(**batch).logits
            found.append([logits.detach(), *torch.autograd.grad(logits.square().sum(), gates.tensors)])
    torch.testing.assert_close(*found)


def test_gradients_of_weights_under_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained so, a masked model takes the steps that it takes with multiplications."""
    found = []
    for leaving_out in (True, False):
        model, batch = classifier("bert").double(), inputs("bert", 8)
        if not leaving_out:
            monkeypatch.setattr(gate_rules, "worth_leaving_out", lambda *sizes: False)
        with fastdistill.gate(model) as gates:
            gates.heads[:] = [torch.tensor([0.0, 0.7])] * 4
            gates.neurons[:] = [torch.arange(32).gt(20).double()] * 4
            model(**batch, labels=torch.arange(8) % 3).loss.backward()
        found.append([weight.grad for weight in model.parameters()])
    torch.testing.assert_close(*found)


def test_gates_may_be_changed_in_place() -> None:
    model, batch = classifier("bert"), inputs("bert", 8)
    with torch.no_grad(), fastdistill.gate(model) as gates:
        gates.heads[:], gates.neurons[:] = [torch.ones(2)] * 4, [torch.ones(32)] * 4
        found = []
        for _ in range(2):
            found.append(model(**batch).logits)
            gates.heads[0][1], gates.neurons[0][3:] = 0, 0
        expected = multiplied(model, [*gates.heads], [*gates.neurons])
        torch.testing.assert_close(found[0], classifier("bert")(**batch).logits)
    torch.testing.assert_close(found[1], expected(**batch).logits)


def test_masks_of_single_examples() -> None:
    model, batch = classifier("bert"), inputs("bert", 3)
    heads, neurons = torch.tensor([[0.0, 1], [0, 0.5], [0, 0]]), torch.zeros(3, 32)
    neurons[0, :4], neurons[1, 2:7] = 1, 0.5
    with torch.no_grad(), fastdistill.gate(model) as gates:
        gates.heads[:], gates.neurons[:] = [heads] * 4, [neurons] * 4
        found = model(**batch).logits
    for row in range(3):
        one = multiplied(model, [heads[row]] * 4, [neurons[row]] * 4)
        torch.testing.assert_close(found[row : row + 1], one(batch["input_ids"][row : row + 1]).logits)


def test_eager_attention_gives_the_weights_of_all_heads() -> None:
    model, batch = classifier("bert"), inputs("bert", 8)
    model.set_attn_implementation("eager")
    with torch.no_grad(), fastdistill.gate(model) as gates:
        gates.heads[:] = [torch.tensor([0.0, 1.0])] * 4
        assert model(**batch, output_attentions=True).attentions[0].shape == (8, 2, 9, 9)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_cache_made_before_serves_within(kind: str) -> None:
    model, ids = model_of(kind, "AutoModelForCausalLM"), torch.randint(5, 60, (4, 9))
    with torch.no_grad():
        cache = model(ids[:, :8], use_cache=True).past_key_values
        with fastdistill.gate(model) as gates:
            gates.heads[:] = [torch.tensor([0.0, 0, 1, 1])] * 2
            assert model(ids[:, 8:], past_key_values=cache).logits.shape[:2] == (4, 1)
            found = model(ids, use_cache=True).logits
            torch.testing.assert_close(found, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("ends", [None, KeyboardInterrupt])
def test_attention_knows_its_heads_afterwards(ends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = classifier("bert"), inputs("bert", 8)
    before = [dict(vars(block.attention)) for block in blocks(model)]

    def interrupted(*args: Any) -> Tensor:
        raise KeyboardInterrupt

    if ends is not None:
        monkeypatch.setattr(gated_layers, "_with_rows", interrupted)
    with torch.no_grad(), fastdistill.gate(model) as gates:
        gates.heads[:] = [torch.tensor([0.0, 1.0])] * 4
        if ends is None:
            model(**batch)
        else:
            with pytest.raises(ends):
                model(**batch)
    assert [vars(block.attention) for block in blocks(model)] == before


# By which kernel


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """The gates that reach gated_attention, which is chosen here as it is on a GPU."""
    seen: list[Tensor | None] = []

    def watched(query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, *options: Any) -> Tensor:
        seen.append(gate)
        return fastdistill.gated_attention(query, key, value, gate, *options)

    monkeypatch.setattr(attention, "gated_attention", watched)
    monkeypatch.setattr(gate_rules, "HEADS_BY_KERNEL", ("cpu",))
    monkeypatch.setattr(gate_rules, "heads_by_kernel", lambda query: True)
    return seen


@pytest.mark.parametrize("kind", ["bert", "albert", "llama", "gpt2", "modernbert", "vit"])
def test_heads_gated_by_attention(kind: str, attended: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, found = model_of(kind), batch_of(kind), []
    for by_kernel in (True, False):
        if not by_kernel:
            monkeypatch.setattr(gate_rules, "HEADS_BY_KERNEL", ())
        with fastdistill.gate(model) as gates:
            gates.per_example(3)
            found.append(torch.autograd.grad(model(**batch).logits.square().sum(), gates.tensors))
        labels = torch.tensor([0, 1, 2])
        scores = fastdistill.score(model, [{**batch, "labels": labels}], progress=False).expressiveness
        found[-1] += (*scores.heads, *scores.neurons)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
    assert len(attended) == 4 and all(gate.shape == (3, 4) for gate in attended)
    assert model.config._attn_implementation == "sdpa"


def test_what_gated_attention_cannot_do_stays_with_pytorch(attended: list[Any]) -> None:
    model, batch = classifier("bert"), inputs("bert")
    bias = torch.randn(1, 2, 9, 9)
    expected = model(**batch, position_bias=bias).logits
    with fastdistill.gate(model):
        torch.testing.assert_close(model(**batch, position_bias=bias).logits, expected)
    assert not attended


def test_neurons_are_gated_by_their_activations_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    own = gated_values.bias_act_gate
    monkeypatch.setattr(gate_rules, "neurons_by_kernel", lambda h: True)
    monkeypatch.setattr(gated_values, "bias_act_gate", lambda h, b, g, name: seen.append(name) or own(h, b, g, name))
    model = classifier("bert")
    with fastdistill.gate(model):
        model(**inputs("bert"))
    fastdistill.score(model, [{**inputs("bert"), "labels": torch.tensor([0, 1])}], progress=False)
    assert seen == ["gelu"] * 8


@pytest.mark.parametrize(
    "module, name",
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), None),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.SiLU(), "silu"),
        (nn.Tanh(), None),
        (gated_layers.activations.ACT2FN["gelu"], "gelu"),
        (gated_layers.activations.ACT2FN["gelu_new"], "gelu_tanh"),
        (gated_layers.activations.ACT2FN["gelu_pytorch_tanh"], "gelu_tanh"),
        (gated_layers.activations.ACT2FN["silu"], "silu"),
        (gated_layers.activations.ACT2FN["quick_gelu"], None),
    ],
)
def test_activations_that_have_a_sweep(module: nn.Module, name: str | None) -> None:
    assert gated_layers._name(module) == name
    if name is not None:
        h = torch.randn(2, 3, 5, dtype=torch.float64)
        torch.testing.assert_close(gated_values.activated(h, torch.ones(5).double(), name), module(h))  # type: ignore[arg-type]


# Derivatives


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_a_gated_activation_may_be_differentiated_twice(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    h, gate = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 2, 5), shape))
    for name in ("gelu", "gelu_tanh", "silu"):
        run: Callable[..., Tensor] = lambda h, gate, name=name: gated_values.activated(h, gate, name)  # noqa: E731
        assert torch.autograd.gradcheck(run, (h, gate)) and torch.autograd.gradgradcheck(run, (h, gate))


def test_a_gated_model_may_be_differentiated_twice() -> None:
    model, batch = classifier("bert", num_hidden_layers=1).double(), inputs("bert")
    model.set_attn_implementation("eager")

    def losses(heads: Tensor, neurons: Tensor) -> Tensor:
        gates.heads[0], gates.neurons[0] = heads, neurons
        return model(**batch).logits.square().sum()  # type: ignore[no-any-return]

    with fastdistill.gate(model) as gates:
        given = tuple(g.detach().double().requires_grad_() for g in (gates.heads[0], gates.neurons[0][:]))
        assert torch.autograd.gradgradcheck(losses, given, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("units, size", [(4, 8), (24, 1)])
def test_sums_are_in_float32(dtype: torch.dtype, units: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(gated_values, "CACHED", 2 * 7 * units * size)  # two of five examples at a time
    values, up = (torch.randn(5, 7, units * size, dtype=dtype) for _ in range(2))
    gate = torch.ones(5, units, requires_grad=True)
    same = gated_values.noted(values.requires_grad_(), gate)
    assert torch.equal(same, values)
    found, passed = torch.autograd.grad(same, (gate, values), up)
    expected = (values.double() * up.double()).view(5, 7, units, size).sum((1, 3))
    torch.testing.assert_close(found, expected.float().detach(), rtol=1e-5, atol=1e-5)
    assert found.dtype == torch.float32 and torch.equal(passed, up)


def test_scores_under_autocast() -> None:
    """No further from the exact ones than twice those of gates multiplied in bfloat16."""
    model, batch = classifier("bert"), {**inputs("bert", 4), "labels": torch.tensor([0, 1, 2, 1])}

    def scored(model: Any) -> Tensor:
        found = fastdistill.score(model, [batch], progress=False).expressiveness
        return torch.cat([*found.heads, *found.neurons]).double()

    exact = scored(classifier("bert").double())
    with torch.autocast("cpu", torch.bfloat16):
        found = scored(model)
        with fastdistill.gate(model) as gates:
            gates.heads[:] = [torch.ones(4, 2, requires_grad=True) for _ in range(4)]
            gates.neurons[:] = [torch.ones(4, 32, requires_grad=True) for _ in range(4)]
            loss = model(**batch).loss * 4
            eager = torch.cat([g.abs().mean(0) for g in torch.autograd.grad(loss, gates.tensors)])
    assert (found - exact).norm() <= 2 * (eager.double() - exact).norm()
