"""Tasks of images, from folders; and their pixels as models take them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from fastdistill.data.tasks import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "dev"), "test": ("test",)}


def is_image_task(folder: Path) -> bool:
    """Whether it has a folder "train" of folders, one a class."""
    train = folder / "train"
    return train.is_dir() and any(path.is_dir() for path in train.iterdir())


def from_folder(folder: Path) -> tuple[Task, dict[str, Dataset]]:
    """A task and its splits, with columns `image` and `label`, from "train/<class>/<image>", "validation/..." (or
    "dev/...") and perhaps "test/...": what `datasets` calls an image folder. Classes are numbered in sorted order.

    Raises ValueError for fewer classes than two, for a class that train lacks, and for a class without images, and
    ImportError without Pillow.
    """
    import datasets

    if importlib.util.find_spec("PIL") is None:
        raise ImportError("images are read by Pillow, which an extra brings: pip install 'fastdistill[images]'")
    classes = _classes(folder / "train")
    if len(classes) < 2:
        raise ValueError(f"{folder / 'train'} has {len(classes)} folders; expected two classes or more")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    splits = {}
    for split, names in SPLIT_FOLDERS.items():
        found = [folder / name for name in names if (folder / name).is_dir()]
        if len(found) > 1:
            raise ValueError(f"{folder} has the {split} split more than once: {', '.join(names)}")
        if not found:
            continue
        if unknown := sorted(set(_classes(found[0])) - set(classes)):
            raise ValueError(f"{found[0]} has the class {unknown[0]!r}, which {folder / 'train'} has not")
        files = [(file, classes.index(name)) for name in _classes(found[0]) for file in _images(found[0] / name)]
        columns: dict[str, list[Any]] = {"image": [str(file) for file, _ in files], "label": [c for _, c in files]}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    return Task(folder.name, (), tuple(classes), "accuracy", 1), splits


def _classes(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def _images(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"{folder} has no image ({', '.join(SUFFIXES)})")
    return found


def pixels(dataset: Dataset, size: tuple[int, int]) -> Dataset:
    """The images' bytes in RGB, as `pixel_values`, and `labels`.

    Args:
        dataset: with columns `image` and `label`.
        size: height and width; images of another are resized, by bilinear interpolation.

    Raises ValueError for what is no image.
    """
    import datasets

    height, width = size

    def read(batch: dict[str, list[Any]]) -> dict[str, list[bytes]]:
        return {"pixel_values": [_rgb(image, height, width) for image in batch["image"]]}

    encoded = dataset.cast_column("image", datasets.Image(decode=False))
    features = datasets.Features({"label": datasets.Value("int64"), "pixel_values": datasets.Value("binary")})
    read_all = encoded.map(
        read,
        batched=True,
        batch_size=256,
        remove_columns="image",
        features=features,
        load_from_cache_file=False,  # which datasets knows by the files' names, not by what is in them
        desc="Reading images",
    )
    return read_all.rename_column("label", "labels")


def size_of(dataset: Dataset) -> tuple[int, int]:
    """Height and width of the first image."""
    width, height = dataset[0]["image"].size
    return int(height), int(width)


def _rgb(encoded: Mapping[str, Any], height: int, width: int) -> bytes:
    import io

    from PIL import Image

    name = encoded["path"]
    try:
        with Image.open(io.BytesIO(encoded["bytes"]) if encoded["bytes"] else name) as image:
            rgb = image.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is no image that can be read: {error}") from error
    if rgb.size != (width, height):
        rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
    return bytes(np.asarray(rgb).transpose(2, 0, 1).tobytes())


class Augmented(TorchDataset[dict[str, Any]]):
    """`pixels`' examples, anew in each epoch: cropped at random out of the image with an eighth of its sides, black,
    around it (4 of 32 pixels), and mirrored half of the time.

    What an example becomes depends on the seed, the epoch and its number alone: neither on when it is read, nor on who
    reads it.

    Args:
        epoch: which it is now; the trainer's, once there is one.
    """

    def __init__(self, examples: Dataset, size: tuple[int, int], seed: int) -> None:
        self.examples, self.size, self.seed = examples, size, seed
        self.epoch: Callable[[], int] = lambda: 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[dict[str, Any]]:
        columns = self.examples[rows]
        columns["pixel_values"] = [
            self._changed(encoded, row) for encoded, row in zip(columns["pixel_values"], rows, strict=True)
        ]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _changed(self, encoded: bytes, row: int) -> bytes:
        height, width = self.size
        draw = np.random.default_rng((self.seed, self.epoch(), row))
        around = (height // 8, width // 8)
        image = np.frombuffer(encoded, np.uint8).reshape(3, height, width)
        image = np.pad(image, ((0, 0), *((side, side) for side in around)))
        top, left = (int(draw.integers(2 * side + 1)) for side in around)
        image = image[:, top : top + height, left : left + width]
        return (image[:, :, ::-1] if draw.integers(2) else image).tobytes()


class ImageCollator:
    """Makes a batch of `pixels`' examples: ``pixel_values`` ``[B, 3, H, W]``, each channel from -2 to 2, and what else
    they have."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = [np.frombuffer(example["pixel_values"], np.uint8) for example in examples]
        values = torch.from_numpy(np.stack(rows)).view(-1, 3, *self.size)
        others = {name: torch.tensor([one[name] for one in examples]) for name in examples[0] if name != "pixel_values"}
        return {"pixel_values": (values.float() / 255 - 0.5) / 0.25, **others}
