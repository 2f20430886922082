"""Teams of teachers: several classifiers of the same labels, whose logits become columns of one dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from fastdistill.models.fit import check_model
from fastdistill.teachers.outputs import check_name
from fastdistill.teachers.store import Collate, check_dataset, teacher_columns, with_columns

if TYPE_CHECKING:
    from datasets import Dataset


class TeacherTeam(Mapping[str, "PreTrainedModel"]):
    """Teachers by name: any transformers classifiers of the same labels in the same order, of text or of images.

    They may differ in architecture, depth, hidden size and, with a dataset each, in tokenizer. It is a mapping, and as
    such the trainer's ``teacher_model`` for objectives of these names (`fastdistill.objectives.team`).

    Args:
        teachers: name -> model. A name is an identifier: the dataset's columns begin with it.

    Raises ValueError for no teachers, a name that is no identifier, and labels that are not all the same, and TypeError
    for what is no model of transformers.
    """

    def __init__(self, teachers: Mapping[str, PreTrainedModel]) -> None:
        if not isinstance(teachers, Mapping):
            raise TypeError(f"teachers is a {type(teachers).__name__}; expected a dictionary of models by name")
        self.teachers = dict(teachers)
        if not self.teachers:
            raise ValueError("teachers is empty; expected one or more models by name")
        known: list[str] = []
        for name, model in self.teachers.items():
            check_name("teachers has the name", name)
            check_model(f"teachers[{name!r}]", model)
            theirs = _labels(model)
            if known and not _agree(known, theirs):
                raise ValueError(
                    f"teachers[{name!r}] has the labels {_told(theirs)} but those before it {_told(known)}; "
                    "expected the same in the same order"
                )
            known = [ours or label for ours, label in zip(known or theirs, theirs, strict=True)]

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
                tokenizer or image size. Only its logits come over; the student never sees these columns. Where both
                datasets have "labels", or "label", these must be equal; without them nothing is checked but the length.
            batch_size, device, bf16: as of `store`.
            hidden_states: also "{name}_hidden_states".
            folder: of the stored files, whose names then begin with the teachers'; by default that of `store`.

        A teacher that has changed runs alone, without the others. Raises what `store` does, and ValueError for a name
        that is not the team's and for inputs of another length or with other labels than the dataset.
        """
        inputs = inputs or {}
        given = {"inputs": inputs, "collate": collate if isinstance(collate, Mapping) else {}}
        for argument, names in given.items():
            if unknown := sorted(names.keys() - self.teachers.keys()):
                raise ValueError(f"{argument} has {', '.join(unknown)}; expected names of {', '.join(self.teachers)}")
        if isinstance(collate, Mapping) and (missing := [name for name in self if name not in collate]):
            raise ValueError(f"collate has no {', '.join(missing)}; expected one for each teacher")
        check_dataset(dataset, *self)
        for name, rows in inputs.items():
            _check_aligned(name, rows, dataset)
        columns = [
            teacher_columns(
                inputs.get(name, dataset),
                model,
                name=name,
                collate=collate[name] if isinstance(collate, Mapping) else collate,
                batch_size=batch_size,
                hidden_states=hidden_states,
                cache_file=None if folder is None else Path(folder) / f"{name}.arrow",
                device=device,
                bf16=bf16,
            )
            for name, model in self.items()
        ]
        return with_columns(dataset, *columns)


def _check_aligned(name: str, rows: Dataset, dataset: Dataset) -> None:
    if len(rows) != len(dataset):
        raise ValueError(
            f"inputs[{name!r}] has {len(rows)} examples but dataset {len(dataset)}; expected the same ones"
        )
    ours, theirs = dataset.with_format(None), rows.with_format(None)
    for column in {"labels", "label"} & set(ours.column_names) & set(theirs.column_names):
        if theirs[column][:] != ours[column][:]:
            raise ValueError(f"inputs[{name!r}] has other {column} than dataset; expected the same order of examples")


def _labels(model: PreTrainedModel) -> list[str]:
    """Their names in order; config's default, "LABEL_0" and so on, names nothing."""
    names = [str(model.config.id2label[place]) for place in sorted(model.config.id2label)]  # type: ignore[index,arg-type]
    return ["" if name == f"LABEL_{place}" else name for place, name in enumerate(names)]


def _agree(ours: list[str], theirs: list[str]) -> bool:
    pairs = zip(ours, theirs, strict=False)
    return len(ours) == len(theirs) and all(a.casefold() == b.casefold() or not a or not b for a, b in pairs)


def _told(labels: list[str]) -> str:
    return ", ".join(label or f"LABEL_{place}" for place, label in enumerate(labels))
