from __future__ import annotations

from pathlib import Path

import pytest

from fastdistill.models.architectures import ARCHITECTURES
from fastdistill.models.loading import load_tokenizer
from tests import tiny
from tests.encoders import classifier


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES.keys() - {"vit"}))
def test_a_tokenizer_without_its_files_is_an_error(kind: str, tmp_path: Path) -> None:
    """transformers makes one of five tokens, to which every word is unknown."""
    classifier(kind).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} has no tokenizer that knows a word"):
        load_tokenizer(str(tmp_path))


def test_a_whole_tokenizer_is_loaded(tmp_path: Path) -> None:
    tiny.model_folder(tmp_path)
    assert load_tokenizer(str(tmp_path)).get_vocab() == tiny.tokenizer().get_vocab()
