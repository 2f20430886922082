"""Vectors of words: from a file, of an encoder's tokens, or at random."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistill.models.fit import check_finite
from fastdistill.models.loading import check_tokenizer, from_pretrained, load_tokenizer, pretrained

LINE = 1 << 20
"""Bytes that a line may have."""

DIMENSION = 1 << 14
"""Numbers that it may have."""


def from_file(path: str | Path, words: Sequence[str]) -> tuple[Tensor, int]:
    """The words' vectors ``[V, E]``, and how many of them the file has; the others' are 0.

    Args:
        path: plain text, a line a word: the word, E numbers, spaces between them (GloVe's files). Of a word that is
            there twice the first counts; a word may have spaces in it.

    Only the lines of these words are kept in memory. Raises ValueError, with the line, for a line with fewer numbers
    than the first, for what is no finite number, and where the file has none of the words.
    """
    places = {word.encode(): place for place, word in enumerate(words)}
    vectors, found, width = torch.zeros(len(words), 0), set(), 0
    for number, line in _lines(Path(path)):
        if not width:
            width = line.count(b" ")
            if not 2 <= width <= DIMENSION:
                raise ValueError(
                    f"{path}, line 1: has {width} numbers after its word; expected from 2 to {DIMENSION}, with single "
                    "spaces between them, as GloVe's files have"
                )
            vectors = torch.zeros(len(words), width)
        word, *values = line.rsplit(b" ", width)
        if len(values) < width:
            raise ValueError(f"{path}, line {number}: has {len(values)} numbers; expected {width}, as line 1 has")
        place = places.get(word)
        if place is not None and place not in found:
            found.add(place)
            vectors[place] = _numbers(path, number, values)
    if not found:
        raise ValueError(f"{path} has none of the task's {len(words)} words; expected word vectors as plain text")
    return vectors, len(found)


def from_encoder(name_or_path: str, words: Sequence[str]) -> tuple[Tensor, int]:
    """The words' vectors ``[V, E]``, and how many of them there are: each the mean of the input embeddings of its
    tokens, 0 for a word that has none, or none but what is unknown or special.

    Args:
        name_or_path: folder or hub name of a transformers encoder in safetensors, or a name in `PACKAGED`.

    They are brought to mean 0 and variance 1 over the words, for an encoder's embeddings are small and lie in one
    direction, which its own first layer norm undoes.
    """
    source = pretrained(name_or_path)
    model, tokenizer = from_pretrained(source), load_tokenizer(name_or_path)
    check_finite(source, model)
    check_tokenizer(source, tokenizer, model)
    with torch.no_grad():
        embeddings: Any = model.get_input_embeddings()
        table: Tensor = embeddings.weight.float()
        vectors, found = torch.zeros(len(words), table.shape[1]), []
        for place, word in enumerate(words):
            ids = tokenizer(word, add_special_tokens=False)["input_ids"]
            if set(ids) - set(tokenizer.all_special_ids):
                vectors[place] = table[ids].mean(0)
                found.append(place)
        if not found:
            raise ValueError(f"{source} has a tokenizer that knows none of the task's {len(words)} words")
        known = vectors[found]
        known = known - known.mean(0)
        vectors[found] = known / known.std(correction=0).clamp(min=1e-6)
    return vectors, len(found)


def at_random(words: int, width: int, seed: int) -> Tensor:
    """``[V, E]``, normal, of variance 1."""
    return torch.randn(words, width, generator=torch.Generator().manual_seed(seed))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered from 1, without their ends."""
    with path.open("rb") as file:
        buffered: io.BufferedReader = file
        for number, line in enumerate(iter(lambda: buffered.readline(LINE), b""), 1):
            if len(line) == LINE:
                raise ValueError(f"{path}, line {number}: has more than {LINE} bytes; expected a word and its vector")
            yield number, line.rstrip(b" \r\n")


def _numbers(path: str | Path, line: int, values: Sequence[bytes]) -> Tensor:
    try:
        found = torch.tensor([float(value) for value in values], dtype=torch.float64).float()
    except ValueError as error:
        raise ValueError(f"{path}, line {line}: {error}") from None
    if not found.isfinite().all():
        raise ValueError(f"{path}, line {line}: has a number that is NaN or infinite; expected finite ones")
    return found
