import collections
import hashlib
import json
import re
import subprocess
import sys

import pytest

from fastdistill.data import docstrings
from fastdistill.data.docstrings import LABEL_NAMES, TOPICS, TRAIN_PER_LABEL, VALIDATION_PER_LABEL, build


@pytest.fixture(scope="module")
def corpus():
    return build()


def test_every_label_has_as_many_sentences(corpus):
    assert len(LABEL_NAMES) == 8
    for split, size in (("train", TRAIN_PER_LABEL), ("validation", VALIDATION_PER_LABEL)):
        assert collections.Counter(row.label for row in corpus[split]) == dict.fromkeys(range(8), size)
    assert 3000 <= len(corpus["train"]) <= 4500 and 500 <= len(corpus["validation"]) <= 900


def test_no_module_and_no_text_is_on_both_sides(corpus):
    train, validation = ({row.module for row in corpus[split]} for split in ("train", "validation"))
    assert not train & validation
    texts = [row.text.casefold() for rows in corpus.values() for row in rows]
    assert len(set(texts)) == len(texts)


def test_every_label_is_judged_on_several_modules(corpus):
    for label in range(8):
        assert len({row.module for row in corpus["validation"] if row.label == label}) >= 2


def test_labels_are_the_packages_sentences_come_from(corpus):
    for rows in corpus.values():
        for row in rows:
            assert re.split(r"[/.]", row.module)[0] in TOPICS[LABEL_NAMES[row.label]]
            assert "test" not in row.module.split("/") and "tests" not in row.module.split("/")


def test_sentences_are_clean(corpus):
    for rows in corpus.values():
        for row in rows:
            assert 4 <= len(row.text.split()) <= 60
            assert " ".join(row.text.split()) == row.text
            assert row.text[0].isupper() and row.text[-1] in ".!?"
            assert not any(sign in row.text for sign in (">>>", "...", "::", "|", "->", "=="))


def test_splits_are_shuffled(corpus):
    for rows in corpus.values():
        assert len({row.label for row in rows[:40]}) == 8


def digest(corpus):
    return hashlib.sha256(json.dumps(corpus).encode()).hexdigest()


@pytest.mark.slow
def test_another_process_makes_the_same_corpus_and_imports_nothing_for_it(corpus):
    script = """
import hashlib, importlib.util, json, sys
spec = importlib.util.spec_from_file_location("docstrings", sys.argv[1])
sys.modules["docstrings"] = docstrings = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docstrings)
print(hashlib.sha256(json.dumps(docstrings.build()).encode()).hexdigest())
print([name for name in ("asyncio", "mailbox", "statistics", "wsgiref", "xml.sax") if name in sys.modules])
"""
    command = [sys.executable, "-I", "-W", "error", "-c", script, docstrings.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == [digest(corpus), "[]"]


def test_it_can_be_learnt_but_not_by_words_alone(corpus):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB

    vectorizer = CountVectorizer()
    train = vectorizer.fit_transform([row.text for row in corpus["train"]])
    model = MultinomialNB().fit(train, [row.label for row in corpus["train"]])
    validation = vectorizer.transform([row.text for row in corpus["validation"]])
    assert 0.35 < model.score(validation, [row.label for row in corpus["validation"]]) < 0.8


# A small library: for every topic three modules of one sentence, of which two go to validation


@pytest.fixture
def library(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings, "TRAIN_PER_LABEL", 1)
    monkeypatch.setattr(docstrings, "VALIDATION_PER_LABEL", 2)  # two thirds of it: modules of one sentence
    for topic, names in TOPICS.items():
        for k, name in enumerate(names[:3]):
            (tmp_path / f"{name}.py").write_text(f'"""This sentence is about {topic} {"abc"[k] * 4}."""\n')
    return tmp_path


def test_another_folder(library):
    corpus = build(stdlib=library)
    assert {split: len(rows) for split, rows in corpus.items()} == {"train": 8, "validation": 16}
    assert build(stdlib=str(library)) == corpus


def test_the_seed_orders_but_does_not_divide(library):
    first, other = build(seed=0, stdlib=library), build(seed=1, stdlib=library)
    assert first != other
    assert {split: set(rows) for split, rows in first.items()} == {split: set(rows) for split, rows in other.items()}


def test_a_sentence_of_two_labels_is_dropped(library):
    both = '"""A sentence that is found twice."""\n'
    (library / "poplib.py").write_text(both)
    (library / "xmlrpc.py").write_text(both.upper())
    with_both = docstrings._distinct(
        [docstrings._read(library, ("poplib", "imaplib")), docstrings._read(library, ("xmlrpc",))]
    )
    assert with_both == [
        {"poplib.py": [], "imaplib.py": ["This sentence is about mail bbbb."]},
        {"xmlrpc.py": []},
    ]


def test_a_repeated_sentence_is_kept_once(library):
    (library / "poplib.py").write_text('"""This sentence is about MAIL bbbb."""\n')
    found = docstrings._distinct([docstrings._read(library, ("imaplib", "poplib"))])
    assert found == [{"imaplib.py": ["This sentence is about mail bbbb."], "poplib.py": []}]


def test_packages_are_read_whole_without_their_tests(tmp_path):
    for file in ("json/__init__.py", "json/deep/er.py", "json/tests/a.py", "json/test/b.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(f'"""A sentence to be read {len(file)}."""\n')
    assert list(docstrings._read(tmp_path, ("json", "absent"))) == ["json/__init__.py", "json/deep/er.py"]


def test_sentences_of_every_kind_of_docstring(tmp_path):
    too_long = " ".join(["Sixty"] + ["words"] * 60)
    source = f'''
"""The module has its own
docstring.  It has two sentences!

Too short.

no capital begins this one.
"""

class A:
    """The class has one, too."""

    def method(self):
        """Does a method count?  Yes, it does count.

        >>> The prompt hides its whole paragraph.
        This is in it as well.

        ====  A table  ====
        A row | of the table is no prose.

        Values such as 3.14 and x[1] + y[2] * 9 / 7 are code.
        """

    async def coroutine(self):
        """{too_long}."""

"This is a string and no docstring."
# This is a comment and no docstring.
'''
    (tmp_path / "code.py").write_text(source)
    assert list(docstrings._sentences(tmp_path / "code.py")) == [
        "The module has its own docstring.",
        "It has two sentences!",
        "The class has one, too.",
        "Does a method count?",
        "Yes, it does count.",
    ]


def test_missing_sources_are_named(library):
    for name in TOPICS["mail"]:
        (library / f"{name}.py").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match=r"1 train sentences for 'mail'.* has 0: .*mailbox.*load_task"):
        build(stdlib=library)


def test_a_library_without_sources_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="'concurrency'"):
        build(stdlib=tmp_path)
