from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastdistill
from fastdistill.models.architectures import architecture, blocks, encoder_layers
from fastdistill.models.scores import random_scores
from tests import tiny
from tests.encoders import CONFIGS, SHAPE, classifier, inputs

ALL = {"output_hidden_states": True}


def written_out(kind: str, model: Any, *, swap: bool = True) -> Any:
    """All layers twice, as a model of twice the layers with weights of its own; query and key swapped above."""
    deep = classifier(kind, num_hidden_layers=8)
    names = architecture(model)
    below = {name: value for name, value in model.state_dict().items() if f"{names.layers}." not in name}
    deep.load_state_dict(below, strict=False)
    query, key, _ = names.head_in
    for place, layer in enumerate(encoder_layers(deep)):
        weights = encoder_layers(model)[place % 4].state_dict()
        if swap and place >= 4:
            other = {query: key, key: query}
            weights = {
                f"{other.get(name.rpartition('.')[0], name.rpartition('.')[0])}.{name.rpartition('.')[2]}": value
                for name, value in weights.items()
            }
        layer.load_state_dict(weights)
    return deep


@pytest.mark.parametrize("kind", CONFIGS)
def test_layers_are_applied_again_with_query_and_key_swapped(kind: str) -> None:
    model, batch = classifier(kind, initializer_range=0.5), inputs(kind)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    ends = []
    for swap in (True, False):
        student, deep = fastdistill.shuffled_sharing(model, swap=swap), written_out(kind, model, swap=swap)
        found, expected = student(**batch, **ALL), deep(**batch, **ALL)
        torch.testing.assert_close(found.logits, expected.logits)
        assert len(found.hidden_states) == 9
        for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(ours, theirs)
        ends.append(found.hidden_states[5])
    assert (ends[0] - ends[1]).abs().max() > 1e-3
    assert type(student) is type(model)
    assert student.config.num_hidden_layers == 8
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize("kind", CONFIGS)
def test_parameters_are_those_of_n_layers(kind: str, tmp_path: Path) -> None:
    model, batch = classifier(kind), inputs(kind)
    student = fastdistill.shuffled_sharing(model)
    student.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "model.safetensors")) == len(model.state_dict())
    loaded = fastdistill.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    loaded.save_pretrained(tmp_path / "again")
    for other in (student, loaded, copy.deepcopy(loaded), fastdistill.from_pretrained(tmp_path / "again")):
        assert other.num_parameters() == model.num_parameters()
        assert [m.layer_idx for m in encoder_layers(other).modules() if hasattr(m, "layer_idx")] in ([], [*range(8)])
        assert torch.equal(other.eval()(**batch).logits, student.eval()(**batch).logits)
    torch.testing.assert_close(loaded.state_dict(), student.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["bert", "mpnet", "vit"])
def test_gradients_are_the_sum_over_both_applications(kind: str) -> None:
    model, batch = classifier(kind), inputs(kind)
    student, deep = fastdistill.shuffled_sharing(model).eval(), written_out(kind, model)
    for each in (student, deep):
        each(**batch).logits.square().sum().backward()
    query, key, _ = (f"{name}.weight" for name in architecture(model).head_in)
    other = {query: key, key: query}
    for place in range(4):
        ours = dict(encoder_layers(student)[place].named_parameters())
        low, high = (dict(encoder_layers(deep)[at].named_parameters()) for at in (place, place + 4))
        for name in (query, key, f"{architecture(model).neuron_in[0]}.weight"):
            gradients = low[name].grad, high[other.get(name, name)].grad
            torch.testing.assert_close(ours[name].grad, gradients[0] + gradients[1], rtol=1e-4, atol=1e-5)  # type: ignore[operator]


def test_training_keeps_layers_tied(tmp_path: Path) -> None:
    model = classifier("bert")
    model.requires_grad_(False)
    student = fastdistill.shuffled_sharing(model)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    batch = {**inputs("bert", 8), "labels": torch.arange(8) % 3}
    losses = []
    for _ in range(40):
        loss = student(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert student.num_parameters() == model.num_parameters()
    above, below = student.bert.encoder.layer[5].attention.self, student.bert.encoder.layer[1].attention.self
    assert above.query.weight is below.key.weight
    student.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = fastdistill.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs("bert")).logits, student.eval()(**inputs("bert")).logits)


def test_the_top_layers_alone() -> None:
    assert len(blocks(fastdistill.shuffled_sharing(tiny.bert(layers=6)))) == 9
    model = tiny.bert(layers=6, dropout=0.0)
    found, batch = fastdistill.shuffled_sharing(model), inputs("bert")
    layers: Any = encoder_layers(found)
    for above, below in ((6, 3), (7, 4), (8, 5)):
        assert layers[above].output.dense.weight is layers[below].output.dense.weight
    assert torch.equal(found(**batch, **ALL).hidden_states[6], model(**batch, **ALL).hidden_states[6])
    assert len(blocks(fastdistill.shuffled_sharing(model, 6))) == 12
    assert len(blocks(fastdistill.shuffled_sharing(model, 1))) == 7
    assert len(blocks(fastdistill.shuffled_sharing(tiny.bert(layers=1)))) == 2


def test_each_application_has_its_own_gates() -> None:
    model, batch = classifier("bert"), inputs("bert")
    student, deep = fastdistill.shuffled_sharing(model).eval(), written_out("bert", model)
    found = []
    for each in (student, deep):
        with fastdistill.gate(each) as gates:
            assert len(gates.heads) == 8
            gates.heads[5], gates.neurons[2] = torch.tensor([0.0, 1.0]), torch.zeros(32)
            found.append(each(**batch).logits)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "vit"])
def test_the_first_token_alone(kind: str) -> None:
    student, batch = fastdistill.shuffled_sharing(classifier(kind)).eval(), inputs(kind)
    expected = student(**batch).logits
    with fastdistill.first_token_only(student):
        torch.testing.assert_close(student(**batch).logits, expected)


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_layers_of_a_pruned_model(kind: str, tmp_path: Path) -> None:
    model, batch = classifier(kind), inputs(kind)
    smaller = fastdistill.prune(model, random_scores(model, torch.Generator().manual_seed(0)), 0.6)
    student = fastdistill.shuffled_sharing(smaller, 3).eval()
    assert [block.heads for block in blocks(student)][4:] == [block.heads for block in blocks(smaller)][1:]
    assert student.num_parameters() == smaller.num_parameters()
    student.save_pretrained(tmp_path)
    assert torch.equal(fastdistill.from_pretrained(tmp_path)(**batch).logits, student(**batch).logits)
    config = json.loads((tmp_path / "config.json").read_text())
    config["fastdistill_pruned"]["neurons"][-1] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="layer 6 shares the weights of layer 3, which is of another shape"):
        fastdistill.from_pretrained(tmp_path)


def test_what_shared_layers_cannot_become() -> None:
    student = fastdistill.shuffled_sharing(tiny.bert())
    scores = random_scores(student, torch.Generator())
    changes: list[Callable[[], Any]] = [
        lambda: fastdistill.shuffled_sharing(student),
        lambda: fastdistill.first_layers(student, 1),
        lambda: fastdistill.prune(student, scores, 0.5),
    ]
    for change in changes:
        with pytest.raises(ValueError, match="model has shared layers .*; expected one without"):
            change()


def test_a_model_with_gates_is_refused() -> None:
    """The copy would keep them."""
    model = tiny.bert()
    with fastdistill.gate(model), pytest.raises(ValueError, match="model is within fastdistill.gate"):
        fastdistill.shuffled_sharing(model)


@pytest.mark.parametrize("layers", [0, 3, 1.0, True])
def test_layers_that_there_are_not(layers: Any) -> None:
    with pytest.raises(ValueError, match=r"layers is .*; expected from 1 to 2"):
        fastdistill.shuffled_sharing(tiny.bert(), layers)


def test_other_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="swap is 1; expected True or False"):
        fastdistill.shuffled_sharing(tiny.bert(), swap=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model is a Linear"):
        fastdistill.shuffled_sharing(nn.Linear(1, 1))  # type: ignore[type-var]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fastdistill_shared": "all"}, "is 'all'; expected layers, from 1 to 4, and swap"),
        ({"fastdistill_shared": {"layers": 5, "swap": True}}, "expected layers, from 1 to 4, and swap"),
        ({"fastdistill_shared": {"layers": 4, "swap": 1}}, "expected layers, from 1 to 4, and swap"),
        ({"fastdistill_shared": {"layers": 4}}, "expected layers, from 1 to 4, and swap"),
        ({"fastdistill_shared": {"layers": 3, "swap": True}}, "do not go together: missing keys"),
        ({"num_hidden_layers": 9}, "do not go together: missing keys"),
        ({"num_hidden_layers": 8, "intermediate_size": SHAPE["intermediate_size"] + 1}, "do not go together"),
    ],
)
def test_inconsistent_folders(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    fastdistill.shuffled_sharing(classifier("bert")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        fastdistill.from_pretrained(tmp_path)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    fastdistill.shuffled_sharing(classifier("bert")).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = "bert.encoder.layer.{}.output.dense.weight"
    save_file(weights | {name.format(5): weights[name.format(1)] + 1}, file)
    with pytest.raises(ValueError, match="do not go together: the last 4 layers have their own"):
        fastdistill.from_pretrained(tmp_path)
    del weights[name.format(1)]
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"do not go together: missing keys bert.encoder.layer.1.output.dense.weight"):
        fastdistill.from_pretrained(tmp_path)
