from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastdistill
from fastdistill.models.architectures import blocks
from fastdistill.models.scores import Scores, random_scores
from tests import tiny
from tests.encoders import CONFIGS, classifier, inputs

# a layer of each kind: whole, a part, no heads, no neurons
HEADS = [torch.tensor(layer) for layer in ([1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0])]
NEURONS = [torch.ones(32), torch.arange(32) % 3.0, torch.ones(32), torch.zeros(32)]


def masks() -> Scores:
    """Zero for what is to go."""
    return Scores(HEADS, [(layer > 0).float() for layer in NEURONS])


def cut(model: Any, scores: Scores) -> Any:
    """Removes exactly what has score 0: ranks of heads and of neurons are shares of their own."""

    class Exact(Scores):
        def kept(self, sparsity: float, round_to: int = 1) -> Any:
            return tuple([layer.nonzero().squeeze(1) for layer in units] for units in (self.heads, self.neurons))

    return fastdistill.prune(model, Exact(scores.heads, scores.neurons), 0.0)


def with_masks(model: Any, scores: Scores, batch: Any) -> torch.Tensor:
    with torch.no_grad(), fastdistill.gate(model) as gates:
        gates.heads[:], gates.neurons[:] = scores.heads, scores.neurons
        return model(**batch).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", CONFIGS)
def test_pruning_is_masking(kind: str, tmp_path: Path) -> None:
    model, batch, scores = classifier(kind), inputs(kind, 3), masks()
    if kind != "vit":
        batch["attention_mask"] = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 8 + [0]])
    smaller = cut(model, scores)
    assert smaller.num_parameters() < model.num_parameters()
    assert [(block.heads, block.neurons) for block in blocks(smaller)] == [(2, 32), (1, 21), (0, 32), (2, 0)]
    expected = with_masks(model, scores, batch)
    with torch.no_grad():
        torch.testing.assert_close(smaller(**batch).logits, expected)
        smaller.save_pretrained(tmp_path)
        loaded = fastdistill.from_pretrained(tmp_path)
        assert torch.equal(loaded(**batch).logits, smaller(**batch).logits)
    assert loaded.state_dict().keys() == smaller.state_dict().keys()
    # twice pruned
    again = Scores(
        [torch.tensor(x) for x in ([1.0, 0.0], [1.0], [], [0.0, 1.0])], [torch.ones(b.neurons) for b in blocks(smaller)]
    )
    twice = cut(loaded, again)
    both = Scores([torch.tensor(x) for x in ([1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0])], scores.neurons)
    with torch.no_grad():
        torch.testing.assert_close(twice(**batch).logits, with_masks(model, both, batch))
        twice.save_pretrained(tmp_path / "twice")
        found = fastdistill.from_pretrained(tmp_path / "twice")(**batch).logits
        assert torch.equal(found, twice(**batch).logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "fastdistill"])
def test_a_pruned_model_trains(implementation: str) -> None:
    model = classifier("bert").requires_grad_(False)
    model.set_attn_implementation(implementation)
    smaller = cut(model, masks())
    optimizer = torch.optim.AdamW(smaller.parameters(), lr=1e-2)
    batch = {**inputs("bert", 8), "labels": torch.arange(8) % 3}
    losses = []
    for _ in range(30):
        loss = smaller(**batch).loss
        loss.backward()
        assert all(p.grad is not None for p in smaller.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("sparsity", [0.0, 0.4, 1.0])
def test_sparsity_is_the_share_that_goes(sparsity: float) -> None:
    model = classifier("bert")
    smaller = fastdistill.prune(model, random_scores(model, torch.Generator().manual_seed(0)), sparsity)
    layers = blocks(smaller)
    assert sum(block.heads for block in layers) == 8 - round(8 * sparsity)
    assert sum(block.neurons for block in layers) == 128 - round(128 * sparsity)
    assert smaller(**inputs("bert")).logits.isfinite().all()
    rounded = fastdistill.prune(model, random_scores(model, torch.Generator().manual_seed(0)), sparsity, round_to=8)
    assert {block.neurons % 8 for block in blocks(rounded)} == {0}


def test_layers_of_a_pruned_model_make_a_student(tmp_path: Path) -> None:
    student = fastdistill.first_layers(cut(classifier("bert"), masks()), 2, layers=[1, 2])
    student.save_pretrained(tmp_path)
    batch = inputs("bert")
    assert torch.equal(fastdistill.from_pretrained(tmp_path)(**batch).logits, student.eval()(**batch).logits)


def test_models_that_are_not_pruned_load_too(tmp_path: Path) -> None:
    model, batch = classifier("roberta"), inputs("roberta")
    model.save_pretrained(tmp_path)
    loaded = fastdistill.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
    assert loaded.config._attn_implementation == "eager"


def test_attention_of_a_pruned_model_can_be_chosen(tmp_path: Path) -> None:
    cut(classifier("bert"), masks()).save_pretrained(tmp_path)
    loaded = fastdistill.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.config._attn_implementation == "eager"


def test_sharded_and_half_precision_weights(tmp_path: Path) -> None:
    smaller, batch = cut(classifier("bert"), masks()).to(torch.bfloat16), inputs("bert")
    smaller.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = fastdistill.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded(**batch).logits, smaller(**batch).logits)


def damage_config(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["fastdistill_pruned"], config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda pruned, config: pruned["heads"].pop(), "expected heads and neurons of 4 layers"),
        (lambda pruned, config: config.update(fastdistill_pruned="all"), "expected heads and neurons of 4 layers"),
        (lambda pruned, config: pruned["heads"].__setitem__(0, [1, 0]), r"has the heads \[1, 0\] at 0"),
        (lambda pruned, config: pruned["heads"].__setitem__(0, [2]), r"has the heads \[2\] at 0"),
        (lambda pruned, config: pruned["neurons"].__setitem__(1, 99), "has 99 neurons at 1; expected from 0 to 32"),
        (lambda pruned, config: pruned["neurons"].__setitem__(1, 20), "do not go together"),
        (lambda pruned, config: pruned["heads"].__setitem__(2, [0]), "do not go together"),
        (lambda pruned, config: config.update(architectures=["Trainer"]), "names no model .*'Trainer'"),
        (lambda pruned, config: config.update(architectures=None), "names no model"),
    ],
)
def test_inconsistent_folders(tmp_path: Path, change: Any, message: str) -> None:
    cut(classifier("bert"), masks()).save_pretrained(tmp_path)
    damage_config(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        fastdistill.from_pretrained(tmp_path)


def test_damaged_weights(tmp_path: Path) -> None:
    cut(classifier("bert"), masks()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        fastdistill.from_pretrained(tmp_path)
    file.write_bytes(whole)
    weights = load_file(file)
    weights.pop("classifier.bias")
    save_file(weights, file)
    with pytest.raises(ValueError, match="do not go together: missing keys classifier.bias"):
        fastdistill.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(OSError):
        fastdistill.from_pretrained(tmp_path)


@pytest.mark.parametrize("pruned", [False, True])
def test_folders_that_do_not_fit_together(tmp_path: Path, pruned: bool) -> None:
    (cut(classifier("bert"), masks()) if pruned else classifier("bert")).save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    weights, text = load_file(file), config.read_text()
    weights.pop("classifier.weight")
    save_file(weights, file)
    with pytest.raises(ValueError, match="do not go together: missing keys classifier.weight"):
        fastdistill.from_pretrained(tmp_path)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        fastdistill.from_pretrained(tmp_path)
    config.write_text(text[:50])
    with pytest.raises(ValueError, match="is damaged"):
        fastdistill.from_pretrained(tmp_path)


def test_a_config_that_lost_what_was_pruned(tmp_path: Path) -> None:
    cut(classifier("bert"), masks()).save_pretrained(tmp_path)
    damage_config(tmp_path, lambda pruned, config: config.pop("fastdistill_pruned"))
    with pytest.raises(ValueError, match="'intermediate_size' is a per-layer attribute"):
        fastdistill.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["per_layer_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="do not go together"):
        fastdistill.from_pretrained(tmp_path)


def test_scores_of_another_model() -> None:
    scores = random_scores(tiny.bert(layers=3), torch.Generator())
    with pytest.raises(ValueError, match="expected the model's"):
        fastdistill.prune(tiny.bert(layers=3, intermediate_size=16), scores, 0.5)
    with pytest.raises(ValueError, match="expected the model's"):
        fastdistill.prune(tiny.bert(layers=2), scores, 0.5)


@pytest.mark.slow
def test_onnx_export(tmp_path: Path) -> None:
    import onnxruntime

    smaller, batch = cut(classifier("bert"), masks()), inputs("bert", 3)
    batch["attention_mask"] = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 8 + [0]])
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    torch.onnx.export(
        smaller, (), tmp_path / "model.onnx", kwargs=batch, dynamic_shapes=dict.fromkeys(batch, shape), verbose=False
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for tokens in (9, 5):
        some = {name: tensor[:2, :tokens] for name, tensor in batch.items()}
        (logits,) = session.run(None, {name: tensor.numpy() for name, tensor in some.items()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), smaller(**some).logits, rtol=1e-4, atol=1e-4)
