"""Every architecture × {gate, score, prune = mask, reload, store, attn_implementation, training, students}."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

import fastdistill
from fastdistill.models.architectures import ARCHITECTURES, blocks, check_architecture, encoder_layers
from fastdistill.models.pruning import without
from tests import tiny

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {
    **SHAPE,
    "vocab_size": 60,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
    "pad_token_id": 1,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id"), 2),
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
OWN: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 8},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": False},
    "distilbert": {"hidden_dim": 24},
    "gpt2": {"n_inner": 24},
    "layoutlm": {"max_2d_position_embeddings": 16},
    "modernbert": {"layer_types": ["full_attention", "sliding_attention"], "local_attention": 4},
    "nomic_bert": {"head_dim": 8},
    "rembert": {"input_embedding_size": 8},
    "roc_bert": {
        "pronunciation_vocab_size": 60,
        "shape_vocab_size": 60,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "deit": {"architectures": ["DeiTForImageClassification"]},
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "granite", "smollm3", "starcoder2"), GROUPED),
    "eurobert": {**GROUPED, "num_key_value_heads": 4},
    "gemma2": {**GROUPED, "query_pre_attn_scalar": 8, "sliding_window": 4},
    "gemma3_text": {**GROUPED, "query_pre_attn_scalar": 8, "sliding_window": 4},
}
IMAGES = "deit", "vit"
DECODERS = (
    *("gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "qwen2", "qwen3"),
    *("smollm3", "starcoder2"),
)
NO_CLASSIFIER = "bert-generation", "granite"
"""transformers has no classifier of it: the others of its kind say what `DistillationTrainer` and `store` do."""


def model_of(kind: str, head: str = "", **changes: Any) -> Any:
    torch.manual_seed(0)
    settings = {**SHAPE, "image_size": 8, "patch_size": 4} if kind in IMAGES else TEXT
    config = transformers.CONFIG_MAPPING[kind](**settings | OWN.get(kind, {}) | {"num_labels": 3} | changes)
    if head or kind in NO_CLASSIFIER:
        auto = getattr(transformers, head or "AutoModelForCausalLM")
    else:
        auto = AutoModelForImageClassification if kind in IMAGES else AutoModelForSequenceClassification
    model = auto.from_config(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.1)
    return model


def batch_of(kind: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    if kind in IMAGES:
        return {"pixel_values": torch.rand(3, 3, 8, 8)}
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 8 + [0]])
    return {"input_ids": torch.randint(5, 60, (3, 9)) * mask + (1 - mask), "attention_mask": mask}


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Of tokens that are there."""
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits[batch["attention_mask"].bool()] if logits.dim() == 3 else logits


def with_gates(model: Any, heads: list[Tensor], neurons: list[Tensor], batch: dict[str, Tensor]) -> Tensor:
    with fastdistill.gate(model) as gates:
        gates.heads[:], gates.neurons[:] = heads, neurons
        return logits_of(model, batch)


def multiplied(model: Any, heads: list[Tensor], neurons: list[Tensor]) -> Any:
    """A copy whose output projections' columns are multiplied by the gates."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for block, head_gate, neuron_gate in zip(blocks(twin), heads, neurons, strict=True):
            for linear, own in (
                (block.head_out, head_gate.repeat_interleave(block.head_size)),
                (block.neuron_out, neuron_gate),
            ):
                linear.weight.mul_(own[:, None] if isinstance(linear, Conv1D) else own)
    return twin


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(kind: str) -> Any:
    return model_of(kind)


def test_modules_are_where_the_table_says(kind: str, model: Any) -> None:
    check_architecture(ARCHITECTURES[kind], model)
    shape = [(block.heads, block.neurons) for block in blocks(model)]
    assert shape == [(4, 24)] * (1 if kind == "albert" else 2)


def test_gate(kind: str, model: Any) -> None:
    layers, batch = blocks(model), batch_of(kind)
    torch.manual_seed(3)
    heads, neurons = [torch.randn(b.heads) for b in layers], [torch.randn(b.neurons) for b in layers]
    expected = logits_of(multiplied(model, heads, neurons), batch)
    torch.testing.assert_close(with_gates(model, heads, neurons, batch), expected)
    assert (logits_of(model, batch) - expected).abs().max() > 1e-3


def test_score(kind: str, model: Any) -> None:
    batch = batch_of(kind)
    is_causal = kind in NO_CLASSIFIER
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100) if is_causal else torch.arange(3)
    found = fastdistill.score(model, [{**batch, "labels": labels}], progress=False).expressiveness
    with fastdistill.gate(model) as gates:
        totals = [torch.zeros_like(g) for g in gates.tensors]
        for row in range(3):
            one = {name: value[row : row + 1] for name, value in batch.items()}
            own = labels[row : row + 1]
            number = int((own[:, 1:] != -100).sum()) if is_causal else 1
            loss = model(**one, labels=own).loss * number  # transformers' own, which shifts the labels
            for total, gradient in zip(totals, torch.autograd.grad(loss, gates.tensors), strict=True):
                total += gradient.abs()
        count = int((labels[:, 1:] != -100).sum()) if is_causal else 3
    for ours, expected in zip([*found.heads, *found.neurons], totals, strict=True):
        torch.testing.assert_close(ours, expected / count, rtol=1e-3, atol=1e-6)
    assert all(layer.max() > 0 for layer in [*found.heads, *found.neurons])


OPEN = [
    ([0, 2], [0, 1, 2, 3]),  # of groups of two: a half of each, and all
    ([1, 2, 3], [2, 3]),  # a half of one, which is made up, and one whole
    ([3], []),
]


@pytest.mark.parametrize("heads", OPEN, ids=["uneven", "made up", "none"])
def test_pruned_is_masked_and_comes_back(
    kind: str, model: Any, heads: tuple[list[int], list[int]], tmp_path: Path
) -> None:
    layers, batch = blocks(model), batch_of(kind)
    kept_heads = [torch.tensor(own, dtype=torch.long) for own in heads[: len(layers)]]
    kept_neurons = [torch.arange(1, 24, 2), torch.arange(0 if heads[1] == [] else 20)][: len(layers)]
    smaller = without(model, kept_heads, kept_neurons)
    masks = [
        [torch.zeros(n).index_fill(0, kept, 1) for kept in group] for n, group in ((4, kept_heads), (24, kept_neurons))
    ]
    torch.testing.assert_close(logits_of(smaller, batch), with_gates(model, *masks, batch))
    assert smaller.num_parameters() < model.num_parameters()
    for block, own in zip(blocks(smaller), kept_heads, strict=True):
        grouped = blocks(model)[0].groups == 2
        assert block.heads == (4 if grouped and own.tolist() == [1, 2, 3] else len(own))
        assert block.groups == (len(set((own // 2).tolist())) if grouped else block.heads)

    smaller.save_pretrained(tmp_path)
    loaded = fastdistill.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), smaller.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(logits_of(loaded, batch), logits_of(smaller, batch))
    assert smaller.state_dict().keys() == model.state_dict().keys()
    with pytest.raises((RuntimeError, transformers.integrations.heterogeneity.AmbiguousGlobalPerLayerAttributeError)):
        type(model).from_pretrained(tmp_path)


def test_store(kind: str, model: Any, tmp_path: Path) -> None:
    batch = batch_of(kind)
    dataset = Dataset.from_dict({name: value.tolist() for name, value in batch.items()})

    def stored() -> Dataset:
        collate = transformers.default_data_collator
        return fastdistill.store(dataset, model, collate=collate, batch_size=3, cache_file=tmp_path / "x.arrow")

    if kind in NO_CLASSIFIER:
        with pytest.raises(ValueError, match=r"expected \[B, C\]"):
            stored()
    else:
        torch.testing.assert_close(torch.tensor(stored()["teacher_logits"][:]), logits_of(model, batch))


def test_attention_implementation(kind: str) -> None:
    model, batch = model_of(kind), batch_of(kind)
    model.set_attn_implementation("eager")
    expected = logits_of(model, batch)
    layers = blocks(model)
    gates = [torch.rand(b.heads) for b in layers], [torch.rand(b.neurons) for b in layers]
    gated = with_gates(model, *gates, batch)
    model.set_attn_implementation("fastdistill")
    torch.testing.assert_close(logits_of(model, batch), expected)
    torch.testing.assert_close(with_gates(model, *gates, batch), gated)


def test_training(kind: str, model: Any, tmp_path: Path) -> None:
    batch = batch_of(kind)
    rows = [{name: value[row] for name, value in batch.items()} for row in range(3)]
    labels = [row["input_ids"] if kind in NO_CLASSIFIER else place for place, row in enumerate(rows)]
    student = fastdistill.first_layers(model, 1)
    before = [weight.clone() for weight in encoder_layers(student)[0].parameters()]
    trainer = fastdistill.DistillationTrainer(
        student,
        tiny.config(tmp_path, max_steps=2, per_device_train_batch_size=3, train_sampling_strategy="sequential"),
        teacher_model=copy.deepcopy(model),
        train_dataset=[{**row, "labels": label} for row, label in zip(rows, labels, strict=True)],
    )
    assert trainer.train().training_loss > 0
    assert not all(map(torch.equal, before, encoder_layers(student)[0].parameters()))


def test_first_layers(kind: str, model: Any, tmp_path: Path) -> None:
    batch = batch_of(kind)
    student = fastdistill.first_layers(model, 1)
    hidden = [m(**batch, output_hidden_states=True).hidden_states for m in (model, student)]
    torch.testing.assert_close(hidden[1][0], hidden[0][0])
    assert len(hidden[1]) == 2
    student.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(again, batch), logits_of(student, batch), rtol=0, atol=0)
