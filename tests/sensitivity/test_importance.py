from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

import fastdistill
from fastdistill.models.architectures import blocks
from fastdistill.sensitivity.importance import importance
from tests import tiny


def by_hand(model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of tiny's BERT: two heads of 8."""
    heads, neurons = torch.zeros(2, 2).double(), torch.zeros(2, 32).double()
    for batch in batches:
        model.zero_grad()
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        F.cross_entropy(model(**inputs).logits, batch["labels"]).backward()
        for place, layer in enumerate(model.bert.encoder.layer):
            for head in range(2):
                w = layer.attention.output.dense.weight
                columns = slice(8 * head, 8 * head + 8)
                heads[place, head] += (w[:, columns] * w.grad[:, columns]).sum().abs().item() / len(batches)
            into, out = layer.intermediate.dense.weight, layer.output.dense.weight
            for neuron in range(32):
                total = (into[neuron] * into.grad[neuron]).sum() + (out[:, neuron] * out.grad[:, neuron]).sum()
                neurons[place, neuron] += total.abs().item() / len(batches)
    return list(heads), list(neurons)


def test_it_is_the_formula() -> None:
    model, batches = tiny.bert(layers=2).eval().double(), tiny.batches()
    found = importance(model, batches, progress=False)
    heads, neurons = by_hand(model, batches)
    for ours, theirs in zip([*found.heads, *found.neurons], [*heads, *neurons], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-7)
        assert ours.min() > 0


def test_of_heads_it_is_the_expressiveness_of_a_batch() -> None:
    """The output projection's weights of a head are its output, as far as the gradient is concerned."""
    model, batches = tiny.bert(layers=2).eval(), tiny.batches()
    found = importance(model, batches, progress=False)
    scored = fastdistill.score(model, batches, reduce="batch", progress=False).expressiveness
    for ours, theirs in zip(found.heads, scored.heads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(found.neurons, scored.neurons, strict=True):
        assert not torch.allclose(ours, theirs, rtol=1e-2)


def test_the_model_is_left_as_it_was_and_a_layer_without_neurons_has_none() -> None:
    model = tiny.bert(layers=2).train()
    neurons = [torch.zeros(32), torch.ones(32)]
    smaller = fastdistill.prune(model, fastdistill.Scores([torch.ones(2)] * 2, neurons), 0.5).train()
    found = importance(smaller, tiny.batches(), progress=False)
    assert [(len(h), len(n)) for h, n in zip(found.heads, found.neurons, strict=True)] == [
        (block.heads, block.neurons) for block in blocks(smaller)
    ]
    assert smaller.training and all(p.grad is None and p.requires_grad for p in smaller.parameters())


@pytest.mark.parametrize(
    "kind, config",
    [
        ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),  # of Conv1D
        ("Llama", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}),
        (
            "ModernBert",
            {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24},
        ),
    ],
)
def test_of_other_layouts_each_neuron_has_its_own_weights(kind: str, config: dict[str, int]) -> None:
    """A neuron whose weights are all 0 has no importance, and it alone has none."""
    torch.manual_seed(0)
    settings = getattr(transformers, f"{kind}Config")(vocab_size=65, num_labels=2, pad_token_id=0, **config)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(settings)
    block = blocks(model)[0]
    with torch.no_grad():
        out = block.neuron_out.weight
        (out if kind == "GPT2" else out.T)[5] = 0
        for module in block.neuron_in:
            rows = module.weight.T if kind == "GPT2" else module.weight
            rows.unflatten(0, (block.names.neuron_parts, -1))[:, 5] = 0
    found = importance(model, tiny.batches(), progress=False).neurons[0]
    assert (found == 0).nonzero().flatten().tolist() == [5]


def test_what_is_wrong_is_named() -> None:
    model = tiny.bert()
    with pytest.raises(TypeError, match="loader is 3"):
        importance(model, 3, progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no labelled example"):
        importance(model, [], progress=False)
    with pytest.raises(ValueError, match="without labels"):
        importance(model, [{"input_ids": torch.ones(1, 3).long()}], progress=False)
