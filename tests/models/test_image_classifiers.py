"""Classifiers of small images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastdistill
from fastdistill.data.tasks import Task
from fastdistill.models.image_classifiers import (
    SmallResNetConfig,
    SmallResNetForImageClassification,
    WideResNetConfig,
    WideResNetForImageClassification,
    image_classifier,
)

TASK = Task("squares", (), ("a", "b", "c"), "accuracy", 1)


@pytest.mark.parametrize(
    "name, millions",
    [("wrn-40-1", 0.6), ("wrn-40-2", 2.2), ("wrn-16-8", 11.0), ("wrn-28-10", 36.5)],
)
def test_wide_residual_networks_have_the_papers_sizes(name: str, millions: float) -> None:
    ten = Task("ten", (), tuple("abcdefghij"), "accuracy", 1)
    assert image_classifier(name, ten).num_parameters() / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("resnet20", 278_324),
        ("resnet-56", 861_620),
        ("resnet8x4", 1_233_540),
        ("resnet32x4", 7_433_860),
        ("wrn_16_2", 703_284),
        ("wrn_40_2", 2_255_156),
    ],
)
def test_sizes_are_those_of_crds_code(name: str, parameters: int) -> None:
    """Of Tian et al. (2020), for CIFAR-100."""
    hundred = Task("hundred", (), tuple(str(n) for n in range(100)), "accuracy", 1)
    assert image_classifier(name, hundred).num_parameters() == parameters


@pytest.mark.parametrize("name", ["wrn-10-1", "wrn-10-2", "resnet-8", "resnet8x4"])
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
    model = image_classifier("resnet14x2", TASK)
    assert isinstance(model, SmallResNetForImageClassification)
    assert model.features(torch.randn(2, 3, 32, 32)).shape == (2, 128, 8, 8)


def test_weights_are_of_the_seed() -> None:
    state = torch.random.get_rng_state()
    one, same, other = (image_classifier("wrn-10-1", TASK, seed=seed).stem.weight for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ["wrn-16", "resnet-19", "resnet-2", "resnet8x0", "resnet8x", "vgg-16", "wrn-16-1x"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is no image classifier; expected wrn-DEPTH-WIDTH"):
        image_classifier(name, TASK)


@pytest.mark.parametrize("sizes, said", [((12, 1), "depth is 12"), ((4, 1), "depth is 4"), ((10, 0), "width is 0")])
def test_sizes_that_cannot_be(sizes: tuple[int, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        WideResNetForImageClassification(WideResNetConfig(depth=sizes[0], width=sizes[1]))


@pytest.mark.parametrize("sizes, said", [((10, 1), "depth is 10"), ((2, 1), "depth is 2"), ((8, 0), "width is 0")])
def test_sizes_of_a_resnet_that_cannot_be(sizes: tuple[int, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SmallResNetForImageClassification(SmallResNetConfig(depth=sizes[0], width=sizes[1]))
