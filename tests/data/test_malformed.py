"""An error says which row of which file, and which column, is wrong."""

import gzip
import json
import pickle
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.written import SINGLE, folder, raised, single, write

GOOD = '{"sentence1": "good", "label": 1}\n'
JSONL = {
    "bad JSON": ('{"sentence1": "good", "label": }\n', 32, "bad JSON"),
    "cut short": ('{"sentence1": "good", "lab', 23, "bad JSON"),
    "blank line": ("\n", 1, "bad JSON"),
    "not an object": ('["good", 1]\n', 1, "is ['good', 1]; expected a JSON object"),
    "no text": ('{"label": 1}\n', "sentence1", "is missing; the columns are label"),
    "no label": ('{"sentence1": "good"}\n', "label", "is missing; the columns are sentence1"),
    "null text": ('{"sentence1": null, "label": 1}\n', "sentence1", "is None; expected a text"),
    "number for a text": ('{"sentence1": 3, "label": 1}\n', "sentence1", "is 3; expected a text"),
    "empty text": ('{"sentence1": "", "label": 1}\n', "sentence1", "expected a text that is not empty"),
    "blank text": ('{"sentence1": " \\t", "label": 1}\n', "sentence1", "expected a text that is not empty"),
    "half a surrogate pair": ('{"sentence1": "a \\ud800", "label": 1}\n', "sentence1", "not valid Unicode"),
    "null label": ('{"sentence1": "good", "label": null}\n', "label", "is None; expected a number or a text"),
    "list for a label": ('{"sentence1": "good", "label": [1]}\n', "label", "is [1]; expected one label"),
    "truth value": ('{"sentence1": "good", "label": true}\n', "label", "is True; expected a number or a text"),
    "fraction": ('{"sentence1": "good", "label": 1.0}\n', "label", "1.0 is not among"),
    "not finite": ('{"sentence1": "good", "label": NaN}\n', "label", "is nan; expected a finite number"),
    "out of range": ('{"sentence1": "good", "label": 2}\n', "label", "labels: the integers 0..1"),
    "negative": ('{"sentence1": "good", "label": -1}\n', "label", "-1 is not among"),
    "name among numbers": ('{"sentence1": "good", "label": "one"}\n', "label", "'one' is not among"),
    "empty name": ('{"sentence1": "good", "label": ""}\n', "label", "expected a text that is not empty"),
    "repeated key": ('{"sentence1": "a", "label": 1, "label": 0}\n', "label", "is there more than once"),
    "needless sentence2": (
        '{"sentence1": "a", "sentence2": "b", "label": 1}\n', "sentence2", "though the task, or the first row",
    ),
    "too deep": ('{"sentence1": ' + "[" * 200_000 + "\n", 1, "bad JSON"),
    "too many digits": ('{"sentence1": "a", "label": ' + "1" * 5000 + "}\n", 1, "bad JSON"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("case", JSONL)
def test_malformed_jsonl(tmp_path, case, suffix):
    line, column, problem = JSONL[case]
    path = folder(tmp_path / "sst2", suffix, train=single(SINGLE))
    content = (GOOD + GOOD + line).encode()
    (path / f"dev{suffix}").write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    error = raised(path)
    assert (error.file, error.line, error.column) == (path / f"dev{suffix}", 3, column)
    assert problem in error.problem


DELIMITED = {
    "too few fields": ("good\n", "label", "the row has 1 fields, the header 2"),
    "too many fields": ("good,1,2\n", "label", "the row has 3 fields, the header 2"),
    "blank line": ("\n", "sentence1", "the row has 0 fields, the header 2"),
    "empty text": (",1\n", "sentence1", "expected a text that is not empty"),
    "blank text": ("  ,1\n", "sentence1", "expected a text that is not empty"),
    "empty label": ("good,\n", "label", "expected a text that is not empty"),
    "fraction": ("good,1.0\n", "label", "1.0 is not among"),
    "not finite": ("good,nan\n", "label", "is nan; expected a finite number"),
    "infinite": ("good,1e999\n", "label", "is inf; expected a finite number"),
    "out of range": ("good,2\n", "label", "2 is not among"),
    "not a number": ("good,one\n", "label", "'one' is not among"),
    "spaced": ("good, 1\n", "label", "' 1' is not among"),
    "underscored": ("good,1_0\n", "label", "'1_0' is not among"),
}


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("case", DELIMITED)
def test_malformed_csv_and_tsv(tmp_path, case, suffix):
    row, column, problem = DELIMITED[case]
    path = folder(tmp_path / "sst2", train=single(SINGLE))
    file = path / f"validation{suffix}"
    content = "sentence1,label\ngood,1\n" + row
    file.write_text(content if suffix == ".csv" else content.replace(",", "\t"))
    error = raised(path)
    assert (error.file, error.line, error.column) == (file, 3, column)
    assert problem in error.problem


@pytest.mark.parametrize(
    ("content", "line", "column", "problem"),
    [
        ('sentence1,label\n"two\nlines",1\n"three\n\nlines",7\n', 4, "label", "7 is not among"),
        ('sentence1,label\n"two\nlines",1\nragged\n', 4, "label", "the row has 1 fields"),
        ('sentence1,label\ngood,1\n"open,1\nand so on,0\n', 3, 1, "unexpected end of data"),
        ('sentence1,label\n"good" film,1\n', 2, 1, "expected after"),
        (f"sentence1,label\ngood,1\n{'x' * 200_000},1\n", 3, 1, "field larger than field limit"),
        ("sentence1,label,label\ngood,1,1\n", 1, "label", "is there more than once"),
        ("text,label\ngood,1\n", 2, "sentence1", "is missing; the columns are text, label"),
        ("sentence1,labels\ngood,1\n", 2, "label", "is missing; the columns are sentence1, labels"),
        ("sentence1,label\n", 1, 1, "the file has no rows"),
        ("\nsentence1,label\ngood,1\n", 2, "", "the row has 2 fields, the header 1"),
        ("sentence1,sentence2,label\na,b,1\n", 2, "sentence2", "though the task"),
    ],
)
def test_malformed_csv(tmp_path, content, line, column, problem):
    file = tmp_path / "sst2.csv"
    file.write_text(content)
    error = raised(file)
    assert (error.file, error.line, error.column) == (file, line, column)
    assert problem in error.problem


PARQUET = {
    "null text": ({"sentence1": ["a", None]}, 2, "sentence1", "is None; expected a text"),
    "number for a text": ({"sentence1": [1, 2]}, 1, "sentence1", "is 1; expected a text"),
    "bytes for a text": ({"sentence1": [b"a", b"b"]}, 1, "sentence1", "is b'a'; expected a text"),
    "empty text": ({"sentence1": ["a", ""]}, 2, "sentence1", "expected a text that is not empty"),
    "null label": ({"label": [1, None]}, 2, "label", "is None; expected a number or a text"),
    "truth value": ({"label": [True, False]}, 1, "label", "is True; expected a number or a text"),
    "fraction": ({"label": [1.0, 0.0]}, 1, "label", "1.0 is not among"),
    "not finite": ({"label": [1.0, float("inf")]}, 2, "label", "is inf; expected a finite number"),
    "out of range": ({"label": [1, 2]}, 2, "label", "2 is not among"),
    "list": ({"label": [[1], [2]]}, 1, "label", "is [1]; expected one label"),
    "no label": ({"label": None}, 1, "label", "is missing; the columns are sentence1"),
    "no text": ({"sentence1": None}, 1, "sentence1", "is missing; the columns are label"),
    "no rows": ({"sentence1": [], "label": []}, 1, 1, "the file has no rows"),
    "needless sentence2": ({"sentence2": ["a", "b"]}, 1, "sentence2", "though the task"),
}


@pytest.mark.parametrize("case", PARQUET)
def test_malformed_parquet(tmp_path, case):
    change, line, column, problem = PARQUET[case]
    columns = {name: values for name, values in ({"sentence1": ["a", "b"], "label": [1, 0]} | change).items()}
    path = folder(tmp_path / "sst2", train=single(SINGLE))
    pq.write_table(pa.table({name: values for name, values in columns.items() if values is not None}),
                   path / "dev.parquet")  # fmt: skip
    error = raised(path)
    assert (error.file, error.line, error.column) == (path / "dev.parquet", line, column)
    assert problem in error.problem


def test_parquet_text_that_is_not_utf8(tmp_path):
    raw = pa.array([b"good", b"b\xffd"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"sentence1": text, "label": [1, 0]}), tmp_path / "sst2.parquet")
    error = raised(tmp_path / "sst2.parquet")
    assert (error.line, error.column) == (2, "sentence1") and "is not UTF-8" in error.problem


def test_parquet_with_a_column_twice(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([0])], ["sentence1", "label", "label"])
    pq.write_table(table, tmp_path / "sst2.parquet")
    error = raised(tmp_path / "sst2.parquet")
    assert (error.line, error.column, error.problem) == (1, "label", "is there more than once")


@pytest.mark.parametrize("keep", [0, 3, 40, -9, -1])
def test_parquet_cut_short(tmp_path, keep):
    file = write(tmp_path / "sst2.parquet", single(SINGLE))
    file.write_bytes(file.read_bytes()[:keep])
    error = raised(file)
    assert (error.file, error.line, error.column) == (
        file,
        1,
        1,
    ) and "not a readable parquet" in error.problem


def test_parquet_with_a_damaged_page(tmp_path):
    file = tmp_path / "sst2.parquet"
    table = pa.Table.from_pylist(single([(f"text {k}", k % 2) for k in range(500)]))
    pq.write_table(table, file, compression="zstd", use_dictionary=False)
    content = bytearray(file.read_bytes())
    content[60:90] = bytes(30)
    file.write_bytes(content)
    assert "not a readable parquet" in raised(file).problem


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".csv", ".tsv"])
def test_bytes_that_are_not_utf8(tmp_path, suffix):
    row = b'{"sentence1": "b\xe4d", "label": 0}\n' if "jsonl" in suffix else b"b\xe4d,0\n"
    rows = GOOD.encode() + row if "jsonl" in suffix else b"sentence1,label\n" + row
    rows = rows.replace(b",", b"\t") if suffix == ".tsv" else rows
    file = tmp_path / f"sst2{suffix}"
    file.write_bytes(gzip.compress(rows) if suffix.endswith(".gz") else rows)
    error = raised(file)
    assert (error.file, error.line, error.column) == (file, 2, row.index(b"\xe4") + 1)
    assert "byte 0xe4 is not UTF-8" in error.problem


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".csv", ".tsv"])
def test_empty_file(tmp_path, suffix):
    file = tmp_path / f"sst2{suffix}"
    file.write_bytes(b"")
    error = raised(file)
    assert (error.line, error.column, error.problem) == (1, 1, "the file has no rows")


def incompressible(rows):
    letters = random.Random(0)
    return "".join(
        json.dumps({"sentence1": "".join(letters.choices("abcdefghijklmnop ", k=200)), "label": k % 2}) + "\n"
        for k in range(rows)
    ).encode()


@pytest.mark.parametrize("keep", [5, 15, 0.5, -9, -1])
def test_gzip_cut_short(tmp_path, keep):
    file = tmp_path / "sst2.jsonl.gz"
    content = incompressible(500)
    packed = gzip.compress(content)
    file.write_bytes(packed[: int(keep * len(packed))] if isinstance(keep, float) else packed[:keep])
    error = raised(file)
    # Halfway, whole lines of the last block read are lost with its end.
    least, most = {5: (1, 1), 15: (1, 1), 0.5: (200, 260)}.get(keep, (501, 501))
    assert least <= error.line <= most and error.column == 1
    assert "cut short or damaged" in error.problem


@pytest.mark.parametrize("change", ["check sum", "data", "header"])
def test_gzip_damaged(tmp_path, change):
    packed = bytearray(gzip.compress(incompressible(50)))
    packed[{"check sum": -6, "data": 40, "header": 0}[change]] ^= 0xFF
    (tmp_path / "sst2.jsonl.gz").write_bytes(packed)
    error = raised(tmp_path / "sst2.jsonl.gz")
    assert 1 <= error.line <= 51


def test_row_errors_can_be_pickled(tmp_path):
    file = tmp_path / "sst2.jsonl"
    file.write_text('{"label": 1}\n')
    error = raised(file)
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == f"{file}, line 1, column 'sentence1': is missing; the columns are label"


def test_pairs_need_both_sentences(tmp_path):
    error = raised(folder(tmp_path / "rte", train=single(SINGLE), dev=single(SINGLE)))
    assert (error.file.name, error.line, error.column) == ("train.jsonl", 1, "sentence2")


@pytest.mark.parametrize(("label", "column"), [(5.01, "label"), (-0.1, "label"), ("five", "label"), (10**400, "label")])
def test_scores_outside_the_tasks_range(tmp_path, label, column):
    rows = [{"sentence1": "a", "sentence2": "b", "label": value} for value in (0, 5, label)]
    error = raised(folder(tmp_path / "stsb", train=rows, dev=rows[:1]))
    assert (error.file.name, error.line, error.column) == ("train.jsonl", 3, column)
