"""Tasks as data sets: from the hub, the standard library or your own files; and their tokenizing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdistill.data import docstrings, images
from fastdistill.data.rows import SUFFIXES, RowError, Rows, read_rows, suffix_of
from fastdistill.data.tasks import TASKS, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SPLIT_FILES = {
    "train": ("train",),
    "validation": ("validation", "dev"),
    "test": ("test",),
    "mismatched": ("validation_mismatched", "dev_mismatched"),
}


@dataclass(frozen=True)
class TaskData:
    """A task and its splits: the task's text columns, or `image`, and `label`: int64 classes, float32 scores, or where
    there may be several float32 ``[C]``, 1 for those that an example has."""

    task: Task
    train: Dataset
    validation: Dataset
    test: Dataset | None
    mismatched: Dataset | None = None


def load_task(
    name_or_path: str | Path,
    *,
    max_train_examples: int | None = None,
    max_eval_examples: int | None = None,
    seed: int = 0,
    aspects: bool = False,
) -> TaskData:
    """Load a task by name, or from a folder or file.

    A name (a str among `fastdistill.data.tasks.TASKS`) is fetched from the Hugging Face hub through `datasets`,
    save "docstrings", which is made here and needs no network. Write "./sst2" for a local folder so named.

    A folder whose "train" is a folder of folders is a task of images: `fastdistill.data.images.from_folder`.

    Another holds `train.*`, `validation.*` (or `dev.*`) and perhaps `test.*` and
    `validation_mismatched.*`, each a labelled file. A single
    file is divided: of each class's rows, in an order drawn from `seed`, the second and every tenth after it
    become validation. So it is with hub tasks that have no validation split, and folders that have test in its place.

    Files are jsonl, jsonl.gz, csv, tsv or parquet, in UTF-8, with columns `sentence1`, for pairs `sentence2`,
    and `label`; other columns are dropped. csv and tsv have a header; csv fields may be quoted ("" for a
    quote inside), and tsv fields may not. A text must hold more than white space.

    Where the folder's or file's name is a registered task's (".../sst2", "rte.csv"), that task's metric,
    maximum length and labels hold: a class is given by its number or by its name ("positive"), a score is a
    number in the task's range. Otherwise the task is inferred from train, with maximum length 128:
    - text labels are class names, numbered in sorted order;
    - integers are classes, which must be numbered 0..K-1;
    - numbers any of which is written with a fraction (2.5, and 2.0 too) are scores, for regression;
    - lists of texts or integers (jsonl, parquet) are several labels an example, or none: each a class as above.
    The metric is accuracy, for scores Spearman's correlation, and for several labels their F1 ("f1_micro", which
    "f1_macro" is logged beside). Labels are of one kind throughout, and a
    class that train lacks may be in no other split. `sentence2` is in every row or in none.

    aspects: each row is of an aspect term: `sentence2` is in every row, and so is `start`, the place (from 0) of its
    first character in `sentence1`, which is kept as a column, int64. Only folders and files have such rows.

    max_train_examples, max_eval_examples: the most examples of train, and of validation and test each. A
    subset is the beginning of a shuffle that depends on `seed` alone: it is always the same, and smaller
    subsets are part of larger ones.

    Raises RowError for a bad row, FileNotFoundError or ValueError for missing, doubled or unknown files, and
    ConnectionError where the hub cannot be reached.
    """
    sizes = {"max_train_examples": max_train_examples, "max_eval_examples": max_eval_examples}
    for argument, size in sizes.items():
        if size is not None and _integer(argument, size) < 1:
            raise ValueError(f"{argument} is {size}; expected at least 1 or None")
    if not 0 <= _integer("seed", seed) < 2**32:
        raise ValueError(f"seed is {seed}; expected from 0 to 2**32 - 1")

    if isinstance(name_or_path, str) and name_or_path in TASKS:
        if aspects:
            raise ValueError(
                f"{name_or_path} is a task without aspects; expected a folder or file of rows with sentence1, "
                "sentence2, start, label"
            )
        task = TASKS[name_or_path]
        splits = _from_hub(task) if task.hub else _from_docstrings(task)
    else:
        task, splits = _from_files(Path(name_or_path), aspects)
    if "validation" not in splits:
        splits["train"], splits["validation"] = hold_out(task, splits["train"], seed)
    for split, dataset in splits.items():
        splits[split] = _subset(dataset, max_train_examples if split == "train" else max_eval_examples, seed)
    return TaskData(task, splits["train"], splits["validation"], splits.get("test"), splits.get("mismatched"))


def tokenize(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, task: Task, max_length: int | None = None
) -> Dataset:
    """Tokenize a split of a `TaskData`, truncating and not padding (that is for a collator, batch by batch).

    The result's columns are `input_ids`, `attention_mask`, for tokenizers that make them `token_type_ids`,
    `labels` (int64, float32 for regression, or float32 ``[C]`` for several), and `length`, the number of tokens,
    by which transformers' `train_sampling_strategy="group_by_length"` can group batches.

    max_length: by default the task's, or the tokenizer's `model_max_length` where that is less. The longer
    text of a pair is cut first.
    Raises ValueError for a missing column, an empty dataset, or a max_length above the tokenizer's.
    """
    if task.is_of_images:
        raise ValueError(f"task {task.name!r} is of images; expected one of text")
    if missing := {*task.text_columns, "label"} - set(dataset.column_names):
        has = f"it has {dataset.column_names}"
        raise ValueError(f"dataset lacks the columns {sorted(missing)} of task {task.name!r}; {has}")
    if len(dataset) == 0:
        raise ValueError("dataset has no rows; expected one or more")
    limit = tokenizer.model_max_length
    if max_length is None:
        max_length = min(task.max_length, limit)
    elif not 1 <= _integer("max_length", max_length) <= limit:
        raise ValueError(f"max_length is {max_length}; expected from 1 to the tokenizer's {limit}")

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = (batch[column] for column in task.text_columns)
        encoded = dict(tokenizer(*texts, truncation=True, max_length=max_length, return_attention_mask=True))
        return encoded | {"length": [len(ids) for ids in encoded["input_ids"]]}

    dropped = [column for column in dataset.column_names if column != "label"]
    tokenized = dataset.map(encode, batched=True, remove_columns=dropped, desc="Tokenizing")
    return _cast_label(tokenized, task).rename_column("label", "labels")


def _integer(argument: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{argument} is {value!r}; expected an integer")
    return value


def _label_feature(task: Task) -> Any:
    from datasets import List, Value

    if task.multi_label:
        return List(Value("float32"), length=task.num_labels)
    return Value("float32" if task.is_regression else "int64")


def _cast_label(dataset: Dataset, task: Task) -> Dataset:
    wanted = _label_feature(task)
    return dataset if dataset.features["label"] == wanted else dataset.cast_column("label", wanted)


def _dataset(task: Task, texts: dict[str, list[str]], labels: list[Any], starts: list[int] | None = None) -> Dataset:
    from datasets import Dataset, Features, Value

    columns: dict[str, list[Any]] = {**texts, "label": labels}
    features = {column: Value("string") for column in texts} | {"label": _label_feature(task)}
    if starts:
        columns["start"], features["start"] = starts, Value("int64")
    return Dataset.from_dict(columns, features=Features(features))


def _subset(dataset: Dataset, size: int | None, seed: int) -> Dataset:
    if size is None:
        return dataset
    # RandomState, whose stream NumPy has frozen, and not default_rng, whose stream may change.
    return dataset.select(np.random.RandomState(seed).permutation(len(dataset))[:size])


def hold_out(task: Task, dataset: Dataset, seed: int, every: int = 10) -> tuple[Dataset, Dataset]:
    """Divide into nine tenths and one tenth, class by class, or with another number in the place of ten; every class
    keeps its first row for training. Aspects of one sentence stay together: by the class of the first of them."""
    if "start" in dataset.column_names:
        sentences = np.asarray(dataset["sentence1"][:])
        first = np.sort(np.unique(sentences, return_index=True)[1])
        _, chosen = hold_out(task, dataset.select(first).remove_columns("start"), seed, every)
        held_out = np.isin(sentences, chosen["sentence1"][:])
        return dataset.select(np.flatnonzero(~held_out)), dataset.select(np.flatnonzero(held_out))
    alike = task.is_regression or task.multi_label
    labels = np.zeros(len(dataset)) if alike else np.asarray(dataset["label"][:])
    order = np.random.RandomState(seed).permutation(len(dataset))
    order = order[np.argsort(labels[order], kind="stable")]
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    held_out = (np.arange(len(order)) - np.repeat(starts, sizes)) % every == 1
    if not held_out.any():
        raise ValueError(f"task {task.name!r}: train has too few rows to make a validation split of")
    return dataset.select(np.sort(order[~held_out])), dataset.select(np.sort(order[held_out]))


# By name


def _from_docstrings(task: Task) -> dict[str, Dataset]:
    return {
        split: _dataset(task, {"sentence1": [row.text for row in rows]}, [row.label for row in rows])
        for split, rows in docstrings.build().items()
    }


def _from_hub(task: Task) -> dict[str, Dataset]:
    import datasets

    assert task.hub is not None
    try:
        found = datasets.load_dataset(task.hub.path, task.hub.config)
    except OSError as error:
        raise ConnectionError(
            f"task {task.name!r} could not be fetched from the Hugging Face hub ({task.hub.path}): {error}. "
            f"Without a network, give a local folder './{task.name}' that holds train and validation files "
            f"({', '.join(SUFFIXES)}) with columns {', '.join((*task.text_columns, 'label'))}; or the task "
            "'docstrings', which needs none"
        ) from error
    hub = task.hub
    wanted = {"train": "train", "validation": hub.validation, "test": hub.test, "mismatched": hub.mismatched}
    return {split: _from_hub_split(task, found[name]) for split, name in wanted.items() if name is not None}


def _from_hub_split(task: Task, dataset: Dataset) -> Dataset:
    """Give a split our columns, and check that its labels are the task's."""
    assert task.hub is not None
    names = getattr(dataset.features["label"], "names", None)
    if names is not None and tuple(names) != task.label_names:
        raise ValueError(f"{task.hub.path} has labels {names}; task {task.name!r} has {task.label_names}")
    renamed = {old: new for old, new in zip(task.hub.text_columns, task.text_columns, strict=True) if old != new}
    dataset = dataset.select_columns([*task.hub.text_columns, "label"]).rename_columns(renamed)
    dataset = _cast_label(dataset, task)
    labels = np.asarray(dataset["label"][:])
    low, high = task.label_range or (0, task.num_labels - 1)
    if not ((labels >= low) & (labels <= high)).all():
        raise ValueError(f"{task.hub.path} has labels outside {low}..{high} in a split of task {task.name!r}")
    return dataset


# From files


def _from_files(path: Path, aspects: bool) -> tuple[Task, dict[str, Dataset]]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is no file, no folder and no known task ({', '.join(TASKS)})")
    if path.is_dir() and not aspects and images.is_image_task(path):
        return images.from_folder(path.absolute())
    name = os.path.basename(os.path.abspath(path))  # a symbolic link's own name
    if path.is_dir():
        files = _split_files(path)
    else:
        files = {"train": path}
        name = name.removesuffix(suffix_of(path))
    known = TASKS.get(name)
    train = read_rows(files["train"], known.text_columns if known else None, aspects=aspects)
    task = known or _infer_task(name, train)
    code = _coder(task, text=any(isinstance(label, str) for label in _each(train.labels)))
    splits = {}
    for split, file in files.items():
        rows = train if split == "train" else read_rows(file, task.text_columns, aspects=aspects)
        splits[split] = _dataset(task, rows.texts, _codes(rows, code), rows.starts)
    return task, splits


def _split_files(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    missing: dict[str, str] = {}
    for split, stems in SPLIT_FILES.items():
        names = [stem + suffix for stem in stems for suffix in SUFFIXES]
        found = [name for name in names if (folder / name).is_file()]
        if len(found) > 1:
            raise ValueError(f"{folder} has the {split} split more than once: {', '.join(found)}")
        if found:
            files[split] = folder / found[0]
        elif split in ("train", "validation"):
            there = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
            missing[split] = f"{folder} has no {split} split: it holds {there}, and none of {', '.join(names)}"
    if "test" in files:
        missing.pop("validation", None)  # of which a tenth of train then serves
    for problem in missing.values():
        raise FileNotFoundError(problem)
    return files


def _infer_task(name: str, train: Rows) -> Task:
    columns, several = tuple(train.texts), isinstance(train.labels[0], list)
    text = isinstance(next(_each(train.labels), None), str)
    for line, label in zip(train.lines, train.labels, strict=True):
        if isinstance(label, list) != several:
            kind = "a list" if several else "one label"
            raise RowError(train.file, line, "label", f"{label!r} is not {kind}, as the first row's is")
        if odd := [one for one in _each([label]) if isinstance(one, str) != text]:
            kind = "a text" if text else "a number"
            raise RowError(train.file, line, "label", f"{odd[0]!r} is not {kind}, as the first row's is")
    if any(isinstance(label, float) for label in train.labels):
        return Task(name, columns, None, "spearman", 128)
    classes = sorted(set(_each(train.labels)))
    if len(classes) < 2:
        every = f"every label is {classes[0]!r}" if classes else "no row has a label"
        raise ValueError(f"{train.file}: {every}; expected two classes or more")
    if not text:
        for line, row in zip(train.lines, train.labels, strict=True):
            for label in _each([row]):
                if label not in range(len(classes)):
                    rule = f"{len(classes)} classes numbered 0..{len(classes) - 1}"
                    raise RowError(train.file, line, "label", f"{label} is out of range; expected {rule}")
    metric = "f1_micro" if several else "accuracy"
    return Task(name, columns, tuple(map(str, classes)), metric, 128, multi_label=several)


def _each(labels: list[Any]) -> Iterator[Any]:
    """The labels one by one, where rows may have several."""
    for label in labels:
        yield from label if isinstance(label, list) else [label]


def _coder(task: Task, text: bool) -> Callable[[Any], Any]:
    """From a label to its number, or from several to a 1 for each of them; a ValueError where it is not of train's kind
    or not one of the task's."""
    if task.label_names is None:
        limit = float(np.finfo(np.float32).max)
        low, high = task.label_range or (-limit, limit)

        def score(label: Any) -> float:
            if isinstance(label, str | list):
                raise ValueError(f"is {label!r}; expected a number")
            if not low <= label <= high:
                raise ValueError(f"{label} is out of range {low}..{high}")
            return float(label)

        return score

    codes = {name if text else number: number for number, name in enumerate(task.label_names)}
    known = f"the integers 0..{len(codes) - 1}"
    if text:
        known = ", ".join(map(repr, list(codes)[:20])) + (", ..." if len(codes) > 20 else "")

    def code(label: Any) -> int:
        if isinstance(label, list):
            raise ValueError(f"is {label!r}; expected one label")
        if isinstance(label, float) or label not in codes:  # a float would be found by the integer it equals
            raise ValueError(f"{label!r} is not among train's or the task's labels: {known}")
        return codes[label]

    def flags(labels: Any) -> list[float]:
        if not isinstance(labels, list):
            raise ValueError(f"is {labels!r}; expected a list of labels")
        there = set(map(code, labels))
        return [float(place in there) for place in range(task.num_labels)]

    return flags if task.multi_label else code


def _codes(rows: Rows, code: Callable[[Any], Any]) -> list[Any]:
    codes = []
    for line, label in zip(rows.lines, rows.labels, strict=True):
        try:
            codes.append(code(label))
        except ValueError as error:
            raise RowError(rows.file, line, "label", str(error)) from None
    return codes
