"""Labelled rows from files: jsonl, csv, tsv and parquet, each row checked, each error naming file, line and column."""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import reprlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".tsv", ".parquet")

_COLUMNS = ("sentence1", "sentence2", "label", "start")
_Records = Iterator[tuple[int, dict[str, Any]]]
_Label = int | float | str | list[Any]


class RowError(ValueError):
    """A row that cannot be used: `file`, `line` (from 1; a parquet file's row), `column` and the `problem`.

    `column` is the field's name, or a position (from 1) in a line that could not be read as fields.
    """

    def __init__(self, file: Path, line: int, column: str | int, problem: str) -> None:
        super().__init__(file, line, column, problem)  # all of them, so that the error can be pickled
        self.file, self.line, self.column, self.problem = file, line, column, problem

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}, column {self.column!r}: {self.problem}"


@dataclass(frozen=True)
class Rows:
    """A file's rows, checked one by one but not yet against the task's labels; `lines` says where each stands."""

    file: Path
    lines: list[int]
    texts: dict[str, list[str]]
    labels: list[Any]  # of _Label
    starts: list[int]
    """Of aspects: where sentence2 begins in sentence1."""


def suffix_of(file: Path) -> str:
    for suffix in SUFFIXES:
        if file.name.endswith(suffix):
            return suffix
    raise ValueError(f"{file} is not of a known kind: its name must end in {', '.join(SUFFIXES)}")


def read_rows(file: Path, text_columns: tuple[str, ...] | None, *, aspects: bool = False) -> Rows:
    """Read and check a file. Where `text_columns` is None, the first row says whether sentence2 is wanted; of aspects
    it is, and so is start."""
    rows = Rows(file, [], {}, [], [])
    needed = ("sentence2", "start", "label") if aspects else ("label",)
    for line, record in _READERS[suffix_of(file)](file):
        if text_columns is None:
            text_columns = _COLUMNS[:2] if "sentence2" in record else _COLUMNS[:1]
        if not rows.texts:
            rows.texts.update({column: [] for column in text_columns})
        for column in (*text_columns, *needed):
            if column not in record:
                raise RowError(file, line, column, f"is missing; the columns are {', '.join(record)}")
        for column, texts in rows.texts.items():
            texts.append(_text(file, line, column, record[column]))
        if "sentence2" in record and "sentence2" not in rows.texts:
            raise RowError(file, line, "sentence2", "is here, though the task, or the first row, has none")
        if aspects:
            rows.starts.append(_start(file, line, record))
        rows.labels.append(_label(file, line, record["label"]))
        rows.lines.append(line)
    if not rows.lines:
        raise RowError(file, 1, 1, "the file has no rows")
    return rows


def _text(file: Path, line: int, column: str, value: object) -> str:
    if not isinstance(value, str):
        raise RowError(file, line, column, f"is {reprlib.repr(value)}; expected a text")
    if not value or value.isspace():
        raise RowError(file, line, column, f"is {reprlib.repr(value)}; expected a text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise RowError(file, line, column, f"is not valid Unicode: {error.reason}") from None
    return value


def _label(file: Path, line: int, value: object) -> _Label:
    if isinstance(value, list):  # several labels, or none
        for one in value:
            if isinstance(one, float | list):
                raise RowError(file, line, "label", f"has {reprlib.repr(one)}; expected texts or integers")
            _label(file, line, one)
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise RowError(file, line, "label", f"is {reprlib.repr(value)}; expected a number or a text")
    if isinstance(value, str):
        return _text(file, line, "label", value)
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(file, line, "label", f"is {value}; expected a finite number")
    return value


def _start(file: Path, line: int, record: dict[str, Any]) -> int:
    text, aspect, start = (record[column] for column in ("sentence1", "sentence2", "start"))
    if not isinstance(start, int) or isinstance(start, bool):
        raise RowError(file, line, "start", f"is {reprlib.repr(start)}; expected an integer")
    if start < 0 or not text.startswith(aspect, start):
        problem = f"is {start}; expected the character of sentence1 where {reprlib.repr(aspect)} begins"
        raise RowError(file, line, "start", problem)
    return start


def _lines(file: Path) -> Iterator[str]:
    line = 0
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
            for line, raw in enumerate(stream, 1):
                yield raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        problem = f"byte 0x{error.object[error.start]:02x} is not UTF-8: {error.reason}"
        raise RowError(file, line, error.start + 1, problem) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise RowError(file, line + 1, 1, f"the gzip data are cut short or damaged: {error}") from error


def _jsonl(file: Path) -> _Records:
    for line, text in enumerate(_lines(file), 1):
        try:
            record = json.loads(text, object_pairs_hook=_unique)
        except json.JSONDecodeError as error:
            raise RowError(file, line, error.colno, f"bad JSON: {error.msg}") from error
        except KeyError as error:
            raise RowError(file, line, error.args[0], "is there more than once") from None
        except (ValueError, RecursionError) as error:  # a number of too many digits; too deep a nesting
            raise RowError(file, line, 1, f"bad JSON: {error}") from error
        if not isinstance(record, dict):
            raise RowError(file, line, 1, f"is {reprlib.repr(record)}; expected a JSON object")
        yield line, record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(next(name for name in names if names.count(name) > 1))
    return record


def _csv(file: Path) -> _Records:
    return _delimited(file, csv.reader(_lines(file), strict=True))


def _tsv(file: Path) -> _Records:
    return _delimited(file, csv.reader(_lines(file), delimiter="\t", quoting=csv.QUOTE_NONE))


def _delimited(file: Path, reader: Any) -> _Records:
    header: list[str] | None = None
    line = 1
    try:
        for fields in reader:
            if header is None:
                header = fields or [""]
                if repeated := [name for name in header if header.count(name) > 1]:
                    raise RowError(file, line, repeated[0], "is there more than once")
            elif len(fields) != len(header):
                column = header[min(len(fields), len(header) - 1)]  # the first without a field, or the last
                problem = f"the row has {len(fields)} fields, the header {len(header)}"
                raise RowError(file, line, column, problem)
            else:
                record: dict[str, Any] = dict(zip(header, fields, strict=True))
                for column in {"label", "start"} & record.keys():
                    record[column] = _number(record[column])
                yield line, record
            line = reader.line_num + 1  # where the next row begins: a quoted field may span lines
    except csv.Error as error:
        raise RowError(file, line, 1, str(error)) from error


_INTEGER = re.compile(r"[+-]?\d{1,300}", re.ASCII)
_NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|inf|infinity)", re.ASCII | re.IGNORECASE)


def _number(text: str) -> _Label:
    """A csv or tsv label, or start: the number that it spells, or itself."""
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text


def _parquet(file: Path) -> _Records:
    import pyarrow
    import pyarrow.parquet

    line = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as source:
            present = source.schema_arrow.names
            for column in ("sentence1", "label"):
                if column not in present:
                    raise RowError(file, 1, column, f"is missing; the columns are {', '.join(present)}")
            if repeated := [column for column in _COLUMNS if present.count(column) > 1]:
                raise RowError(file, 1, repeated[0], "is there more than once")
            names = [name for name in _COLUMNS if name in present]
            for batch in source.iter_batches(columns=names):
                for values in zip(*(batch.column(name) for name in names), strict=True):
                    line += 1
                    yield line, {n: _as_py(file, line, n, v) for n, v in zip(names, values, strict=True)}
    except (pyarrow.ArrowException, OSError) as error:
        raise RowError(file, line + 1, 1, f"not a readable parquet file: {error}") from error


def _as_py(file: Path, line: int, column: str, value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise RowError(file, line, column, f"is not UTF-8: {error.reason}") from error


_READERS: dict[str, Callable[[Path], _Records]] = {
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
