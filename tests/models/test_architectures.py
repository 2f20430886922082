"""Every architecture × {gate, score, prune = mask, reload, store, attn_implementation, training, students}."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from torch import Tensor
from transformers.pytorch_utils import Conv1D

import fastdistill
from fastdistill.models.architectures import ARCHITECTURES, blocks, encoder_layers
from fastdistill.models.narrowing import without
from fastdistill.models.registering import check_architecture
from fastdistill.models.scores import Scores
from tests import tiny
from tests.models.known import NO_CLASSIFIER, batch_of, logits_of, model_of, with_gates

DECODERS = (
    *("gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "qwen2", "qwen3"),
    *("smollm3", "starcoder2"),
)


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
    with pytest.raises(RuntimeError):
        type(model).from_pretrained(tmp_path)


def test_store(kind: str, model: Any, tmp_path: Path) -> None:
    batch = batch_of(kind)
    dataset = Dataset.from_dict({name: value.tolist() for name, value in batch.items()})

    def stored() -> Dataset:
        collate = transformers.default_data_collator
        return fastdistill.store(dataset, model, collate=collate, batch_size=3, cache_file=tmp_path / "x.arrow")

    if kind in NO_CLASSIFIER:
        with pytest.raises(ValueError, match=r"expected .*\[B, C\]"):
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
    if kind == "gemma2":
        with pytest.raises(ValueError, match="softcap is 50.0, which 'fastdistill' attention cannot do"):
            model(**batch)
        return
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


def test_export_of_uniform_layers(kind: str, model: Any, tmp_path: Path) -> None:
    layers, batch = blocks(model), batch_of(kind)
    torch.manual_seed(2)
    scores = Scores([torch.rand(b.heads) for b in layers], [torch.rand(b.neurons) for b in layers])
    smaller = fastdistill.prune(model, scores, 0.5, uniform=True)
    assert [(b.heads, b.neurons) for b in blocks(smaller)] == [(2, 12)] * len(layers)
    fastdistill.export(smaller, tmp_path)
    plain, told = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits_of(plain, batch), logits_of(smaller, batch))
    found = blocks(plain)[0]
    assert (found.heads, found.groups) == ((2, blocks(smaller)[0].groups) if ARCHITECTURES[kind].head_size else (4, 4))
    assert found.neurons == 12


def test_export_of_one_group(tmp_path: Path) -> None:
    """Of multi-query attention heads go, and key and value stay."""
    model, batch = model_of("llama", num_key_value_heads=1), batch_of("llama")
    scores = Scores([torch.tensor([1.0, 4, 2, 3])] * 2, [torch.arange(24.0)] * 2)
    smaller = fastdistill.prune(model, scores, 0.5, uniform=True)
    assert smaller.config.fastdistill_pruned["heads"] == [[1, 3]] * 2
    fastdistill.export(smaller, tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(plain, batch), logits_of(smaller, batch))
    with pytest.raises(ValueError, match="model has 3 heads, which transformers refuses: .* not a multiple"):
        fastdistill.export(fastdistill.prune(model, scores, 0.25, uniform=True), tmp_path / "three")
    with pytest.raises(
        ValueError, match="model has layers of 4 and 24, 1 and 24 heads and neurons; expected the same of"
    ):
        fastdistill.export(without(model, [torch.arange(4), torch.arange(1)], [torch.arange(24)] * 2), tmp_path / "x")
    with pytest.raises(ValueError, match="expected the same of all, .* and some"):
        fastdistill.export(fastdistill.prune(model, scores, 1.0, uniform=True), tmp_path / "none")


def test_shared_layers(kind: str, model: Any, tmp_path: Path) -> None:
    batch, is_grouped = batch_of(kind), blocks(model)[0].groups < 4
    if kind == "albert":
        with pytest.raises(ValueError, match="applies its layers again and again"):
            fastdistill.shuffled_sharing(model)
        return
    swap = len(ARCHITECTURES[kind].head_in) == 3 and not is_grouped
    if not swap:
        with pytest.raises(ValueError, match="swap is True, but query and key are one linear map, or of different siz"):
            fastdistill.shuffled_sharing(model)
    if kind == "gpt2":
        with pytest.raises(ValueError, match="of Conv1D, which transformers cannot tie"):
            fastdistill.shuffled_sharing(model, swap=False)
        return
    if kind == "modernbert":  # its first layer lacks a norm
        with pytest.raises(ValueError, match="differs by its place"):
            fastdistill.shuffled_sharing(model, swap=False)
    student = fastdistill.shuffled_sharing(model, 1, swap=swap).eval()
    outputs = student(**batch, output_hidden_states=True)
    assert len(outputs.hidden_states) == 4
    assert (logits_of(student, batch) - logits_of(model, batch)).abs().max() > 1e-3
    student.save_pretrained(tmp_path / "shared")
    again = fastdistill.from_pretrained(tmp_path / "shared")
    torch.testing.assert_close(logits_of(again, batch), logits_of(student, batch))
    assert again.num_parameters() == student.num_parameters() == model.num_parameters()
    with pytest.raises(KeyError, match="layers that share weights: fastdistill.from_pretrained loads them"):
        type(model).from_pretrained(tmp_path / "shared")

    fastdistill.export(student, tmp_path / "plain")
    plain = type(model).from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits_of(plain, batch), logits_of(student, batch))
    assert plain.num_parameters() > model.num_parameters()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_causal_models_are_scored_by_tokens(kind: str) -> None:
    """As transformers' own loss is, which compares a token's logits with the next token; of P and Q alike."""
    teacher, student = (
        model_of(kind, "AutoModelForCausalLM"),
        model_of(kind, "AutoModelForCausalLM", num_hidden_layers=1),
    )
    batch = batch_of(kind)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    found = fastdistill.score(teacher, [{**batch, "labels": labels}], student, progress=False)
    assert found.friendliness is not None
    expressive, friendly = [], []
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        number = int(one["attention_mask"].sum()) - 1
        with fastdistill.gate(teacher) as gates:
            logits = teacher(**one).logits[0, :number]
            answers = student(**one).logits[0, :number].detach()
            own = torch.nn.functional.cross_entropy(logits, labels[row, 1 : number + 1], reduction="sum")
            kd = -((logits / 2).softmax(-1) * (answers / 2).log_softmax(-1)).sum() * 4
            for loss, totals in ((own, expressive), (kd, friendly)):
                gradients = torch.autograd.grad(loss, gates.tensors, retain_graph=True)
                totals.append(torch.cat([g.abs() for g in gradients]))
    count = int((labels[:, 1:] != -100).sum())
    for scores, totals in ((found.expressiveness, expressive), (found.friendliness, friendly)):
        expected = torch.stack(totals).sum(0) / count
        torch.testing.assert_close(torch.cat([*scores.heads, *scores.neurons]), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tokens_of_a_decoder_are_classified(kind: str) -> None:
    model, batch = model_of(kind, "AutoModelForTokenClassification"), batch_of(kind)
    labels = (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, -100)
    found = fastdistill.score(model, [{**batch, "labels": labels}], reduce="batch", progress=False).expressiveness
    with fastdistill.gate(model) as gates:
        loss = model(**batch, labels=labels).loss  # not shifted
        expected = torch.cat([g.abs() for g in torch.autograd.grad(loss, gates.tensors)])
    torch.testing.assert_close(torch.cat([*found.heads, *found.neurons]), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gemma3_text"])
def test_generation_without_heads_in_a_layer(kind: str) -> None:
    """Its cache counts the tokens all the same."""
    model, ids = model_of(kind, "AutoModelForCausalLM", eos_token_id=None), torch.tensor([[5, 9, 7, 8]])
    smaller = without(model, [torch.tensor([], dtype=torch.long), torch.tensor([1, 2])], [torch.arange(24)] * 2).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    found = [smaller.generate(ids, use_cache=use_cache, **options) for use_cache in (True, False)]
    assert found[0].shape == (1, 10)
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_a_pruned_decoder_trains_resumes_and_generates(kind: str, tmp_path: Path) -> None:
    model = model_of(kind, "AutoModelForCausalLM", eos_token_id=None)
    student = without(model, [torch.tensor([1, 2, 3]), torch.tensor([2])], [torch.arange(5), torch.arange(7)])
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(5, 60, (8, 9))]
    settings = {"per_device_train_batch_size": 4, "save_steps": 2, "train_sampling_strategy": "sequential"}
    runs = []
    for steps in (2, 4):
        trainer = fastdistill.DistillationTrainer(
            copy.deepcopy(student),
            tiny.config(tmp_path, save_strategy="steps", num_train_epochs=2, max_steps=steps, **settings),
            teacher_model=copy.deepcopy(model),
            train_dataset=rows,
        )
        runs.append(trainer.train(resume_from_checkpoint=steps == 4))
    assert runs[1].global_step == 4
    loaded = fastdistill.from_pretrained(tmp_path / "checkpoint-4")
    ids = rows[0]["input_ids"][None, :4]
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    found = [m.eval().generate(ids, use_cache=c, **options) for m in (trainer.model, loaded) for c in (True, False)]
    assert all(torch.equal(one, found[0]) for one in found)


def test_layers_of_groups_come_back(tmp_path: Path) -> None:
    """Pruned twice; but a config that names heads of groups of different sizes is refused."""
    model, batch = model_of("llama", num_attention_heads=8, head_dim=4), batch_of("llama")
    once = without(model, [torch.tensor([0, 3, 5, 6])] * 2, [torch.arange(24)] * 2)
    smaller = without(once, [torch.tensor([1, 3]), torch.tensor([0, 1])], [torch.arange(24)] * 2)
    masks = [torch.zeros(8).index_fill(0, torch.tensor(own), 1) for own in ([3, 6], [0, 3])]
    torch.testing.assert_close(logits_of(smaller, batch), with_gates(model, masks, [torch.ones(24)] * 2, batch))
    assert smaller.config.fastdistill_pruned["heads"] == [[3, 6], [0, 3]]
    smaller.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(fastdistill.from_pretrained(tmp_path), batch), logits_of(smaller, batch))
    config = json.loads((tmp_path / "config.json").read_text())
    config["fastdistill_pruned"]["heads"][0] = [0, 1, 4]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has the heads \[0, 1, 4\] at 0; expected equally many of each group"):
        fastdistill.from_pretrained(tmp_path)


def test_widths_in_the_form_of_transformers() -> None:
    layers = [torch.tensor([0, 1]), torch.tensor([2])], [torch.arange(5), torch.arange(7)]
    qwen = without(model_of("qwen3"), *layers).config.per_layer_config
    found = [(c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.intermediate_size) for c in qwen]
    assert found == [(2, 1, 8, 5), (1, 1, 8, 7)]
    bert = without(model_of("bert"), *layers)  # a number of heads would say another size of them
    assert [c.intermediate_size for c in bert.config.per_layer_config] == [5, 7]
    assert bert.config.num_attention_heads == 4


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "modernbert"])
def test_a_student_of_the_last_layers(kind: str, tmp_path: Path) -> None:
    """Which layers attend to all tokens, and which to some, goes with them."""
    model, batch = model_of(kind, num_hidden_layers=2), batch_of(kind)
    if kind == "modernbert":
        with pytest.raises(ValueError, match="layers has 1 at 0, but ModernBertEncoderLayer differs by its place"):
            fastdistill.first_layers(model, 1, layers=[1])
        return
    student = fastdistill.first_layers(model, 1, layers=[1])
    assert student.config.layer_types == model.config.layer_types[1:]
    student.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(again, batch), logits_of(student.eval(), batch))


def test_albert_has_no_layers_to_choose() -> None:
    with pytest.raises(ValueError, match="model applies 1 groups of layers again and again, and layers is \\[1\\]"):
        fastdistill.first_layers(model_of("albert"), 1, layers=[1])
    with pytest.raises(ValueError, match="model applies 2 groups"):
        fastdistill.first_layers(model_of("albert", num_hidden_groups=2), 1)
