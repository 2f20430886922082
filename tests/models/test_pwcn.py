"""PWCN and its variants, against their formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import fastdistill
from fastdistill.data.tasks import Task
from fastdistill.models.pwcn import Form, PWCNForSequenceClassification, Variant, aspect_classifier, proximity
from fastdistill.recipes.settings import pwcn as settings

TASK = Task("aspects", ("sentence1", "sentence2"), ("negative", "neutral", "positive"), "accuracy", 128)
VARIANTS = get_args(Variant)


def classifier(variant: str, *, seed: int = 0, **config: Any) -> PWCNForSequenceClassification:
    vectors = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    return aspect_classifier(TASK, vectors, seed=seed, variant=variant, hidden_size=5, **config).double().eval()


def example(words: int, aspect: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    """Some words, of which the aspect begins at the first place and ends before the second."""
    draw = torch.Generator().manual_seed(seed)
    first, end = aspect
    return {
        "input_ids": torch.randint(2, 20, (1, words), generator=draw),
        "position_distance": torch.tensor([[float(max(first - i, 0, i - end + 1)) for i in range(words)]]),
        "dependency_distance": torch.tensor(
            [[0.0 if first <= i < end else float(torch.randint(1, 4, (), generator=draw)) for i in range(words)]]
        ),
        "attention_mask": torch.ones(1, words, dtype=torch.long),
    }


EXAMPLES = [example(7, (2, 4), 1), example(3, (0, 1), 2), example(1, (0, 1), 3), example(2, (0, 2), 4)]


def padded(examples: list[dict[str, Tensor]], more: int = 2) -> dict[str, Tensor]:
    """Together, with padding that is no 0, which must not matter."""
    size = max(one["input_ids"].shape[1] for one in examples) + more
    pad = torch.nn.functional.pad
    return {
        name: torch.cat(
            [
                pad(one[name], (0, size - one[name].shape[1]), value=0 if name == "attention_mask" else 3)
                for one in examples
            ]
        )
        for name in examples[0]
    }


def near(distance: Tensor, aspect: Tensor, form: str) -> Tensor:
    """Of one sentence, word by word."""
    number = len(distance)
    outside = number - int(aspect.sum())
    told = []
    for d, inside in zip(distance.tolist(), aspect.tolist(), strict=True):
        if form == "paper":
            told.append(1 - d / number)
        else:
            told.append(0.0 if inside else max(0.0, 1 - d / outside))
    return torch.tensor(told, dtype=torch.float64)


def lstm(layer: torch.nn.LSTM, words: Tensor) -> Tensor:
    """Its states, step by step."""
    state = memory = torch.zeros(layer.hidden_size, dtype=torch.float64)
    states = []
    for word in words:
        gates = layer.weight_ih_l0 @ word + layer.bias_ih_l0 + layer.weight_hh_l0 @ state + layer.bias_hh_l0
        opened, forgot, new, let_out = gates.chunk(4)
        memory = forgot.sigmoid() * memory + opened.sigmoid() * new.tanh()
        state = let_out.sigmoid() * memory.tanh()
        states.append(state)
    return torch.stack(states)


def formula(model: PWCNForSequenceClassification, one: dict[str, Tensor]) -> Tensor:
    """The logits of one sentence, as the docstring has them."""
    variant, words = model.config.variant, model.embeddings.weight[one["input_ids"][0]]
    forwards = lstm(model.forwards, words)
    if variant == "lstm":
        return model.classifier(forwards[-1])
    states = torch.cat([forwards, lstm(model.backwards, words.flip(0)).flip(0)], 1)
    aspect = one["position_distance"][0] == 0
    alpha = torch.ones(len(words), dtype=torch.float64)
    if "att" in variant:
        mean = states[aspect].mean(0)
        alpha = torch.stack([state @ model.attention.weight @ mean for state in states]).softmax(0)
    if variant == "att-lstm":
        return model.classifier(sum(weight * state for weight, state in zip(alpha, states, strict=True)))
    distance = one["dependency_distance" if variant.endswith("dep") else "position_distance"][0]
    weighted = states * (near(distance, aspect, model.config.form) * alpha).unsqueeze(1)
    kernel, bias = model.convolution.weight, model.convolution.bias
    assert bias is not None
    assert kernel.shape[2] == (1 if variant.startswith("point") else 3)
    reach = kernel.shape[2] // 2
    convolved = []
    for place in range(len(words)):
        grams = [
            kernel[:, :, reach + step] @ weighted[place + step]
            for step in range(-reach, reach + 1)
            if 0 <= place + step < len(words)
        ]
        convolved.append(bias + sum(grams))
    return model.classifier(torch.stack(convolved).amax(0).relu())


def test_the_settings_name_the_same() -> None:
    """Which may not import PyTorch."""
    assert settings.Variant == Variant and settings.Form == Form


def test_proximity_by_hand() -> None:
    """great food but the service was dreadful !, of food; and of great food."""
    mask = torch.tensor([[True] * 8 + [False]])
    by_position = torch.tensor([[1.0, 0, 1, 2, 3, 4, 5, 6, 0]])
    found = proximity(by_position, mask, (by_position == 0) & mask)
    assert found.tolist() == [[1 - d / 8 for d in (1, 0, 1, 2, 3, 4, 5, 6)] + [0]]
    by_tree = torch.tensor([[1.0, 0, 1, 3, 2, 1, 2, 2, 0]])
    assert proximity(by_tree, mask, by_position == 0)[0, 6] == 1 - 2 / 8
    found = proximity(by_position, mask, by_position == 0, "released")
    torch.testing.assert_close(found, torch.tensor([[6 / 7, 0, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7, 0]]))


def test_proximity_is_never_below_0() -> None:
    """Of another tree, where the aspect is most of the sentence; and of nothing but an aspect."""
    mask = torch.ones(1, 4, dtype=torch.bool)
    distance = torch.tensor([[0.0, 0, 0, 2]])
    assert proximity(distance, mask, distance == 0, "released").tolist() == [[0, 0, 0, 0]]
    assert proximity(0 * distance, mask, mask, "released").tolist() == [[0, 0, 0, 0]]
    assert proximity(0 * distance, mask, mask).tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize("form", get_args(Form))
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_formula(variant: str, form: str) -> None:
    """With padding and without, in one batch and alone."""
    model = classifier(variant, form=form)
    expected = torch.stack([formula(model, one) for one in EXAMPLES])
    alone = torch.cat([model(**one).logits for one in EXAMPLES])
    torch.testing.assert_close(alone, expected, rtol=1e-6, atol=1e-7)  # distances are float32
    torch.testing.assert_close(model(**padded(EXAMPLES)).logits, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_has_no_gradient(variant: str) -> None:
    model = classifier(variant, trains_vectors=True)
    batch = padded(EXAMPLES[:2])
    batch["input_ids"][batch["attention_mask"] == 0] = 0
    model(**batch, labels=torch.tensor([0, 2])).loss.backward()
    gradient = model.embeddings.weight.grad
    assert gradient is not None and not gradient[0].any() and gradient.isfinite().all()
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_classifier_saves_and_loads(tmp_path: Path, variant: str) -> None:
    model = classifier(variant, form="released", trains_vectors=variant == "lstm").float()
    model.save_pretrained(tmp_path)
    loaded = fastdistill.from_pretrained(tmp_path)
    assert type(loaded) is PWCNForSequenceClassification
    assert loaded.config.id2label == {0: "negative", 1: "neutral", 2: "positive"}
    batch = padded(EXAMPLES)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    loaded(**batch, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert (loaded.get_input_embeddings().weight.grad is None) == (variant != "lstm")


def test_vectors_are_given_and_other_weights_are_of_the_seed() -> None:
    state = torch.random.get_rng_state()
    one, same, other = (classifier("pwcn-pos", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.convolution.weight, same.convolution.weight)
    assert not torch.equal(one.convolution.weight, other.convolution.weight)
    assert torch.equal(one.embeddings.weight, other.embeddings.weight)
    assert not one.embeddings.weight.requires_grad
    assert classifier("pwcn-pos", trains_vectors=True).embeddings.weight.requires_grad


def test_an_lstm_knows_no_aspect() -> None:
    model, (one, *_) = classifier("lstm"), EXAMPLES
    assert torch.equal(model(one["input_ids"]).logits, model(**one).logits)


def test_what_is_missing_is_named() -> None:
    (one, *_) = EXAMPLES
    with pytest.raises(ValueError, match="position_distance is None"):
        classifier("att-lstm")(one["input_ids"])
    with pytest.raises(ValueError, match="dependency_distance is None"):
        classifier("pwcn-dep")(one["input_ids"], position_distance=one["position_distance"])
    with pytest.raises(ValueError, match="variant is 'rnn'; expected one of lstm, att-lstm"):
        classifier("rnn")
