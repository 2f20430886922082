"""Without a CUDA device the kernels run in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With a CUDA device, what runs there rather than in the interpreter is a test of it."""
    here = Path(__file__).parent
    for item in items:
        if DEVICE == "cuda" and item.path.parent == here and item.path.name != "test_compiled.py":
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def quiet_and_nan_filled(nan_filled: None) -> Iterator[None]:
    """NumPy, which the interpreter computes with, warns of infinities and NaNs; a GPU does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
