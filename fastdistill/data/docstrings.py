"""A text-classification corpus that every Python carries: sentences of the standard library's docstrings.

Each sentence is labelled by the part of the library it documents. `build` parses the source files and imports
none of them.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TOPICS: dict[str, tuple[str, ...]] = {
    "concurrency": (
        "asyncio", "concurrent", "contextlib", "multiprocessing", "queue", "sched", "selectors", "signal",
        "subprocess", "threading",
    ),
    "data formats": (
        "base64", "codecs", "csv", "encodings", "json", "pickle", "pickletools", "plistlib", "quopri",
        "shelve", "tomllib", "xml",
    ),
    "files": (
        "_pyio", "bz2", "filecmp", "fileinput", "fnmatch", "genericpath", "glob", "gzip", "linecache", "lzma",
        "ntpath", "os", "pathlib", "posixpath", "shutil", "stat", "tarfile", "tempfile", "zipfile",
    ),
    "language": (
        "abc", "ast", "dis", "importlib", "inspect", "modulefinder", "pkgutil", "pyclbr", "runpy", "symtable",
        "tokenize", "types", "typing", "zipimport",
    ),
    "mail": ("email", "imaplib", "mailbox", "mimetypes", "netrc", "poplib", "smtplib"),
    "numbers and dates": (
        "_pydatetime", "_pydecimal", "_strptime", "bisect", "calendar", "colorsys", "datetime", "fractions",
        "heapq", "numbers", "random", "statistics",
    ),
    "testing": (
        "bdb", "cProfile", "code", "codeop", "doctest", "pdb", "profile", "pstats", "pydoc", "timeit",
        "trace", "traceback", "tracemalloc", "unittest",
    ),
    "web": (
        "ftplib", "html", "http", "socket", "socketserver", "ssl", "urllib", "webbrowser", "wsgiref",
        "xmlrpc",
    ),
}  # fmt: skip
"""Label name -> the packages and modules it is made of. A label's number is its place here."""

LABEL_NAMES = tuple(TOPICS)
TRAIN_PER_LABEL = 480
VALIDATION_PER_LABEL = 90

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_SENTENCE_BREAK = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_NOT_PROSE = re.compile(r"\.\.\.|::|==|->|--|__|\*\*|[|{}<>=\\^~]|\s[-*+]\s|\bXXX\b")
_WORD = re.compile(r"[(\"'`*]*[A-Za-z][A-Za-z'/-]*[)\"'`*.,;:!?]*")


class Sentence(NamedTuple):
    """One example: its text, its label's number, and the source file it comes from ("email/header.py")."""

    text: str
    label: int
    module: str


def build(seed: int = 0, stdlib: str | Path | None = None) -> dict[str, list[Sentence]]:
    """Make the corpus: {"train": 480 sentences of each label, "validation": 90 of each}, shuffled.

    A sentence is one line of 4 to 60 words, most of them plain words, from a capital to a full stop (or ! or
    ?); doctests, tables and code are left out. It is kept once, and not at all where two labels have it. No
    source file gives sentences to both splits: files go to validation in the order of their names' SHA-256
    until it has enough, so the division depends neither on `seed` nor on the machine. `seed` chooses among
    spare sentences and orders them. The same Python version and seed give the same corpus.

    stdlib: the standard library's folder; by default that of the running Python.
    Raises FileNotFoundError, naming the label, where the folder has too few sources (a Python installed
    without the library's .py files, or with packages split off).
    """
    folder = Path(stdlib if stdlib is not None else sysconfig.get_path("stdlib"))
    corpus: dict[str, list[Sentence]] = {"train": [], "validation": []}
    rng = random.Random(seed)
    for label, by_module in enumerate(_distinct([_read(folder, names) for names in TOPICS.values()])):
        held_out = _validation_modules(by_module)
        for split, size in (("train", TRAIN_PER_LABEL), ("validation", VALIDATION_PER_LABEL)):
            found = [
                Sentence(text, label, module)
                for module, texts in by_module.items()
                if (module in held_out) == (split == "validation")
                for text in texts
            ]
            if len(found) < size:
                raise FileNotFoundError(
                    f"the docstring corpus needs {size} {split} sentences for {LABEL_NAMES[label]!r}, and "
                    f"{folder} has {len(found)}: sources are missing among "
                    f"{', '.join(TOPICS[LABEL_NAMES[label]])}; use a full Python installation, or give "
                    "load_task a folder of your own data"
                )
            corpus[split] += rng.sample(found, size)
    for rows in corpus.values():
        rng.shuffle(rows)
    return corpus


def _read(folder: Path, names: tuple[str, ...]) -> dict[str, list[str]]:
    """Source file -> its sentences, over the modules `folder/name.py` and packages `folder/name/`."""
    files = [file for name in names for file in (folder / f"{name}.py", *sorted((folder / name).rglob("*.py")))]
    return {
        file.relative_to(folder).as_posix(): list(_sentences(file))
        for file in files
        if file.is_file() and not {"test", "tests"} & set(file.relative_to(folder).parts)
    }


def _sentences(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_bytes())):
        docstring = ast.get_docstring(node) if isinstance(node, _DOCUMENTED) else None
        for paragraph in re.split(r"\n\s*\n", docstring or ""):
            if ">>>" not in paragraph:
                yield from filter(_is_prose, _SENTENCE_BREAK.split(" ".join(paragraph.split())))


def _is_prose(sentence: str) -> bool:
    words = sentence.split()
    return (
        4 <= len(words) <= 60
        and sentence[0].isupper()
        and sentence[-1] in ".!?"
        and _NOT_PROSE.search(sentence) is None
        and sum(_WORD.fullmatch(word) is not None for word in words) >= 0.8 * len(words)
    )


def _distinct(topics: list[dict[str, list[str]]]) -> list[dict[str, list[str]]]:
    """Keep a text's first occurrence, ignoring case; drop it altogether where more than one topic has it."""
    owners: defaultdict[str, set[int]] = defaultdict(set)
    for topic, by_module in enumerate(topics):
        for texts in by_module.values():
            for text in texts:
                owners[text.casefold()].add(topic)
    unseen = {text for text, topics_of_text in owners.items() if len(topics_of_text) == 1}

    def take(text: str) -> bool:
        fresh = text.casefold() in unseen
        unseen.discard(text.casefold())
        return fresh

    return [{module: [t for t in texts if take(t)] for module, texts in topic.items()} for topic in topics]


def _validation_modules(by_module: dict[str, list[str]]) -> set[str]:
    """Modules that hold VALIDATION_PER_LABEL sentences together. None brings more than two thirds of them, so
    that several modules are judged on and the large ones stay for training."""
    chosen: set[str] = set()
    total = 0
    for module in sorted(by_module, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if total < VALIDATION_PER_LABEL and len(by_module[module]) <= VALIDATION_PER_LABEL * 2 // 3:
            chosen.add(module)
            total += len(by_module[module])
    return chosen
