"""Dependency trees of sentences, by a pipeline of spaCy."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

Offsets = Sequence[tuple[int, int]]
"""Of words: the first character of each, and the one after its last."""

NOT_NEEDED = ["ner", "lemmatizer", "attribute_ruler"]
"""Parts of a pipeline that the tree does not depend on."""


class Parser:
    """Gives heads to words that are divided already, so that trees are of the words that models see.

    Args:
        name: of an installed pipeline of spaCy (``en_core_web_sm``), or its folder, that has a dependency parser.

    Raises ImportError without spaCy, and ValueError for what is no such pipeline.
    """

    def __init__(self, name: str) -> None:
        if importlib.util.find_spec("spacy") is None:
            raise ImportError("--parser needs spaCy, which an extra brings: pip install 'fastdistill[dependency]'")
        import spacy

        try:
            self.pipeline: Any = spacy.load(name, exclude=NOT_NEEDED)
        except (OSError, ValueError) as error:
            told = " ".join(str(error).split())
            raise ValueError(f"--parser is {name}, which spaCy does not load: {told}") from error
        if "parser" not in self.pipeline.pipe_names:
            parts = ", ".join(self.pipeline.pipe_names) or "nothing"
            raise ValueError(f"--parser is {name}, a pipeline of {parts}; expected one with a dependency parser")

    def __call__(self, text: str, offsets: Offsets) -> list[int]:
        """The place of each word's head; a root's is its own."""
        from spacy.tokens import Doc

        words = [text[first:last] for first, last in offsets]
        spaces = [last < after for (_, last), (after, _) in zip(offsets, offsets[1:], strict=False)]
        return heads(self.pipeline(Doc(self.pipeline.vocab, words=words, spaces=[*spaces, False])))


def heads(document: Any) -> list[int]:
    """Of a spaCy Doc that has been parsed."""
    return [token.head.i for token in document]
