"""Tasks of images."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from PIL import Image

from fastdistill import load_task, store, tokenize
from fastdistill.data.images import Augmented, ImageCollator, pixels, size_of
from fastdistill.models.image_classifiers import image_classifier
from fastdistill.recipes.examples import Examples, of_images
from fastdistill.recipes.splits import Splits
from tests import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.image_folder(tmp_path / "squares")


def examples_of(folder: Path) -> Examples:
    data = load_task(folder)
    return of_images(Splits(data.task, data.train, data.validation, data.validation, "validation", "validation"))


def test_a_folder_of_folders_is_a_task(folder: Path) -> None:
    data = load_task(folder)
    assert (data.task.name, data.task.label_names, data.task.metric) == ("squares", ("high", "low"), "accuracy")
    assert data.task.is_of_images and not data.task.is_regression
    assert (len(data.train), len(data.validation), data.test) == (24, 12, None)
    assert data.train["label"][:] == [0] * 12 + [1] * 12
    assert len(load_task(folder, max_train_examples=5).train) == 5


def test_a_tenth_is_held_out_of_what_has_no_validation(folder: Path) -> None:
    (folder / "validation").rename(folder / "test")
    data = load_task(folder)
    assert (len(data.train), len(data.validation), len(data.test or [])) == (20, 4, 12)


def test_pixels_are_the_images(folder: Path) -> None:
    data = load_task(folder).train
    examples = pixels(data, size_of(data))
    batch = ImageCollator((8, 8))(list(examples))
    assert batch["labels"].tolist() == data["label"][:]
    for place in (0, 13, 23):
        wanted = torch.from_numpy(np.asarray(data[place]["image"]).copy()).permute(2, 0, 1)
        torch.testing.assert_close(batch["pixel_values"][place] * 0.25 + 0.5, wanted / 255)


def test_pixels_are_those_that_files_have_now(folder: Path, tmp_path: Path) -> None:
    files = [str(file) for file in sorted((folder / "train").rglob("*.png"))]
    Dataset.from_dict({"image": files, "label": [0] * 24}).save_to_disk(tmp_path / "data")
    data = load_from_disk(tmp_path / "data").cast_column("image", datasets.Image())  # `datasets` has a cache for it
    before = pixels(data, (8, 8))["pixel_values"][:]
    Image.new("RGB", (8, 8), 51).save(sorted((folder / "train" / "high").iterdir())[0])
    after = pixels(data, (8, 8))["pixel_values"][:]
    assert [old != new for old, new in zip(before, after, strict=True)] == [True] + [False] * 23


def test_augmented_images_are_crops_of_a_margin(folder: Path) -> None:
    """Of 8 pixels a margin of 1: each is one of 9 places, mirrored or not; labels stay."""
    examples = pixels(load_task(folder).train, (8, 8))
    augmented, found = Augmented(examples, (8, 8), seed=3), set()
    image = np.frombuffer(examples[5]["pixel_values"], np.uint8).reshape(3, 8, 8)
    around = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    places = {
        around[:, top : top + 8, left : left + 8][:, :, ::step].tobytes(): (top, left, step)
        for top in range(3)
        for left in range(3)
        for step in (1, -1)
    }
    for epoch in range(40):
        augmented.epoch = partial(int, epoch)
        assert augmented[5]["labels"] == examples[5]["labels"]
        found.add(places[augmented[5]["pixel_values"]])
    assert {top for top, _, _ in found} == {left for _, left, _ in found} == {0, 1, 2}
    assert {step for _, _, step in found} == {1, -1}


def test_an_augmented_image_depends_on_seed_epoch_and_number_alone(folder: Path) -> None:
    examples = pixels(load_task(folder).train, (8, 8))
    first, again = Augmented(examples, (8, 8), seed=3), Augmented(examples, (8, 8), seed=3)
    wanted = [first[row] for row in range(24)]
    assert again.__getitems__([7, 2, 19]) == [wanted[row] for row in (7, 2, 19)]
    again.epoch = partial(int, 1)
    assert [again[row] for row in range(24)] != wanted
    assert [Augmented(examples, (8, 8), seed=4)[row] for row in range(24)] != wanted


def test_what_a_teacher_says_is_of_the_pixels(folder: Path, tmp_path: Path) -> None:
    teacher = image_classifier("wrn-10-1", load_task(folder).task)

    def said() -> torch.Tensor:
        examples = examples_of(folder)
        stored = store(examples.train, teacher, collate=examples.collate, batch_size=4, cache_file=tmp_path / "x.arrow")
        return torch.tensor(stored["teacher_logits"][:])

    before = said()
    Image.new("RGB", (8, 8), 51).save(sorted((folder / "train" / "low").iterdir())[-1])
    assert ((said() - before).abs().amax(1) > 1e-6).tolist() == [False] * 23 + [True]


def test_images_of_another_size_or_mode_become_the_same(folder: Path) -> None:
    file = sorted((folder / "train" / "low").iterdir())[0]
    Image.new("L", (5, 20), 51).save(file)
    examples = examples_of(folder)
    batch = examples.collate(list(examples.train))
    assert batch["pixel_values"].shape == (24, 3, 8, 8)
    torch.testing.assert_close(batch["pixel_values"][12], torch.full((3, 8, 8), (0.2 - 0.5) / 0.25))


def test_what_cannot_be(folder: Path) -> None:
    with pytest.raises(ValueError, match="'squares' is of images; expected one of text"):
        tokenize(load_task(folder).train, tiny.tokenizer(), load_task(folder).task)
    bad = folder / "train" / "low" / "zz.png"
    bad.write_bytes(b"no image")
    data = load_task(folder).train
    with pytest.raises(ValueError, match=r"zz.png is no image that can be read"):
        pixels(data, (8, 8))
    bad.unlink()
    (folder / "validation" / "medium").mkdir()
    with pytest.raises(ValueError, match="has the class 'medium', which .*train has not"):
        load_task(folder)
    (folder / "validation" / "medium").rmdir()
    (folder / "train" / "medium").mkdir()
    with pytest.raises(ValueError, match="medium has no image"):
        load_task(folder)
    (folder / "train" / "medium").rmdir()
    (folder / "dev").mkdir()
    with pytest.raises(ValueError, match="has the validation split more than once: validation, dev"):
        load_task(folder)


def test_pillow_is_needed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'fastdistill\[images\]'"):
        load_task(folder)


def test_one_class_is_none(tmp_path: Path) -> None:
    (tmp_path / "train" / "only").mkdir(parents=True)
    with pytest.raises(ValueError, match="train has 1 folders; expected two classes"):
        load_task(tmp_path)
