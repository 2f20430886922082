"""Vectors of words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastdistill.models import word_vectors
from tests import tiny

WORDS = ["[PAD]", "good", "bad", ". . ."]


def written(path: Path, *lines: str) -> Path:
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    return path


def test_vectors_of_a_file(tmp_path: Path) -> None:
    """Of words with spaces, too; the first of two counts; those that are not there are 0."""
    lines = ("the 1 2 3", "good 0.5 -1e-1 3", ". . . 7 8 9", "good 0 0 0", "other nan 0 0")
    vectors, found = word_vectors.from_file(written(tmp_path / "glove.txt", *lines), WORDS)
    torch.testing.assert_close(vectors, torch.tensor([[0, 0, 0], [0.5, -0.1, 3], [0, 0, 0], [7, 8, 9]]))
    assert found == 2


@pytest.mark.parametrize(
    "lines, problem",
    [
        (["good 1 2", "bad 1"], "line 2: has 1 numbers; expected 2, as line 1 has"),
        (["good 1 2", "bad 1 x"], "line 2: could not convert"),
        (["good 1 2", "bad 1 nan"], "line 2: has a number that is NaN or infinite"),
        (["good 1 1e39"], "line 1: has a number that is NaN or infinite"),
        (["400000 300", "good 1 2"], "line 1: has 1 numbers after its word"),
        (["good" + " 1" * 20_000], "line 1: has 20000 numbers after its word"),
        (["good\t1\t2"], "line 1: has 0 numbers after its word"),
        (["x" * (1 << 20)], "line 1: has more than 1048576 bytes"),
        (["the 1 2"], "has none of the task's 4 words"),
        ([], "has none of the task's 4 words"),
    ],
)
def test_a_file_that_has_no_vectors_is_an_error(tmp_path: Path, lines: list[str], problem: str) -> None:
    file = written(tmp_path / "glove.txt", *lines)
    with pytest.raises(ValueError) as caught:
        word_vectors.from_file(file, WORDS)
    assert str(caught.value).startswith(str(file)) and problem in str(caught.value)


def test_bytes_that_are_no_text_are_words_of_others(tmp_path: Path) -> None:
    file = tmp_path / "glove.txt"
    file.write_bytes(b"\xff\xfe 1 2\r\ngood 3 4\r\n")
    vectors, found = word_vectors.from_file(file, WORDS)
    assert vectors[1].tolist() == [3, 4] and found == 1


def test_vectors_of_an_encoder(tmp_path: Path) -> None:
    """The mean of a word's tokens, of which those of unknown words are none."""
    encoder = tiny.bert().bert
    folder = tiny.model_folder(tmp_path / "encoder", encoder)
    one, two = tiny.WORDS[:2]
    vectors, found = word_vectors.from_encoder(str(folder), ["[UNK]", one, two, f"{one} {two}", "unheard"])
    table = encoder.embeddings.word_embeddings.weight.detach()
    ids = tiny.tokenizer().convert_tokens_to_ids([one, two])
    means = torch.stack([table[ids[0]], table[ids[1]], table[ids].mean(0)])
    torch.testing.assert_close(vectors[1:4], (means - means.mean(0)) / (means - means.mean(0)).std(correction=0))
    assert found == 3
    assert not vectors[0].any() and not vectors[4].any()
    with pytest.raises(ValueError, match="knows none of the task's 1 words"):
        word_vectors.from_encoder(str(folder), ["unheard"])
    with pytest.raises(FileNotFoundError):
        word_vectors.from_encoder(str(tmp_path / "nowhere"), [one])


def test_random_vectors_are_of_the_seed() -> None:
    one, same, other = (word_vectors.at_random(5, 3, seed) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other) and one.shape == (5, 3)
