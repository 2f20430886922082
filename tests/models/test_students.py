from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fastdistill import first_layers, prune
from fastdistill.data.tasks import Task
from fastdistill.models.loading import PACKAGED, describe_head, load_classifier, load_tokenizer, pretrained
from fastdistill.models.scores import random_scores
from tests import tiny
from tests.encoders import CONFIGS, classifier, inputs


def states(model: nn.Module, kind: str) -> Any:
    with torch.no_grad():
        return model(**inputs(kind), output_hidden_states=True)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_first_layers_compute_what_they_did_in_the_model(kind: str, tmp_path: Path) -> None:
    model = classifier(kind)
    student = first_layers(model, 2)
    assert type(student) is type(model)
    assert (student.config.num_hidden_layers, model.config.num_hidden_layers) == (2, 4)
    found, expected = states(student, kind), states(model, kind)
    assert len(found.hidden_states) == 3
    assert len(expected.hidden_states) == 5
    for ours, theirs in zip(found.hidden_states[:2], expected.hidden_states[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    rest = {name: tensor for name, tensor in student.state_dict().items() if name in model.state_dict()}
    assert rest.keys() == student.state_dict().keys()  # embeddings, pooler and head included
    for name, tensor in rest.items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=0)

    student.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(states(again, kind).logits, found.logits, rtol=0, atol=0)


def test_the_student_shares_nothing_with_the_model() -> None:
    model = tiny.bert(layers=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student = first_layers(model, 2)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    student.config.num_labels = 7
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.config.num_labels == 2
    assert all(m.config is student.config for m in student.modules() if hasattr(m, "config"))


def test_the_student_trains_though_the_model_is_frozen() -> None:
    model = tiny.bert(layers=4)
    model.requires_grad_(False)
    student = first_layers(model, 2)
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in model.parameters())


def test_layers_can_be_chosen() -> None:
    model = tiny.bert(layers=4)
    student = first_layers(model, 3, layers=[3, 0, 2])
    for place, layer in enumerate([3, 0, 2]):
        torch.testing.assert_close(
            student.bert.encoder.layer[place].state_dict(), model.bert.encoder.layer[layer].state_dict(), rtol=0, atol=0
        )
    assert [m.layer_idx for m in student.modules() if hasattr(m, "layer_idx")] == [0, 1, 2]
    assert [m.layer_idx for m in model.modules() if hasattr(m, "layer_idx")] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "k, layers, message",
    [
        (0, None, "k is 0; expected from 1 to 4"),
        (5, None, "k is 5; expected from 1 to 4"),
        (2.0, None, "k is 2.0; expected from 1 to 4"),
        (True, None, "k is True; expected from 1 to 4"),
        (2, [0], r"layers is \[0\]; expected k = 2 different numbers from 0 to 3"),
        (2, [1, 1], r"layers is \[1, 1\]"),
        (2, [0, 4], r"layers is \[0, 4\]"),
        (2, [0, -1], r"layers is \[0, -1\]"),
    ],
)
def test_layers_that_there_are_not(k: Any, layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        first_layers(tiny.bert(layers=4), k, layers=layers)


def test_unknown_architectures_are_told_the_known_ones() -> None:
    config = transformers.T5Config(d_model=8, num_layers=2, num_heads=2, d_kv=4, d_ff=8, vocab_size=10)
    with pytest.raises(ValueError, match="model is a t5; its layers are known for albert, bert.*register_architecture"):
        first_layers(transformers.T5ForConditionalGeneration(config), 1)
    with pytest.raises(ValueError, match="model is a Linear"):
        first_layers(nn.Linear(1, 1), 1)  # type: ignore[type-var]


# What students and teachers are loaded from

SCORE = Task("score", ("sentence1",), None, "spearman", 16)


def saved(path: Path, **config: Any) -> str:
    tiny.bert(3, **config).save_pretrained(path)
    return str(path)


def test_an_encoder_gets_a_head_that_depends_on_the_seed_alone(tmp_path: Path) -> None:
    encoder = tiny.bert(3)
    encoder.bert.save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    models = [load_classifier(str(tmp_path), tiny.TASK, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), state)
    heads = [model.classifier.weight for model in models]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert models[0].config.id2label == {0: "low", 1: "high"}
    assert models[0].config.problem_type == "single_label_classification"
    torch.testing.assert_close(models[0].bert.state_dict(), encoder.bert.state_dict(), rtol=0, atol=0)


def test_a_head_of_another_size_is_replaced(tmp_path: Path) -> None:
    source = saved(tmp_path, num_labels=5)
    assert load_classifier(source, tiny.TASK).classifier.weight.shape == (2, 16)
    score = load_classifier(source, SCORE)
    assert score.classifier.weight.shape == (1, 16)
    assert score.config.problem_type == "regression"


def test_a_head_of_the_tasks_size_is_kept(tmp_path: Path) -> None:
    source = saved(tmp_path, id2label={0: "low", 1: "high"}, label2id={"low": 0, "high": 1})
    torch.testing.assert_close(load_classifier(source, tiny.TASK).classifier.weight, tiny.bert(3).classifier.weight)


def test_a_pruned_classifier_keeps_its_weights(tmp_path: Path) -> None:
    model = tiny.bert(3, id2label={0: "low", 1: "high"}, label2id={"low": 0, "high": 1})
    pruned = prune(model, random_scores(model, torch.Generator().manual_seed(0)), 0.5)
    pruned.save_pretrained(tmp_path)
    loaded = load_classifier(str(tmp_path), tiny.TASK)
    torch.testing.assert_close(loaded.state_dict(), pruned.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="is pruned or has shared layers, and its head is not of score"):
        load_classifier(str(tmp_path), SCORE)


@pytest.mark.parametrize(
    "labels, task, expected",
    [
        (("low", "high"), tiny.TASK, "task"),
        (("Low", "HIGH"), tiny.TASK, "task"),
        (("high", "low"), tiny.TASK, "other"),
        (("LABEL_0", "LABEL_1"), tiny.TASK, "unnamed"),
        (("low", "middle", "high"), tiny.TASK, "other"),
        (("low", "high"), replace(tiny.TASK, label_names=("0", "1")), "unnamed"),
        (("low", "high"), replace(tiny.TASK, label_names=("1", "0")), "other"),
        (("LABEL_0",), SCORE, "task"),
        (("low", "high"), SCORE, "other"),
    ],
)
def test_a_config_says_what_its_head_is_of(tmp_path: Path, labels: Any, task: Task, expected: str) -> None:
    names = dict(enumerate(labels))
    source = saved(tmp_path, id2label=names, label2id={name: place for place, name in names.items()})
    assert describe_head(source, task) == expected


def test_an_encoder_has_no_head(tmp_path: Path) -> None:
    tiny.bert().bert.save_pretrained(tmp_path)
    assert describe_head(str(tmp_path), tiny.TASK) == "none"


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    model = tiny.bert()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_classifier(str(tmp_path), tiny.TASK)


def test_packaged_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED, "absent", "no_such_package_of_models")
    with pytest.raises(ImportError, match=r"'absent' comes with an extra: pip install 'fastdistill\[demo\]'"):
        pretrained("absent")
    assert pretrained("some/folder") == "some/folder"


def test_minilm_is_found_in_its_package() -> None:
    pytest.importorskip(PACKAGED["minilm"])
    folder = Path(pretrained("minilm"))
    assert (folder / "model.safetensors").is_file()
    assert describe_head("minilm", tiny.TASK) == "none"
    model = load_classifier("minilm", tiny.TASK)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (6, 384)
    assert first_layers(model, 2).num_parameters() < model.num_parameters()
    assert load_tokenizer("minilm")("distil")["input_ids"][0] == 101
