import csv
import gzip
import json
import pickle
import random
import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from fastdistill.data.load import RowError, load_task, tokenize
from fastdistill.data.tasks import TASKS, Task
from tests import tiny

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


# Formats


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_the_same(tmp_path, suffix):
    data = load_task(folder(tmp_path / "sst2", suffix, train=single(SINGLE), validation=single(SINGLE[:2])))
    assert data.task is TASKS["sst2"]
    assert rows_of(data.train) == single(SINGLE)
    assert rows_of(data.validation) == single(SINGLE[:2])
    assert data.test is None
    assert data.train.features["label"] == datasets.Value("int64")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_pairs_scores_extra_columns_and_dev(tmp_path, suffix):
    rows = [
        {"id": 7, "sentence1": "A man sings.", "label": 3.8, "sentence2": "Somebody sings.", "genre": "news"},
        {"id": 8, "sentence1": "A dog runs.", "label": 5, "sentence2": "A cat sleeps.", "genre": ""},
    ]
    if suffix == ".parquet":
        rows[1]["label"] = 5.0
    data = load_task(folder(tmp_path / "stsb", suffix, train=rows, dev=rows[1:], test=rows))
    assert data.task is TASKS["stsb"]
    assert data.train.column_names == ["sentence1", "sentence2", "label"]
    assert data.train.features["label"] == datasets.Value("float32")
    assert data.train["sentence2"][:] == ["Somebody sings.", "A cat sleeps."]
    assert data.train["label"][:] == [pytest.approx(3.8), 5.0]
    assert len(data.validation) == 1 and len(data.test) == 2


def test_a_byte_order_mark_and_windows_line_ends(tmp_path):
    text = "\ufeffsentence1,label\r\ngood,1\r\nbad,0\r\n"
    folder(tmp_path / "sst2", train=single(SINGLE))
    (tmp_path / "sst2" / "dev.csv").write_bytes(text.encode())
    assert rows_of(load_task(tmp_path / "sst2").validation) == single(SINGLE[:2])


def test_quotes_are_csv_syntax_but_tsv_text(tmp_path):
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "train.csv").write_text('sentence1,label\n"said ""no"", twice",0\n"two\nlines",1\n')
    (tmp_path / "sst2" / "dev.tsv").write_text('sentence1\tlabel\n"open, "" and more\t1\n')
    data = load_task(tmp_path / "sst2")
    assert rows_of(data.train) == single([('said "no", twice', 0), ("two\nlines", 1)])
    assert rows_of(data.validation) == single([('"open, "" and more', 1)])


texts = st.text(min_size=1, max_size=30).filter(lambda text: not text.isspace())
labels = st.one_of(
    st.lists(st.integers(0, 1), min_size=2, max_size=8).map(lambda found: [0, 1, *found]),
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=8),
    st.lists(st.sampled_from(["yes", "no", "ünsure, then", "3 of 4"]), min_size=2, max_size=8),
)


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), labels=labels, pair=st.booleans())
def test_round_trip(tmp_path, suffix, data, labels, pair):
    kind = type(labels[0])
    assume(kind is float or len(set(labels)) > 1)
    rows = []
    for label in labels:
        columns = ("sentence1", "sentence2") if pair else ("sentence1",)
        row = {column: data.draw(texts) for column in columns} | {"label": label}
        assume(suffix != ".tsv" or not any(sign in str(row[name]) for name in columns for sign in "\t\r\n"))
        rows.append(row)
    found = load_task(folder(tmp_path / "mine", suffix, train=rows, validation=rows))
    assert found.task.text_columns == tuple(rows[0])[:-1]
    if kind is float:
        assert found.task.is_regression and found.task.metric == "spearman"
        expected = rows
    else:
        names = sorted(set(labels))
        assert found.task.label_names == tuple(map(str, names)) and found.task.metric == "accuracy"
        expected = [row | {"label": names.index(row["label"])} for row in rows]
    assert rows_of(found.train) == rows_of(found.validation) == expected


def test_parquet_stores_texts_and_labels_in_many_types(tmp_path):
    table = pa.table({"sentence1": ["a", "b", "a"], "label": ["positive", "negative", "positive"]})
    path = tmp_path / "sst2"
    path.mkdir()
    for column in ("sentence1", "label"):
        index = table.column_names.index(column)
        table = table.set_column(index, column, table[column].dictionary_encode())
    pq.write_table(table, path / "train.parquet")
    numbers = pa.table({"sentence1": pa.array(["a", "b"], pa.large_string()), "label": pa.array([1, 0], pa.uint8())})
    pq.write_table(numbers, path / "dev.parquet")
    assert raised(path).column == "label"  # names in train, numbers here
    (path / "dev.parquet").rename(path / "test.parquet")
    pq.write_table(table, path / "dev.parquet")
    (path / "test.parquet").unlink()
    data = load_task(path)
    assert rows_of(data.train) == single([("a", 1), ("b", 0), ("a", 1)])


# Malformed rows: file, line, column

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


# Labels


def test_of_many_class_names_an_error_shows_the_first(tmp_path):
    names = [f"class {k:02}" for k in range(30)]
    train = single([(f"text {k}", name) for k, name in enumerate(names)])
    error = raised(folder(tmp_path / "mine", train=train, dev=single([("a", "class 99")])))
    assert error.problem.endswith(": " + ", ".join(map(repr, names[:20])) + ", ...")


def test_class_names_of_a_registered_task(tmp_path):
    rows = single([("a", "positive"), ("b", "negative")])
    data = load_task(folder(tmp_path / "sst2", ".csv", train=rows, dev=rows[:1]))
    assert data.train["label"][:] == [1, 0] and data.validation["label"][:] == [1]


def test_a_name_the_task_does_not_have(tmp_path):
    rows = single([("a", "positive"), ("b", "Negative")])
    error = raised(folder(tmp_path / "sst2", train=rows, dev=rows))
    assert (error.line, error.column) == (2, "label")
    assert error.problem == "'Negative' is not among train's or the task's labels: 'negative', 'positive'"


def test_classes_named_by_an_unknown_task(tmp_path):
    rows = single([("a", "tiger"), ("b", "ant"), ("c", "ox")])
    data = load_task(folder(tmp_path / "animals", train=rows, dev=rows[1:]))
    assert data.task == Task("animals", ("sentence1",), ("ant", "ox", "tiger"), "accuracy", 128)
    assert data.train["label"][:] == [2, 0, 1] and data.validation["label"][:] == [0, 1]


@pytest.mark.parametrize(
    ("train", "dev", "file", "line", "problem"),
    [
        (
            ["ant", "ox"],
            ["ox", "bee"],
            "dev",
            2,
            "'bee' is not among train's or the task's labels: 'ant', 'ox'",
        ),
        ([0, 1], [1, 2], "dev", 2, "2 is not among train's or the task's labels: the integers 0..1"),
        ([0, 1], [1, 1.0], "dev", 2, "1.0 is not among"),
        ([0, 1], ["1"], "dev", 1, "'1' is not among"),
        (["0", "1"], [1], "dev", 1, "1 is not among"),
        ([0.5, 1], ["ox"], "dev", 1, "is 'ox'; expected a number"),
        ([0, 1, "2"], [0], "train", 3, "'2' is not a number, as the first row's is"),
        (["ant", "ox", 1.5], ["ox"], "train", 3, "1.5 is not a text, as the first row's is"),
        ([0, 2], [0], "train", 2, "2 is out of range; expected 2 classes numbered 0..1"),
        ([0, 1, -1], [0], "train", 3, "-1 is out of range; expected 3 classes numbered 0..2"),
        ([0.5, 1e39], [0], "train", 2, "out of range"),
    ],
)
def test_labels_of_an_unknown_task_are_of_one_kind_and_known_from_train(tmp_path, train, dev, file, line, problem):
    path = folder(tmp_path / "mine", **{
        name: single([(f"text {k}", label) for k, label in enumerate(found)])
        for name, found in (("train", train), ("dev", dev))
    })  # fmt: skip
    error = raised(path)
    assert (error.file, error.line, error.column) == (path / f"{file}.jsonl", line, "label")
    assert problem in error.problem


def test_one_class_is_no_task(tmp_path):
    with pytest.raises(ValueError, match="every label is 0; expected two classes or more"):
        load_task(folder(tmp_path / "mine", train=single([("a", 0), ("b", 0)]), dev=single([("a", 0)])))


def test_whole_numbers_among_scores(tmp_path):
    rows = single([("a", 1), ("b", 2.5)])
    data = load_task(folder(tmp_path / "mine", train=rows, dev=rows[:1]))
    assert data.task.is_regression and data.train["label"][:] == [1.0, 2.5]
    assert data.validation.features["label"] == datasets.Value("float32")


def test_a_second_sentence_in_some_rows_only(tmp_path):
    pair = {"sentence1": "a", "sentence2": "b", "label": 0}
    alone = {"sentence1": "a", "label": 1}
    error = raised(folder(tmp_path / "first", train=[pair, alone], dev=[pair]))
    assert (error.line, error.column) == (2, "sentence2")
    error = raised(folder(tmp_path / "second", train=[alone, pair], dev=[alone]))
    assert (error.line, error.column) == (2, "sentence2")


# Files and splits


def test_missing_split(tmp_path):
    path = folder(tmp_path / "sst2", train=single(SINGLE), valid=single(SINGLE))
    expected = r"no validation split: it holds train.jsonl, valid.jsonl, and none of validation.jsonl, .*dev.parquet"
    with pytest.raises(FileNotFoundError, match=expected):
        load_task(path)
    with pytest.raises(FileNotFoundError, match="no train split: it holds nothing"):
        (tmp_path / "empty").mkdir()
        load_task(tmp_path / "empty")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train.jsonl", "train.csv", "dev.csv"), "train split more than once: train.jsonl, train.csv"),
        (
            ("train.jsonl", "validation.tsv", "dev.tsv"),
            "validation split more than once: validation.tsv, dev.tsv",
        ),
    ],
)
def test_doubled_split(tmp_path, names, message):
    for name in names:
        write(tmp_path / name, single(SINGLE))
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path)


def test_neither_a_name_nor_a_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent is no file, no folder and no known task \(cola, sst2"):
        load_task(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="known task"):
        load_task("SST-2")


def test_unknown_kind_of_file(tmp_path):
    file = tmp_path / "sst2.xlsx"
    file.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"sst2.xlsx is not of a known kind.*\.jsonl, \.jsonl\.gz, \.csv"):
        load_task(file)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_file_is_divided_class_by_class(tmp_path, suffix):
    rows = single([(f"text {k}", 0 if k < 200 else 1) for k in range(230)])
    file = write(tmp_path / f"sst2{suffix}", rows)
    data = load_task(file)
    assert data.task is TASKS["sst2"] and data.test is None
    assert np.bincount(data.train["label"][:]).tolist() == [180, 27]
    assert np.bincount(data.validation["label"][:]).tolist() == [20, 3]
    assert sorted(data.train["sentence1"][:] + data.validation["sentence1"][:]) == sorted(r["sentence1"] for r in rows)
    assert rows_of(load_task(file).validation) == rows_of(data.validation)
    assert rows_of(load_task(file, seed=1).validation) != rows_of(data.validation)


def test_one_file_keeps_each_class_for_training(tmp_path):
    rows = single([("a", "x"), ("b", "y"), ("c", "y"), ("d", "z"), ("e", "z"), ("f", "z")])
    for seed in range(5):
        data = load_task(write(tmp_path / "mine.csv", rows), seed=seed)
        assert data.task.name == "mine"
        assert set(data.train["label"][:]) == {0, 1, 2} and sorted(data.validation["label"][:]) == [1, 2]


def test_one_file_of_scores(tmp_path):
    data = load_task(write(tmp_path / "mine.tsv", single([(f"text {k}", k / 8) for k in range(50)])))
    assert (len(data.train), len(data.validation)) == (45, 5)


def test_too_few_rows_to_divide(tmp_path):
    with pytest.raises(ValueError, match="train has too few rows"):
        load_task(write(tmp_path / "sst2.csv", single([("a", 0), ("b", 1)])))


def test_paths_may_be_relative_and_text(tmp_path, monkeypatch):
    folder(tmp_path / "sst2", train=single(SINGLE), dev=single(SINGLE))
    monkeypatch.chdir(tmp_path)
    assert load_task("./sst2").task is TASKS["sst2"]
    monkeypatch.chdir(tmp_path / "sst2")
    assert load_task(".").task is TASKS["sst2"]


def test_a_symbolic_links_own_name_counts(tmp_path):
    folder(tmp_path / "download", train=single(SINGLE), dev=single(SINGLE))
    (tmp_path / "sst2").symlink_to(tmp_path / "download")
    assert load_task(tmp_path / "sst2").task is TASKS["sst2"]


# Subsets


@pytest.fixture
def hundred(tmp_path):
    rows = single([(f"text {k}", k % 2) for k in range(100)])
    return folder(tmp_path / "sst2", train=rows, validation=rows[:50], test=rows[50:])


def test_subsets_are_the_same_every_time(hundred):
    data = load_task(hundred, max_train_examples=7, max_eval_examples=3)
    assert (len(data.train), len(data.validation), len(data.test)) == (7, 3, 3)
    order = np.random.RandomState(0).permutation(100)[:7]
    assert data.train["sentence1"][:] == [f"text {k}" for k in order]
    assert rows_of(load_task(hundred, max_train_examples=7).train) == rows_of(data.train)
    assert rows_of(load_task(hundred, max_train_examples=7, seed=1).train) != rows_of(data.train)


def test_smaller_subsets_are_part_of_larger_ones(hundred):
    larger = rows_of(load_task(hundred, max_train_examples=60).train)
    assert rows_of(load_task(hundred, max_train_examples=20).train) == larger[:20]


def test_more_than_there_are(hundred):
    data = load_task(hundred, max_train_examples=1000, max_eval_examples=1000)
    assert sorted(data.train["sentence1"][:]) == sorted(f"text {k}" for k in range(100))
    assert (len(data.validation), len(data.test)) == (50, 50)


def test_without_a_limit_files_keep_their_order(hundred):
    assert load_task(hundred, seed=5).train["sentence1"][:] == [f"text {k}" for k in range(100)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_train_examples": 0}, ValueError, "max_train_examples is 0; expected at least 1 or None"),
        ({"max_eval_examples": -3}, ValueError, "max_eval_examples is -3; expected at least 1 or None"),
        ({"max_train_examples": 1.5}, TypeError, "max_train_examples is 1.5; expected an integer"),
        ({"max_eval_examples": True}, TypeError, "max_eval_examples is True; expected an integer"),
        ({"seed": -1}, ValueError, "expected from 0 to 2"),
        ({"seed": 2**32}, ValueError, "expected from 0 to 2"),
        ({"seed": "x"}, TypeError, "seed is 'x'; expected an integer"),
    ],
)
def test_options_that_make_no_sense(hundred, options, error, message):
    with pytest.raises(error, match=message):
        load_task(hundred, **options)


def test_the_same_data_has_the_same_fingerprint(hundred):
    first, second = (load_task(hundred, max_train_examples=50).train for _ in range(2))
    assert first._fingerprint == second._fingerprint


# Named tasks


def test_docstrings():
    data = load_task("docstrings", max_train_examples=500)
    assert data.task is TASKS["docstrings"] and data.test is None
    assert (len(data.train), len(data.validation)) == (500, 720)
    assert set(data.train["label"][:]) == set(range(8))
    assert data.train.features == {"sentence1": datasets.Value("string"), "label": datasets.Value("int64")}


def hub(monkeypatch, expected, splits):
    def load_dataset(*arguments):
        assert arguments == expected
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def hub_split(rows, names=None, **types):
    label = datasets.ClassLabel(names=names) if names else datasets.Value("float32")
    return datasets.Dataset.from_list(rows, features=datasets.Features(
        {name: label if name == "label" else datasets.Value(types.get(name, "string")) for name in rows[0]}
    ))  # fmt: skip


def test_hub_columns_and_splits(monkeypatch):
    names = ["entailment", "neutral", "contradiction"]
    row = {"idx": 0, "label": 2, "hypothesis": "h", "premise": "p"}
    train = hub_split([row] * 3, names, idx="int32")
    matched = hub_split([row | {"premise": "matched"}], names, idx="int32")
    unlabelled = hub_split([row | {"label": -1}], names, idx="int32")
    splits = {"train": train, "validation_matched": matched, "validation_mismatched": train}
    hub(monkeypatch, ("nyu-mll/glue", "mnli"), splits | {"test_matched": unlabelled})
    data = load_task("mnli")
    assert data.task is TASKS["mnli"] and data.test is None
    assert data.validation[0] == {"sentence1": "matched", "sentence2": "h", "label": 2}
    assert data.train.features["label"] == datasets.Value("int64") and len(data.train) == 3


def test_hub_without_validation(monkeypatch):
    rows = [{"text": f"text {k}", "label": k % 2} for k in range(40)]
    split = hub_split(rows, ["neg", "pos"])
    hub(monkeypatch, ("stanfordnlp/imdb", None), {"train": split, "test": split, "unsupervised": split})
    data = load_task("imdb", max_eval_examples=3)
    assert (len(data.train), len(data.validation), len(data.test)) == (36, 3, 3)
    assert not {*data.train["sentence1"][:]} & {*data.validation["sentence1"][:]}


def test_hub_scores(monkeypatch):
    rows = [{"sentence1": "a", "sentence2": "b", "label": score} for score in (0.0, 5.0)]
    hub(monkeypatch, ("nyu-mll/glue", "stsb"), {"train": hub_split(rows), "validation": hub_split(rows)})
    assert load_task("stsb").train["label"][:] == [0.0, 5.0]
    hub(monkeypatch, ("nyu-mll/glue", "stsb"), {"train": hub_split(rows[:1] + [rows[0] | {"label": -1.0}])})
    with pytest.raises(ValueError, match=r"nyu-mll/glue has labels outside 0.0..5.0"):
        load_task("stsb")


def test_hub_labels_that_are_not_the_tasks(monkeypatch):
    rows = [{"sentence": "a", "label": 0}, {"sentence": "b", "label": 1}]
    hub(monkeypatch, ("nyu-mll/glue", "sst2"), {"train": hub_split(rows, ["positive", "negative"])})
    with pytest.raises(ValueError, match=r"has labels \['positive', 'negative'\]; task 'sst2' has"):
        load_task("sst2")
    rows[1]["label"] = -1
    hub(monkeypatch, ("nyu-mll/glue", "sst2"), {"train": hub_split(rows, ["negative", "positive"])})
    with pytest.raises(ValueError, match="labels outside 0..1 in a split of task 'sst2'"):
        load_task("sst2")


def test_without_a_network_the_error_says_what_to_do(monkeypatch):
    def load_dataset(*arguments):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    expected = r"'rte' could not be fetched.*Couldn't reach.*local folder './rte'.*sentence1, sentence2, label"
    with pytest.raises(ConnectionError, match=expected) as caught:
        load_task("rte")
    assert caught.value.__cause__ is not None


# Tokenizing


@pytest.fixture
def tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "a"]
    core = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"], model_max_length=12,
    )  # fmt: skip


SST2, STSB = TASKS["sst2"], TASKS["stsb"]
CLASSES = datasets.Dataset.from_list(single([("a good film", 1), ("bad", 0)]))


def test_tokenized_columns(tokenizer):
    found = tokenize(CLASSES, tokenizer, SST2)
    assert set(found.column_names) == {"input_ids", "attention_mask", "token_type_ids", "labels", "length"}
    assert found["input_ids"][:] == [[2, 7, 4, 6, 3], [2, 5, 3]]
    assert found["attention_mask"][:] == [[1] * 5, [1] * 3]
    assert found["length"][:] == [5, 3]
    assert found["labels"][:] == [1, 0] and found.features["labels"] == datasets.Value("int64")


def test_pairs_are_tokenized_together(tokenizer):
    rows = datasets.Dataset.from_list([{"sentence1": "a film", "sentence2": "bad", "label": 2.5, "genre": "x"}])
    found = tokenize(rows, tokenizer, STSB)
    assert found[0] == {
        "input_ids": [2, 7, 6, 3, 5, 3], "token_type_ids": [0, 0, 0, 0, 1, 1], "attention_mask": [1] * 6,
        "labels": 2.5, "length": 6,
    }  # fmt: skip
    assert found.features["labels"] == datasets.Value("float32")


def test_labels_of_other_types_are_cast(tokenizer):
    small = CLASSES.cast_column("label", datasets.ClassLabel(names=["negative", "positive"]))
    assert tokenize(small, tokenizer, SST2).features["labels"] == datasets.Value("int64")


def test_texts_are_cut(tokenizer):
    long = datasets.Dataset.from_list(single([("good " * 40, 1)]))
    assert tokenize(long, tokenizer, SST2)["length"][:] == [12]  # the tokenizer's, less than the task's 64
    assert tokenize(long, tokenizer, SST2, max_length=6)["input_ids"][:] == [[2, 4, 4, 4, 4, 3]]
    tokenizer.model_max_length = 512
    assert tokenize(long, tokenizer, Task("t", ("sentence1",), ("a", "b"), "accuracy", 9))["length"][:] == [9]
    pair = datasets.Dataset.from_list([{"sentence1": "good " * 40, "sentence2": "bad", "label": 1.0}])
    assert tokenize(pair, tokenizer, STSB, max_length=8)["input_ids"][:] == [[2, 4, 4, 4, 4, 3, 5, 3]]


def test_a_tokenizer_without_token_types(tokenizer):
    tokenizer.model_input_names = ["input_ids"]
    found = tokenize(CLASSES, tokenizer, SST2)
    assert set(found.column_names) == {"input_ids", "attention_mask", "labels", "length"}


def test_tokenizing_again_has_the_same_fingerprint(tokenizer):
    fingerprints = [tokenize(CLASSES, tokenizer, SST2)._fingerprint for _ in range(2)]
    tokenizer("something else", padding="max_length", truncation=True, max_length=3)
    fingerprints.append(tokenize(CLASSES, tokenizer, SST2)._fingerprint)
    assert len(set(fingerprints)) == 1
    assert tokenize(CLASSES, tokenizer, SST2, max_length=4)._fingerprint != fingerprints[0]


def test_what_cannot_be_tokenized(tokenizer):
    with pytest.raises(ValueError, match=r"lacks the columns \['sentence2'\] of task 'stsb'; it has"):
        tokenize(CLASSES, tokenizer, STSB)
    with pytest.raises(ValueError, match=r"lacks the columns \['label'\]"):
        tokenize(CLASSES.remove_columns("label"), tokenizer, SST2)
    with pytest.raises(ValueError, match="dataset has no rows; expected one or more"):
        tokenize(CLASSES.select([]), tokenizer, SST2)
    for length in (0, 13):
        with pytest.raises(ValueError, match=f"max_length is {length}; expected from 1 to the tokenizer's 12"):
            tokenize(CLASSES, tokenizer, SST2, max_length=length)
    with pytest.raises(TypeError, match="max_length is 6.0; expected an integer"):
        tokenize(CLASSES, tokenizer, SST2, max_length=6.0)


def test_trainer_groups_batches_by_length_and_pads_them(tokenizer, tmp_path):
    lengths = random.Random(0)
    rows = datasets.Dataset.from_list(single([("good " * lengths.randint(1, 10), k % 2) for k in range(256)]))
    train = tokenize(rows, tokenizer, SST2)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(vocab_size=8, **sizes))

    def padding(strategy):
        options = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=8, train_sampling_strategy=strategy,
            use_cpu=True, report_to="none",
        )  # fmt: skip
        trainer = Trainer(model, options, train_dataset=train, processing_class=tokenizer)
        batches = list(trainer.get_train_dataloader())
        assert sum(int(batch["attention_mask"].sum()) for batch in batches) == sum(train["length"])
        assert {str(batch["labels"].dtype) for batch in batches} == {"torch.int64"}
        return sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)

    assert padding("group_by_length") < 0.2 * padding("random")


# Several labels an example


def several(labels):
    return [{"sentence1": f"text {k}", "label": label} for k, label in enumerate(labels)]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("labels", [[["joy", "fear"], [], ["anger"], ["fear"]], [[2, 1], [], [0], [1]]])
def test_lists_are_several_labels(tmp_path, suffix, labels):
    rows = several(labels)
    for split in ("train", "validation"):
        if suffix == ".parquet":
            tmp_path.mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
        else:
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_task(tmp_path)
    assert data.task.multi_label and data.task.metric == "f1_micro"
    assert data.task.label_names == (("anger", "fear", "joy") if labels[0][0] == "joy" else ("0", "1", "2"))
    assert data.train["label"][:] == [[0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0]]
    tokenized = tokenize(data.train, tiny.tokenizer(), data.task)
    assert tokenized["labels"][:] == data.train["label"][:]


@pytest.mark.parametrize(
    "labels, problem",
    [
        ([["a"], "b"], "'b' is not a list, as the first row's is"),
        (["a", ["b"]], "['b'] is not one label, as the first row's is"),
        ([["a"], [1]], "1 is not a text, as the first row's is"),
        ([["a", 1.5]], "has 1.5; expected texts or integers"),
        ([[["a"]]], "has ['a']; expected texts or integers"),
        ([[0], [2]], "2 is out of range; expected 2 classes numbered 0..1"),
        ([[], []], "no row has a label; expected two classes or more"),
    ],
)
def test_lists_that_are_no_labels(tmp_path, labels, problem):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in several(labels)))
    with pytest.raises(ValueError, match=re.escape(problem)):
        load_task(tmp_path)
