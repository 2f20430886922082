from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdistill
from fastdistill.models.architectures import blocks
from fastdistill.models.scores import random_scores
from tests.encoders import CONFIGS, classifier, inputs

FASTDISTILL = sorted(CONFIGS.keys() - {"mpnet"})  # MPNet has one attention of its own


def masked(model: Any, heads: list[Tensor], neurons: list[Tensor]) -> Any:
    """A copy of the model in which the output projections' columns are multiplied by the gates."""
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for block, head_gate, neuron_gate in zip(blocks(twin), heads, neurons, strict=True):
            block.head_out.weight.mul_(head_gate.repeat_interleave(block.head_size))
            block.neuron_out.weight.mul_(neuron_gate)
    return twin


def drawn(gates: Any) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(3)
    return [torch.randn(len(g)) for g in gates.heads], [torch.randn(len(g)) for g in gates.neurons]


@pytest.mark.parametrize("kind", CONFIGS)
def test_gates_multiply_heads_and_neurons(kind: str) -> None:
    model, batch = classifier(kind), inputs(kind)
    with torch.no_grad(), fastdistill.gate(model) as gates:
        heads, neurons = drawn(gates)
        torch.testing.assert_close(
            model(**batch).logits,
            masked(model, *map(list, (map(torch.ones_like, heads), map(torch.ones_like, neurons))))(**batch).logits,
        )
        gates.heads[:], gates.neurons[:] = heads, neurons
        found = model(**batch).logits
    torch.testing.assert_close(found, masked(model, heads, neurons)(**batch).logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "fastdistill"])
@pytest.mark.parametrize("kind", FASTDISTILL)
def test_gates_work_with_every_attention(kind: str, implementation: str) -> None:
    model, batch = classifier(kind), inputs(kind)
    model.set_attn_implementation(implementation)
    with fastdistill.gate(model) as gates:
        heads, neurons = drawn(gates)
        gates.heads[:], gates.neurons[:] = ([g.requires_grad_() for g in group] for group in (heads, neurons))
        logits = model(**batch).logits
        torch.testing.assert_close(logits, masked(model, heads, neurons)(**batch).logits)
        for gradient in torch.autograd.grad(logits.square().sum(), gates.tensors):
            assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_mpnets_own_attention_is_gated_whatever_it_is_called() -> None:
    model, batch = classifier("mpnet"), inputs("mpnet")
    model.config._attn_implementation = "fastdistill"
    with torch.no_grad(), fastdistill.gate(model) as gates:
        gates.heads[:], gates.neurons[:] = heads, neurons = drawn(gates)
        torch.testing.assert_close(model(**batch).logits, masked(model, heads, neurons)(**batch).logits)


@pytest.mark.parametrize("first, then", itertools.permutations(["eager", "sdpa", "fastdistill"], 2))
def test_attention_may_change_meanwhile(first: str, then: str) -> None:
    model, batch = classifier("bert"), inputs("bert")
    model.set_attn_implementation(first)
    with torch.no_grad(), fastdistill.gate(model) as gates:
        gates.heads, gates.neurons = heads, neurons = drawn(gates)
        expected = masked(model, heads, neurons)(**batch).logits
        for implementation in (first, then, first):
            model.set_attn_implementation(implementation)
            torch.testing.assert_close(model(**batch).logits, expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "fastdistill"])
def test_gates_of_another_dtype(implementation: str) -> None:
    """What they multiply keeps its dtype."""
    model, batch = classifier("bert").bfloat16(), inputs("bert")
    model.set_attn_implementation(implementation)
    with fastdistill.gate(model) as gates:
        heads, neurons = drawn(gates)
        gates.heads[:], gates.neurons[:] = ([g.requires_grad_() for g in group] for group in (heads, neurons))
        logits = model(**batch).logits
        found = torch.autograd.grad(logits.float().square().sum(), gates.tensors)
    assert logits.dtype == torch.bfloat16 and all(gradient.dtype == torch.float32 for gradient in found)
    torch.testing.assert_close(
        logits.float(), masked(model.float(), heads, neurons)(**batch).logits, rtol=0.1, atol=0.1
    )


@pytest.mark.parametrize("implementation", ["sdpa", "fastdistill"])
def test_gates_of_single_examples(implementation: str) -> None:
    model, batch = classifier("bert"), inputs("bert", 3)
    model.set_attn_implementation(implementation)
    with fastdistill.gate(model) as gates:
        gates.per_example(3)
        logits = model(**batch).logits
        found = torch.autograd.grad(logits.square().sum(), gates.tensors)
        for example in range(3):
            gates.per_example(1)
            one = model(input_ids=batch["input_ids"][example : example + 1]).logits
            for all_of_them, alone in zip(found, torch.autograd.grad(one.square().sum(), gates.tensors), strict=True):
                torch.testing.assert_close(all_of_them[example], alone[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "fastdistill"])
def test_nothing_is_left_behind_after_an_exception(implementation: str) -> None:
    model, batch = classifier("bert"), inputs("bert")
    model.set_attn_implementation(implementation)
    before = [dict(module.__dict__) for module in model.modules()]
    with torch.no_grad():
        expected = model(**batch).logits
        with pytest.raises(KeyboardInterrupt), fastdistill.gate(model) as gates:
            gates.heads[0] = torch.zeros(2)
            assert not torch.equal(model(**batch).logits, expected)
            raise KeyboardInterrupt
        assert torch.equal(model(**batch).logits, expected)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert [module.__dict__.keys() for module in model.modules()] == [names.keys() for names in before]


def test_a_forward_of_a_modules_own_comes_back() -> None:
    model, batch = classifier("bert"), inputs("bert")
    linear = blocks(model)[0].head_out
    linear.forward = own = lambda x: type(linear).forward(linear, 2 * x)
    with torch.no_grad():
        expected = model(**batch).logits
        with fastdistill.gate(model):
            torch.testing.assert_close(model(**batch).logits, expected)
    assert linear.forward is own


def outside(model: Any, backend: str) -> Any:
    return torch.compile(model, backend=backend, fullgraph=True)


def inside(model: Any, backend: str) -> Any:
    model.compile(backend=backend, fullgraph=True)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("implementation, compiled", [("sdpa", outside), ("fastdistill", inside)])
def test_compiled_models(implementation: str, compiled: Any, backend: str = "eager", layers: int = 2) -> None:
    """Gates come, change, go and come back though the model was compiled without them."""
    torch.compiler.reset()
    (model, plain), batch = (classifier("bert", num_hidden_layers=layers) for _ in range(2)), inputs("bert")
    model.set_attn_implementation(implementation)
    model = compiled(model, backend)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
            with fastdistill.gate(model) as gates:
                heads, neurons = drawn(gates)
                for gates.heads in (heads, [1 - g for g in heads]):
                    gates.neurons = neurons
                    found = model(**batch).logits
                    torch.testing.assert_close(found, masked(plain, gates.heads, neurons)(**batch).logits)
                other = "sdpa" if implementation == "fastdistill" else "fastdistill"
                model.set_attn_implementation(other)
                torch.testing.assert_close(model(**batch).logits, found)
                model.set_attn_implementation(implementation)
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)


@pytest.mark.slow
def test_a_model_compiled_by_inductor() -> None:
    test_compiled_models("fastdistill", outside, "inductor", layers=1)


@pytest.mark.parametrize("compiled", [outside, inside])
def test_an_exception_leaves_a_compiled_model_as_it_was(compiled: Any) -> None:
    model = compiled(classifier("bert"), "eager")
    for within in (fastdistill.gate, fastdistill.first_token_only):
        with pytest.raises(KeyboardInterrupt), within(model):
            with pytest.raises(ValueError, match="already"):
                within(model).__enter__()
            raise KeyboardInterrupt
    for module in model.modules():
        assert not {"_fastdistill_hooked", "_fastdistill_head_gate"} & vars(module).keys()


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [outside, inside])
def test_scores_of_a_compiled_model(compiled: Any) -> None:
    torch.compiler.reset()
    batches = [{**inputs("bert"), "labels": torch.tensor([0, 2])}] * 2
    model = classifier("bert", num_hidden_layers=2)
    expected = fastdistill.score(model, batches, progress=False).expressiveness
    model = compiled(model, "eager")
    model(**batches[0])
    found = fastdistill.score(model, batches, progress=False).expressiveness
    torch.testing.assert_close(found.heads + found.neurons, expected.heads + expected.neurons)


def test_heads_that_are_off_are_not_computed() -> None:
    model, batch = classifier("bert"), inputs("bert")
    model.set_attn_implementation("fastdistill")
    with torch.no_grad(), fastdistill.gate(model) as gates:
        gates.heads[0] = torch.tensor([0.0, 1.0])
        expected = model(**batch).logits
        model.bert.encoder.layer[0].attention.self.value.weight[:8] = torch.nan  # of the head that is off
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("implementation", ["sdpa", "fastdistill"])
@pytest.mark.parametrize("units, size", [("heads", 2), ("neurons", 32)])
def test_gates_of_another_shape(units: str, size: int, implementation: str) -> None:
    model, batch = classifier("bert"), inputs("bert", 3)
    model.set_attn_implementation(implementation)
    for shape in ((size + 1,), (2, size), (3, 1, size)):
        with fastdistill.gate(model) as gates:
            getattr(gates, units)[1] = torch.ones(shape)
            with pytest.raises(ValueError, match=r"gate.* has shape .*; expected"):
                model(**batch)


def test_a_gated_model_is_neither_copied_nor_gated_again() -> None:
    model = classifier("bert")
    scores = random_scores(model, torch.Generator())
    with fastdistill.gate(model):
        for copied in (
            lambda: fastdistill.prune(model, scores, 0.5),
            lambda: fastdistill.first_layers(model, 1),
            lambda: fastdistill.gate(model).__enter__(),
        ):
            with pytest.raises(ValueError, match="model is within fastdistill.gate"):
                copied()
    fastdistill.prune(model, scores, 0.5)
    assert "_fastdistill_hooked" not in vars(model)


def test_unknown_architectures() -> None:
    with pytest.raises(ValueError, match="model is a Linear; its layers are known for albert, bert"):
        fastdistill.gate(nn.Linear(1, 1)).__enter__()  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_attention_is_registered_before_transformers_is_imported() -> None:
    program = "\n".join(
        [
            "import fastdistill.models",
            "from transformers import BertConfig, AutoModel",
            "config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=2)",
            "model = AutoModel.from_config(config, attn_implementation='fastdistill')",
            "assert model.config._attn_implementation == 'fastdistill'",
        ]
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("kind", FASTDISTILL)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_that_of_sdpa(kind: str, masked: bool) -> None:
    batch = inputs(kind, 3)
    if kind == "vit":
        batch = {"pixel_values": batch["pixel_values"].double()}
    elif masked:
        batch["attention_mask"] = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 8 + [0]])
    logits = []
    for implementation in ("sdpa", "fastdistill"):
        model = classifier(kind).double()
        model.set_attn_implementation(implementation)
        logits.append(model(**batch).logits)
    torch.testing.assert_close(*logits)


def test_attention_weights_cannot_be_had() -> None:
    model = classifier("bert")
    model.set_attn_implementation("fastdistill")
    with pytest.raises(ValueError, match="output_attentions"):
        model(**inputs("bert"), output_attentions=True)
