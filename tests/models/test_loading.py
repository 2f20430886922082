from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

import fastdistill
from fastdistill.models.loading import check_tokenizer, load_classifier, load_tokenizer
from tests import tiny
from tests.encoders import CONFIGS, classifier


@pytest.mark.parametrize("kind", sorted(CONFIGS.keys() - {"vit"}))
def test_a_tokenizer_without_its_files_is_an_error(kind: str, tmp_path: Path) -> None:
    """transformers makes one of five tokens, to which every word is unknown."""
    classifier(kind).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} has no tokenizer that knows a word"):
        load_tokenizer(str(tmp_path))


def test_a_whole_tokenizer_is_loaded(tmp_path: Path) -> None:
    tiny.model_folder(tmp_path)
    assert load_tokenizer(str(tmp_path)).get_vocab() == tiny.tokenizer().get_vocab()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def changed(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut weights": (lambda folder: cut(folder / "model.safetensors"), "SafetensorError"),
    "garbled weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 99), "SafetensorError"),
    "vocabulary": (lambda folder: changed(folder / "config.json", vocab_size=9), r"word_embeddings.weight, \[9, 16\]"),
    "activation": (
        lambda folder: changed(folder / "config.json", hidden_act="sinus"),
        "a config whose hidden_act is 'sinus'; expected one of .*gelu",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json; expected the folder of a model"),
    "cut config": (lambda folder: cut(folder / "config.json"), "is damaged"),
    "heads": (lambda folder: changed(folder / "config.json", num_attention_heads=3), "multiple"),
    "a text for a number": (lambda folder: changed(folder / "config.json", hidden_size="16"), "hidden_size"),
}


@pytest.mark.parametrize("load", [lambda source: load_classifier(source, tiny.TASK), fastdistill.from_pretrained])
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_is_named_with_what_is_wrong(
    tmp_path: Path, name: str, load: Callable[[str], PreTrainedModel]
) -> None:
    damage, message = DAMAGES[name]
    damage(tiny.model_folder(tmp_path))
    with pytest.raises((ValueError, FileNotFoundError), match=f"{tmp_path}.*{message}"):
        load(str(tmp_path))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [None, "[]", "{", ""])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, file: str, content: str | None) -> None:
    tiny.model_folder(tmp_path)
    if content is not None:
        (tmp_path / file).write_text(content)
    elif file == "tokenizer.json":
        (tmp_path / file).write_text("{}")
    else:  # without it transformers takes the class that the config names
        (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_tokenizer(str(tmp_path))


def test_tokens_without_embedding_are_an_error(tmp_path: Path) -> None:
    source, model = str(tiny.model_folder(tmp_path)), tiny.bert(vocab_size=64)
    message = f"{source} has a tokenizer with '{tiny.WORDS[-1]}' at 64, but a model of 64 tokens"
    with pytest.raises(ValueError, match=message):
        check_tokenizer(source, load_tokenizer(source), model)
    check_tokenizer(source, load_tokenizer(source), tiny.bert())


@pytest.mark.parametrize("load", [lambda source: load_classifier(source, tiny.TASK), fastdistill.from_pretrained])
def test_a_folder_that_is_not_there(tmp_path: Path, load: Callable[[str], PreTrainedModel]) -> None:
    (tmp_path / "file").touch()
    for source, message in [
        (str(tmp_path / "no where"), "is not there; expected the folder of a model"),
        ("./nowhere", "is not there; expected the folder of a model"),
        (str(tmp_path / "file"), "is a file; expected the folder of a model"),
        (str(tmp_path), "has no config.json"),
        ("no/where", "is no folder here, nor a model that the Hugging Face hub"),
    ]:
        with pytest.raises(FileNotFoundError, match=f"^{source} {message}"):
            load(source)
