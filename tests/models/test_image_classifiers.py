"""Classifiers of small images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import ResNetForImageClassification

import fastdistill
from fastdistill.data.tasks import Task
from fastdistill.models.image_classifiers import WideResNetConfig, WideResNetForImageClassification, image_classifier

TASK = Task("squares", (), ("a", "b", "c"), "accuracy", 1)


@pytest.mark.parametrize(
    "name, millions",
    [("wrn-40-1", 0.6), ("wrn-40-2", 2.2), ("wrn-16-8", 11.0), ("wrn-28-10", 36.5)],
)
def test_wide_residual_networks_have_the_papers_sizes(name: str, millions: float) -> None:
    ten = Task("ten", (), tuple("abcdefghij"), "accuracy", 1)
    assert image_classifier(name, ten).num_parameters() / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("name", ["wrn-10-1", "wrn-10-2", "resnet-8"])
def test_classifiers_train_save_and_load(name: str, tmp_path: Path) -> None:
    model = image_classifier(name, TASK)
    images, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(8):
        loss = model.train()(pixel_values=images, labels=labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(weight.grad is not None for weight in model.parameters())
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = fastdistill.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert torch.equal(loaded(images).logits, model(images).logits)


def test_a_wide_network_halves_each_side_twice() -> None:
    model = image_classifier("wrn-16-2", TASK)
    assert isinstance(model, WideResNetForImageClassification)
    assert model.blocks(model.stem(torch.randn(2, 3, 32, 32))).shape == (2, 128, 8, 8)
    assert isinstance(image_classifier("resnet-14", TASK), ResNetForImageClassification)


def test_weights_are_of_the_seed() -> None:
    state = torch.random.get_rng_state()
    one, same, other = (image_classifier("wrn-10-1", TASK, seed=seed).stem.weight for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ["wrn-16", "resnet-19", "resnet-2", "vgg-16", "wrn-16-1x"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is no image classifier; expected wrn-DEPTH-WIDTH"):
        image_classifier(name, TASK)


@pytest.mark.parametrize("sizes, said", [((12, 1), "depth is 12"), ((4, 1), "depth is 4"), ((10, 0), "width is 0")])
def test_sizes_that_cannot_be(sizes: tuple[int, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        WideResNetForImageClassification(WideResNetConfig(depth=sizes[0], width=sizes[1]))
