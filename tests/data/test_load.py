import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fastdistill.data.load import load_task
from fastdistill.data.tasks import TASKS, Task
from tests.data.written import SINGLE, SUFFIXES, folder, raised, rows_of, single, write

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
