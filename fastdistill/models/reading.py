"""Configs from disk or the hub, and what goes wrong when a model is read: an error that names its folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """Within it, whatever transformers and its kin raise for odd or damaged files is a ValueError that names them."""
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(source) in str(error):
            raise
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{source} is damaged, or of a kind that is not known here: {told}") from error


def load_config(source: str | Path) -> Any:
    """The config of a model, by folder or hub name. Raises FileNotFoundError where there is none, and ValueError where
    it cannot be read or names an activation that transformers does not have."""
    from transformers import AutoConfig
    from transformers.activations import ACT2FN

    from fastdistill.models.sharing import ACTIVATIONS, NOT_PLAIN

    folder = Path(source)
    if folder.is_file() or (not folder.exists() and not _may_be_of_the_hub(str(source))):
        what = "a file" if folder.is_file() else "not there"
        raise FileNotFoundError(f"{source} is {what}; expected the folder of a model, or its name on the hub")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{source} has no config.json; expected the folder of a model")
    try:
        with reading(source):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        if folder.is_dir():
            raise ValueError(f"{source} is damaged: {error}") from error
        raise FileNotFoundError(
            f"{source} is no folder here, nor a model that the Hugging Face hub, or its cache here, "
            f"is known to have: {str(error).splitlines()[0]}"
        ) from error
    for name in ACTIVATIONS:
        activation = getattr(config, name, None)
        if isinstance(activation, str) and activation.removesuffix(NOT_PLAIN) not in ACT2FN:
            raise ValueError(
                f"{source} has a config whose {name} is {activation!r}; expected one of {', '.join(sorted(ACT2FN))}"
            )
    return config


def _may_be_of_the_hub(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
