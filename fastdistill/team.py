"""Teams of teachers: several classifiers of the same labels, whose logits become columns of one dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import torch

from fastdistill.stored import Collate, store
from fastdistill.teachers import HIDDEN_STATES, LOGITS

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


class TeacherTeam(Mapping[str, "PreTrainedModel"]):
    """Teachers by name: any transformers classifiers of the same labels in the same order, of text or of images.

    They may differ in architecture, depth, hidden size and, with a dataset each, in tokenizer. It is a mapping, and as
    such the trainer's ``teacher_model`` for objectives of these names (`fastdistill.multi_teacher`).

    Args:
        teachers: name -> model. A name is an identifier: the dataset's columns begin with it.

    Raises ValueError for no teachers, a name that is no identifier, and labels that are not all the same.
    """

    def __init__(self, teachers: Mapping[str, PreTrainedModel]) -> None:
        self.teachers = dict(teachers)
        if not self.teachers:
            raise ValueError("teachers is empty; expected one or more models by name")
        first, *others = self.teachers
        for name in self.teachers:
            if not isinstance(name, str) or not name.isidentifier():
                raise ValueError(f"teachers has the name {name!r}; expected letters, digits and underscores")
        for name in others:
            ours, theirs = (_labels(self.teachers[one]) for one in (first, name))
            agree = len(ours) == len(theirs) and all(
                a == b or not a or not b for a, b in zip(ours, theirs, strict=True)
            )
            if not agree:
                raise ValueError(
                    f"teachers[{name!r}] has the labels {_told(self.teachers[name])} but teachers[{first!r}] "
                    f"{_told(self.teachers[first])}; expected the same in the same order"
                )

    def __getitem__(self, name: str) -> PreTrainedModel:
        return self.teachers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.teachers)

    def __len__(self) -> int:
        return len(self.teachers)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.teachers)

    def store(
        self,
        dataset: Dataset,
        *,
        collate: Collate | Mapping[str, Collate],
        inputs: Mapping[str, Dataset] | None = None,
        batch_size: int = 64,
        hidden_states: bool = False,
        folder: str | Path | None = None,
        device: torch.device | str | None = None,
        bf16: bool = False,
    ) -> Dataset:
        """The dataset with "{name}_logits" of every teacher: `fastdistill.store`, which see, once for each.

        Args:
            dataset: tokenized for the student, and for all teachers that are not named in `inputs`.
            collate: for all teachers, or by name for each.
            inputs: name -> the same examples in the same order as that teacher takes them, where it has another
                tokenizer or image size. Only its logits come over; the student never sees these columns.
            batch_size, device, bf16: as of `store`.
            hidden_states: also "{name}_hidden_states".
            folder: of the stored files; by default that of `store`.

        Raises what `store` does, and ValueError for a name that is not the team's and for inputs of another length or
        with other labels than the dataset.
        """
        inputs = inputs or {}
        given = {"inputs": inputs, "collate": collate if isinstance(collate, Mapping) else {}}
        for argument, names in given.items():
            if unknown := sorted(names.keys() - self.teachers.keys()):
                raise ValueError(f"{argument} has {', '.join(unknown)}; expected names of {', '.join(self.teachers)}")
        if isinstance(collate, Mapping) and (missing := [name for name in self if name not in collate]):
            raise ValueError(f"collate has no {', '.join(missing)}; expected one for each teacher")
        for name, rows in inputs.items():
            _check_aligned(name, rows, dataset)
        for name, model in self.items():
            own = name in inputs
            said = store(
                inputs[name] if own else dataset,
                model,
                name=name,
                collate=collate[name] if isinstance(collate, Mapping) else collate,
                batch_size=batch_size,
                hidden_states=hidden_states,
                cache_file=None if folder is None else Path(folder) / f"{name}.arrow",
                device=device,
                bf16=bf16,
            )
            dataset = _with_columns(dataset, said, name) if own else said
        return dataset


def _with_columns(dataset: Dataset, said: Dataset, name: str) -> Dataset:
    columns = [column for column in (name + LOGITS, name + HIDDEN_STATES) if column in said.column_names]
    if clash := [column for column in columns if column in dataset.column_names]:
        raise ValueError(f"dataset has a column {clash[0]!r} already; expected another name, or no such column")
    stored = said.with_format(None).select_columns(columns)
    both = datasets.concatenate_datasets([dataset.with_format(None), stored], split=dataset.split, axis=1)
    kind = dataset.format
    return both.with_format(kind["type"], **kind["format_kwargs"])


def _check_aligned(name: str, rows: Dataset, dataset: Dataset) -> None:
    if len(rows) != len(dataset):
        raise ValueError(
            f"inputs[{name!r}] has {len(rows)} examples but dataset {len(dataset)}; expected the same ones"
        )
    for column in ("labels", "label"):
        if column in rows.column_names and column in dataset.column_names and rows[column][:] != dataset[column][:]:
            raise ValueError(f"inputs[{name!r}] has other {column} than dataset; expected the same order of examples")


def _labels(model: PreTrainedModel) -> list[str]:
    """Their names in order; config's default, "LABEL_0" and so on, names nothing."""
    names = [str(model.config.id2label[place]) for place in sorted(model.config.id2label)]  # type: ignore[index,arg-type]
    return ["" if name == f"LABEL_{place}" else name.casefold() for place, name in enumerate(names)]


def _told(model: PreTrainedModel) -> str:
    return ", ".join(str(label) for label in model.config.id2label.values())  # type: ignore[union-attr]
