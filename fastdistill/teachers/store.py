"""What a teacher says to a dataset, as columns of it: run once, kept on disk, read by every run after."""

from __future__ import annotations

import inspect
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from operator import length_hint
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import broadcast_object_list, send_to_device  # type: ignore[import-untyped]
from datasets import Dataset
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import find_labels

from fastdistill.digest import digest, model_digest, row_pieces, tensor_pieces
from fastdistill.files import sync, writing
from fastdistill.models.first_token import first_token_only
from fastdistill.models.fit import check_model
from fastdistill.models.frozen import frozen
from fastdistill.models.fused_residuals import fused_residuals
from fastdistill.models.heads import head_of, used_states
from fastdistill.models.hooks import refuse_hooked, whole
from fastdistill.models.inputs import taken_by
from fastdistill.models.packed import packed_forward
from fastdistill.models.short_attention import short_attention
from fastdistill.objectives.pkd import hidden_states as all_states
from fastdistill.processes import join
from fastdistill.teachers.outputs import HIDDEN_STATES, LOGITS, check_name

Collate = Callable[[list[dict[str, Any]]], Mapping[str, Any]]

VERSION = "4"
"""To change where the same teacher and settings would now give other files."""

POOL = 50
"""Batches in a file: they are of similar length, and they are what an interruption loses at most."""

DIGITS = 32
"""Of the digest that a file ends in."""


def store(
    dataset: Dataset,
    model: PreTrainedModel,
    *,
    name: str = "teacher",
    collate: Collate,
    batch_size: int = 64,
    hidden_states: bool = False,
    cache_file: str | Path | None = None,
    device: torch.device | str | None = None,
    bf16: bool = False,
) -> Dataset:
    """The dataset with what a teacher says to each example, which `DistillationTrainer` then takes for the teacher.

    The new column "{name}_logits" is ``[C]`` an example, and "{name}_hidden_states" ``[L+1, d]``: the first token's
    states ([CLS]; of a decoder those of the last, which its classifier takes) after the embeddings and each of L
    layers. Both are lists of fixed sizes, float32, or float64 where the model is. Being columns, they stay with their
    examples when those are shuffled or selected.

    The teacher runs once: what it says is kept in files of `POOL` batches, each written whole or not at all, read once
    to check its digest, and memory-mapped. A later call that finds them runs no model; one after an interruption runs
    it for the files that are missing or damaged. Processes (torchrun, accelerate) share the work. A file's name holds a
    digest of the examples as the model sees them (of images the files' bytes), the model's weights and config, and
    these settings, but for the name and the device: files of a teacher that has changed since are never read, and never
    removed either.

    Args:
        dataset: tokenized. The model sees the columns that its forward names, but no labels. Batches are of similar
            length of the model's main input.
        model: it runs in eval mode and without gradients, and is left in the mode and on the device that it was in.
        name: the teacher's, as the trainer calls it.
        collate: makes a batch of examples, as a trainer's data_collator. It is known by its type and by what it
            makes of the first `batch_size` examples.
        batch_size: examples that run at once, in each process.
        hidden_states: whether to store them beside the logits.
        cache_file: "folder/x.arrow" keeps "folder/x-{digest}-{part}.arrow". By default the folder is "fastdistill"
            in `datasets.config.HF_DATASETS_CACHE`, and x the model's class.
        device: where the model runs; by default where it is.
        bf16: run it under bfloat16 autocast.

    More than 1 MB is announced on stderr before it is written. Raises TypeError or ValueError for wrong arguments,
    for columns that the dataset has already, for a model whose logits are not ``[B, C]`` or no numbers, and for one
    within `fastdistill.gate`.
    """
    check_dataset(dataset, name)
    columns = teacher_columns(
        dataset,
        model,
        name=name,
        collate=collate,
        batch_size=batch_size,
        hidden_states=hidden_states,
        cache_file=cache_file,
        device=device,
        bf16=bf16,
    )
    return with_columns(dataset, columns)


def teacher_columns(
    dataset: Dataset,
    model: PreTrainedModel,
    *,
    name: str,
    collate: Collate,
    batch_size: int,
    hidden_states: bool,
    cache_file: str | Path | None,
    device: torch.device | str | None,
    bf16: bool,
) -> Dataset:
    """The new columns of `store` alone."""
    _check(dataset, model, name, collate, batch_size, {"hidden_states": hidden_states, "bf16": bf16})
    processes = join()
    key_of = model_digest(model)
    model = whole(model)
    device = torch.device(device or model.device)
    teacher = _Teacher(model, key_of, collate, name, batch_size, hidden_states, device, bf16)
    shown = dataset.with_format(None).select_columns(teacher.columns(dataset))
    path = _path(cache_file, model)
    key = teacher.digest(shown)
    starts = range(0, len(shown), POOL * batch_size)
    parts = [_Part(path, key, shown.select(range(i, min(i + starts.step, len(shown)))), i) for i in starts]

    missing = [part for part in parts if not part.read()]
    processes.wait_for_everyone()  # all have seen what is missing before one writes
    if processes.is_main_process:
        teacher.announce(missing)
    teacher.write(missing[processes.process_index :: processes.num_processes])
    processes.wait_for_everyone()
    teacher.write([part for part in missing if not part.read()])  # another machine's disk may not be this one's
    for file in path.parent.iterdir():
        if file.name.startswith(f".{path.stem}-{key}-"):
            file.unlink(missing_ok=True)  # a run that was killed was writing it
    columns = datasets.concatenate_datasets([part.stored for part in parts])
    return columns.rename_columns({column: name + column for column in columns.column_names})


class _Part:
    """Rows that are stored in one file, an Arrow stream that the digest of its bytes follows."""

    stored: Dataset

    def __init__(self, path: Path, key: str, rows: Dataset, start: int) -> None:
        self.rows, self.start = rows, start
        self.fingerprint = f"{key}-{start}"
        self.file = path.with_name(f"{path.stem}-{self.fingerprint}.arrow")

    def read(self) -> bool:
        """Whether the file is there, whole."""
        try:
            content = memoryview(pa.memory_map(str(self.file)).read_buffer())
        except OSError:
            return False
        if digest([content[:-DIGITS]]).encode() != bytes(content[-DIGITS:]):
            return False
        self.stored = Dataset.from_file(str(self.file))
        return len(self.stored) == len(self.rows)

    def write(self, table: pa.Table) -> None:
        stream = pa.BufferOutputStream()
        described = {"huggingface": json.dumps({"fingerprint": self.fingerprint})}
        with pa.ipc.new_stream(stream, table.schema.with_metadata(described)) as writer:
            writer.write_table(table)
        content = memoryview(stream.getvalue())
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_name(f".{self.file.name}.{secrets.token_hex(8)}")
        try:
            with writing(self.file), unfinished.open("wb") as file:
                file.write(content)
                file.write(digest([content]).encode())
            with suppress(FileNotFoundError):  # another run has the file whole, and has removed this one
                sync(unfinished)
                os.replace(unfinished, self.file)
                sync(self.file.parent)
        finally:
            unfinished.unlink(missing_ok=True)
        if not self.read():
            raise OSError(f"{self.file} was written but is not there, whole; expected a disk that keeps it")


class _Teacher:
    """A model, and how it is run."""

    def __init__(
        self,
        model: PreTrainedModel,
        model_digest: str,
        collate: Collate,
        name: str,
        batch_size: int,
        hidden_states: bool,
        device: torch.device,
        bf16: bool,
    ) -> None:
        self.model_digest = model_digest
        self.model, self.collate, self.name, self.batch_size = model, collate, name, batch_size
        self.hidden_states, self.device, self.bf16 = hidden_states, device, bf16

    def columns(self, dataset: Dataset) -> list[str]:
        """Those that the model takes."""
        labels = {"label", *find_labels(type(self.model))}  # type: ignore[no-untyped-call]
        taken = taken_by(self.model) or inspect.signature(self.model.forward).parameters.keys()
        columns = sorted(taken & set(dataset.column_names) - labels)
        if self.model.main_input_name not in columns:
            raise ValueError(
                f"dataset has columns {dataset.column_names}; expected {self.model.main_input_name!r} among them, "
                f"which {type(self.model).__name__} takes"
            )
        return columns

    def digest(self, shown: Dataset) -> str:
        """Of all that the result comes from, which the main process reads."""
        [key] = broadcast_object_list([self._digest(shown) if PartialState().is_main_process else None])
        return str(key)

    def _digest(self, shown: Dataset) -> str:
        first = self._batch(shown[: self.batch_size], range(min(self.batch_size, len(shown))))
        settings = (self.batch_size, self.hidden_states, self.bf16, type(self.collate).__qualname__)
        came_from = (VERSION, self.model_digest, repr(settings))
        tensors = {name: value for name, value in first.items() if isinstance(value, Tensor)}
        return digest(chain(came_from, tensor_pieces(tensors), row_pieces(shown)))

    def announce(self, parts: list[_Part]) -> None:
        if not parts:
            return
        with self._running():
            one = self._outputs(parts[0].rows[:1], [0])
        number = sum(len(part.rows) for part in parts)
        size = number * sum(values.nbytes for values in one.values())
        if size > 1e6:
            what = "logits and hidden states" if self.hidden_states else "logits"
            message = f"{self.name}: storing {what} of {number:,} examples, {decimal(size)}, in {parts[0].file.parent}"
            Console(stderr=True).print(message, highlight=False, soft_wrap=True)

    def write(self, parts: list[_Part]) -> None:
        if not parts:
            return
        with self._running(), _progress(self.name, sum(len(part.rows) for part in parts)) as advance:
            for part in parts:
                part.write(self._table(part, advance))

    @contextmanager
    def _running(self) -> Iterator[None]:
        """The model in eval mode on its device, without gradients; then as it was."""
        modes, home = [(module, module.training) for module in self.model.modules()], self.model.device
        try:
            self.model.eval()  # type: ignore[no-untyped-call]
            if home != self.device:
                self.model.to(self.device)  # type: ignore[arg-type]
            # of hidden states, too, the first token's are all that is kept
            with (
                torch.no_grad(),
                fused_residuals(self.model),
                first_token_only(self.model),
                short_attention(self.model),
                frozen(self.model, autocast=torch.bfloat16 if self.bf16 else None),
            ):
                yield
        finally:
            for module, training in modes:
                module.training = training
            if home != self.device:
                self.model.to(home)  # type: ignore[arg-type]

    def _table(self, part: _Part, advance: Callable[[int], object]) -> pa.Table:
        """What is stored of these rows, in their order; they run the longest first, so that memory is found early."""
        columns = part.rows[:]
        lengths = [length_hint(value) for value in columns[self.model.main_input_name]]  # 0 of an image
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        found = []
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            found.append(self._outputs(columns, batch))
            advance(len(batch))
        back = torch.tensor(order).argsort()
        said = {name: torch.cat([f[name] for f in found]).cpu()[back] for name in found[0]}
        for values in said.values():
            if (odd := (values.isnan() | values.isposinf()).flatten(1).any(1)).any():
                raise ValueError(
                    f"{self.name} ({type(self.model).__name__}) says NaN or infinity to row "
                    f"{part.start + int(odd.nonzero()[0])} of dataset; expected numbers"
                )
        return pa.table({name: _array(values) for name, values in said.items()})

    def _outputs(self, columns: Mapping[str, list[Any]], rows: Sequence[int]) -> dict[str, Tensor]:
        """What is stored of some rows, on the model's device: nothing waits for it batch by batch."""
        here = self._batch(columns, rows)
        batch = send_to_device(here, self.device)
        extra = {"output_hidden_states": True} if self.hidden_states else {}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            outputs = packed_forward(self.model, batch | extra, here.get("attention_mask"), first_states=True)
        logits = outputs.logits
        if logits.dim() != 2 or len(logits) != len(rows):
            raise ValueError(
                f"model {type(self.model).__name__} gave logits of shape {tuple(logits.shape)} for {len(rows)} "
                "examples; expected [B, C]"
            )
        stored = {LOGITS: _wide(logits)}
        if self.hidden_states:
            states = all_states("model", used_states(self.model, outputs, batch))
            first = [_wide(layer[:, 0]) for layer in states]
            stored[HIDDEN_STATES] = torch.stack(first, 1)
        return stored

    def _batch(self, columns: Mapping[str, list[Any]], rows: Sequence[int]) -> dict[str, Any]:
        return dict(self.collate([{name: values[row] for name, values in columns.items()} for row in rows]))


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _array(values: Tensor) -> pa.Array:
    """A tensor as an array of lists, fixed in size, of lists, for each dimension but the first."""
    array = pa.array(values.numpy().reshape(-1))
    for size in reversed(values.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array


@contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[int], object]]:
    """One bar for all parts."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    quiet = datasets.are_progress_bars_disabled() or not PartialState().is_main_process
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task(f"storing {name}", total=total)
        yield lambda rows: bar.advance(task, rows)


def with_columns(dataset: Dataset, *new: Dataset) -> Dataset:
    """All columns, in the first dataset's format."""
    form = dataset.format
    added = [column for columns in new for column in columns.column_names]
    named = None if set(form["columns"]) == set(dataset.column_names) else [*form["columns"], *added]
    rows = dataset.with_format(None)
    if rows._indices is not None:
        rows = rows.flatten_indices()  # alone: what is stored would else be copied with it, to files in its folder
    both = datasets.concatenate_datasets([rows, *new], split=dataset.split, axis=1)
    return both.with_format(form["type"], named, form["output_all_columns"], **form["format_kwargs"])


def _path(cache_file: str | Path | None, model: PreTrainedModel) -> Path:
    if cache_file is None:
        return Path(datasets.config.HF_DATASETS_CACHE) / "fastdistill" / f"{type(model).__name__}.arrow"
    path = Path(cache_file).absolute()
    if path.suffix != ".arrow":
        raise ValueError(f"cache_file is {str(cache_file)!r}; expected a name that ends in .arrow")
    return path


def check_dataset(dataset: object, *names: str) -> None:
    """Raises TypeError for what is no dataset, ValueError for one without rows or with columns of these teachers."""
    if not isinstance(dataset, Dataset):
        raise TypeError(f"dataset is a {type(dataset).__name__}; expected a datasets.Dataset")
    if not len(dataset):
        raise ValueError("dataset has no rows; expected one or more")
    for column in (f"{name}{kind}" for name in names for kind in (LOGITS, HIDDEN_STATES)):
        if column in dataset.column_names:
            raise ValueError(f"dataset has a column {column!r} already; expected another name, or no such column")


def _check(
    dataset: object, model: object, name: object, collate: object, batch_size: object, flags: Mapping[str, object]
) -> None:
    check_dataset(dataset)
    check_model("model", model)
    refuse_hooked(whole(model))
    head = head_of(model)  # type: ignore[arg-type]
    if head.per_token or head.kind == "question_answering":
        raise ValueError(
            f"model {type(model).__name__} is for {head.kind}, with logits of every token; expected a classifier of "
            "examples, [B, C], or the model itself as the trainer's teacher_model"
        )
    check_name("name is", name)
    if not callable(collate):
        raise TypeError(f"collate is {collate!r}; expected a function from a list of examples to a batch")
    if not isinstance(batch_size, int) or isinstance(batch_size, bool):
        raise TypeError(f"batch_size is {batch_size!r}; expected an integer")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
    for flag, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{flag} is {value!r}; expected True or False")
