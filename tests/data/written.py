"""Files of tasks."""

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastdistill.data.load import RowError, load_task

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".tsv", ".parquet")
SINGLE = [("good", 1), ("bad", 0), ("fine film", 1)]


def write(file, rows):
    """Write rows, dicts with the same keys, in the format of the file's name."""
    name = file.name
    file.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith((".jsonl", ".jsonl.gz")):
        text = "".join(json.dumps(row, ensure_ascii=k % 2 == 0) + "\n" for k, row in enumerate(rows))
        file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif name.endswith(".csv"):
        with open(file, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = ["\t".join(rows[0])] + ["\t".join(str(value) for value in row.values()) for row in rows]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
    return file


def single(pairs):
    return [{"sentence1": text, "label": label} for text, label in pairs]


def folder(path, suffix=".jsonl", **splits):
    for split, rows in splits.items():
        write(path / (split + suffix), rows)
    return path


def rows_of(dataset):
    return [dict(row) for row in dataset]


def raised(path):
    with pytest.raises(RowError) as caught:
        load_task(path)
    error = caught.value
    where = f"{error.file}, line {error.line}, column {error.column!r}: "
    assert str(error).startswith(where) and isinstance(error, ValueError)
    return error
