"""Aspect terms: rows that say where they begin, words, distances and batches."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from fastdistill.data.aspects import AspectCollator, measured, tree_distances, word_tokenizer
from fastdistill.data.load import load_task
from fastdistill.data.parsing import Parser, heads
from fastdistill.data.rows import RowError
from tests.data.written import SUFFIXES, folder, write

FOOD = "great food but the service was dreadful !"
ROWS = [
    {"sentence1": FOOD, "sentence2": "food", "start": 6, "label": 2},
    {"sentence1": FOOD, "sentence2": "service", "start": 19, "label": 0},
    {"sentence1": "It's the battery life I couldn't stand.", "sentence2": "battery life", "start": 9, "label": 1},
    {"sentence1": "meh", "sentence2": "meh", "start": 0, "label": 1},
] * 3
FOOD_HEADS = [1, 5, 1, 4, 5, 5, 5, 5]
"""Of spaCy's en_core_web_sm 3.8."""


def load(path: Path, **options: Any) -> Any:
    return load_task(path, aspects=True, **options)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_say_where_their_aspect_begins(tmp_path: Path, suffix: str) -> None:
    data = load(folder(tmp_path / "mine", suffix, train=ROWS, validation=ROWS[:4], test=ROWS[:2]))
    columns = ("sentence1", "sentence2", "start", "label")
    for split, rows in ((data.train, ROWS), (data.validation, ROWS[:4]), (data.test, ROWS[:2])):
        assert [{name: row[name] for name in columns} for row in split] == rows
    plain = load_task(tmp_path / "mine")
    assert set(plain.train.column_names) == {"sentence1", "sentence2", "label"}


def test_aspects_of_a_sentence_are_in_one_split(tmp_path: Path) -> None:
    words = [f"food service {place}" for place in range(100)]
    rows = [
        {"sentence1": text, "sentence2": aspect, "start": start, "label": (place + start) % 2}
        for place, text in enumerate(words)
        for aspect, start in (("food", 0), ("service", 5))
    ]
    data = load(folder(tmp_path / "mine", train=rows, test=rows[:1]))
    assert (len(data.train), len(data.validation)) == (180, 20)
    assert set(data.train["sentence1"]).isdisjoint(data.validation["sentence1"])


def test_a_tenth_of_train_validates_where_there_is_test_alone(tmp_path: Path) -> None:
    data = load(folder(tmp_path / "mine", train=ROWS, test=ROWS[:2]))
    assert (len(data.train), len(data.validation), len(data.test)) == (9, 3, 2)
    assert set(data.train["sentence1"]).isdisjoint(data.validation["sentence1"])
    (tmp_path / "mine" / "test.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="has no validation split"):
        load(tmp_path / "mine")


@pytest.mark.parametrize(
    "change, column, problem",
    [
        ({"start": 7}, "start", "is 7; expected the character of sentence1 where 'service' begins"),
        ({"start": -21}, "start", "is -21; expected the character"),
        ({"start": 10**9}, "start", "is 1000000000; expected the character"),
        ({"start": "19"}, "start", "is '19'; expected an integer"),
        ({"start": 19.0}, "start", "is 19.0; expected an integer"),
        ({"start": True}, "start", "is True; expected an integer"),
        ({"start": None}, "start", "is missing; the columns are"),
        ({"sentence2": None}, "sentence2", "is missing; the columns are"),
        ({"sentence2": " "}, "sentence2", "expected a text that is not empty"),
    ],
)
def test_a_bad_row_is_an_error_that_names_it(tmp_path: Path, change: dict[str, Any], column: str, problem: str) -> None:
    changed = {name: value for name, value in (ROWS[1] | change).items() if value is not None}
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[0], changed)))
    with pytest.raises(RowError) as caught:
        load(file)
    assert (caught.value.line, caught.value.column) == (2, column)
    assert problem in str(caught.value)


def test_tasks_by_name_have_no_aspects() -> None:
    with pytest.raises(ValueError, match="docstrings is a task without aspects; expected a folder or file"):
        load("docstrings")  # type: ignore[arg-type]


def test_words_are_those_of_the_penn_treebank_nearly() -> None:
    texts = ["It's the Battery-life I couldn't stand: 3.5h!", "they could n't", "[PAD] é İ 中文"]
    tokenizer = word_tokenizer(texts)
    assert [tokenizer.tokenize(text) for text in texts] == [
        ["it", "'s", "the", "battery", "-", "life", "i", "could", "n't", "stand", ":", "3", ".", "5h", "!"],
        ["they", "could", "n't"],
        ["[PAD]", "é", "i̇", "中文"] if tokenizer.tokenize("[PAD]") == ["[PAD]"] else [],
    ]
    assert tokenizer("unheard-of", add_special_tokens=False)["input_ids"][0] == tokenizer.unk_token_id == 1
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    assert words[:2] == ["[PAD]", "[UNK]"] and words[2:] == sorted(words[2:])


def test_the_tokenizer_is_the_same_when_it_is_loaded(tmp_path: Path) -> None:
    tokenizer = word_tokenizer([FOOD])
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded("The FOOD wasn't!")["input_ids"] == tokenizer("The FOOD wasn't!")["input_ids"]


def test_distances_are_in_words_from_the_nearest_of_the_aspect(tmp_path: Path) -> None:
    data = load(folder(tmp_path / "mine", train=ROWS, validation=ROWS)).train
    tokenizer = word_tokenizer(data["sentence1"][:])
    found = measured(data, tokenizer)
    assert found["position_distance"][0] == [1, 0, 1, 2, 3, 4, 5, 6]
    assert found["position_distance"][1] == [4, 3, 2, 1, 0, 1, 2, 3]
    assert found["position_distance"][2] == [3, 2, 1, 0, 0, 1, 2, 3, 4, 5]
    assert found["position_distance"][3] == [0]
    assert found["labels"][:4] == [2, 0, 1, 1] and found["length"][:4] == [8, 8, 10, 1]
    assert tokenizer.convert_ids_to_tokens(found["input_ids"][2])[:5] == ["it", "'s", "the", "battery", "life"]


def test_an_aspect_is_every_word_that_it_touches(tmp_path: Path) -> None:
    row = {"sentence1": "a blue-ish screen", "sentence2": "lue-i", "start": 3}
    rows = [row | {"label": 0}, row | {"label": 1}] * 2
    data = load(folder(tmp_path / "mine", train=rows, validation=rows)).train
    assert measured(data, word_tokenizer(data["sentence1"][:]))["position_distance"][0] == [1, 0, 0, 0, 1]


def test_distances_in_the_tree() -> None:
    """dreadful is as near to service as to food; but by position it is two and five words away."""
    assert tree_distances(FOOD_HEADS, [1]) == [1, 0, 1, 3, 2, 1, 2, 2]
    assert tree_distances(FOOD_HEADS, [4]) == [3, 2, 3, 1, 0, 1, 2, 2]
    assert tree_distances(FOOD_HEADS, [1, 4]) == [1, 0, 1, 1, 0, 1, 2, 2]
    assert tree_distances([0, 0, 3, 3, 3], [1]) == [1, 0, 2.5, 2.5, 2.5]
    assert tree_distances([0], [0]) == [0]


def test_a_long_chain_of_words() -> None:
    assert tree_distances([0, *range(4999)], [4999])[0] == 4999


def test_distances_come_from_a_parsed_document(tmp_path: Path) -> None:
    """spaCy's own, with heads that are given."""
    tokens = pytest.importorskip("spacy.tokens")
    vocabulary = pytest.importorskip("spacy.vocab").Vocab()

    def parser(text: str, offsets: Any) -> list[int]:
        words = [text[first:last] for first, last in offsets]
        return heads(tokens.Doc(vocabulary, words=words, heads=FOOD_HEADS, deps=["dep"] * len(words)))

    data = load(folder(tmp_path / "mine", train=ROWS, validation=ROWS)).train.select([0, 1])
    found = measured(data, word_tokenizer([FOOD]), parser)  # type: ignore[arg-type]
    assert found["dependency_distance"][:] == [[1, 0, 1, 3, 2, 1, 2, 2], [3, 2, 3, 1, 0, 1, 2, 2]]
    assert found["position_distance"][0] == [1, 0, 1, 2, 3, 4, 5, 6]


def pipeline_folder(path: Path) -> Path:
    """A pipeline whose parser has learned one sentence."""
    spacy = pytest.importorskip("spacy")
    from spacy.training import Example

    pipeline = spacy.blank("en")
    pipeline.add_pipe("parser", config={"min_action_freq": 1})
    labels = ["ROOT" if head == place else "dep" for place, head in enumerate(FOOD_HEADS)]
    example = Example.from_dict(pipeline.make_doc(FOOD), {"heads": FOOD_HEADS, "deps": labels})
    pipeline.initialize(lambda: [example])
    for _ in range(30):
        pipeline.update([example])
    pipeline.to_disk(path)
    return path


def test_a_pipeline_of_spacy_parses_the_words_that_models_see(tmp_path: Path) -> None:
    parser = Parser(str(pipeline_folder(tmp_path / "pipeline")))
    offsets = word_tokenizer([FOOD])(FOOD, return_offsets_mapping=True)["offset_mapping"]
    assert parser(FOOD, offsets) == FOOD_HEADS
    parts = [(0, 3), (3, 6), (6, 10)]  # which spaCy's tokenizer would not make
    assert len(parser("batteryish", parts)) == 3


def test_what_is_no_parser_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spacy = pytest.importorskip("spacy")
    with pytest.raises(ValueError, match="--parser is nowhere, which spaCy does not load"):
        Parser("nowhere")
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(ValueError, match="a pipeline of nothing; expected one with a dependency parser"):
        Parser(str(tmp_path / "blank"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"fastdistill\[dependency\]"):
        Parser("nowhere")


def test_heads_are_places() -> None:
    token = SimpleNamespace(i=0)
    token.head = token
    assert heads([token, SimpleNamespace(i=1, head=token)]) == [0, 0]


def test_a_batch_is_padded_on_the_right() -> None:
    rows = [
        {"input_ids": [4, 5, 6], "position_distance": [1.0, 0.0, 1.0], "labels": 2, "length": 3},
        {"input_ids": [7], "position_distance": [0.0], "labels": 0, "length": 1},
    ]
    batch = AspectCollator()(rows)
    assert batch["input_ids"].tolist() == [[4, 5, 6], [7, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["position_distance"].tolist() == [[1, 0, 1], [0, 0, 0]]
    assert batch["position_distance"].dtype == torch.float32
    assert batch["labels"].tolist() == [2, 0]


def test_other_suffixes_than_jsonl_are_read_alike(tmp_path: Path) -> None:
    """csv's and tsv's numbers are texts."""
    write(tmp_path / "mine.csv", [ROWS[0] | {"start": "six"}, ROWS[1]])
    with pytest.raises(RowError, match="line 2, column 'start': is 'six'; expected an integer"):
        load(tmp_path / "mine.csv")
