from __future__ import annotations

import gc
import os
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = "1"  # sums are rounded by how many threads share them; and workers share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from unittest.mock import Mock, patch

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton: its kernels then run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def nan_filled() -> Iterator[None]:
    """Fresh tensors hold NaN, so that an unwritten element shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def onednn() -> Iterator[Mock]:
    """What oneDNN is asked for linear layers on a CPU: as on an AMD's with AVX-512, and also for few tokens."""
    from fastdistill.ops import linear  # after TRITON_INTERPRET is set

    with (
        patch.object(linear, "_said", lambda _: "AuthenticAMD"),
        patch.object(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512"),
        patch.object(linear, "ROWS", 1),
        patch.object(linear, "_product", wraps=linear._product) as product,
    ):
        linear.by_onednn.cache_clear()
        yield product
    linear.by_onednn.cache_clear()


os.fsync = lambda descriptor: None  # what tests write need not outlive a loss of power, and disks take their time


@pytest.fixture(scope="module", autouse=True)
def what_is_imported_is_frozen() -> None:
    """A training ends with gc.collect(), which took longer than all else: it went through every module."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else Triton's module says at the end that it leaks


LONG = ("test_native.py", "test_cuda_sources.py", "test_compiled.py", "test_parallel.py")
"""Files that take a minute or more: they begin first, then others with slow tests, so that no process ends with one
while others have nothing."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name not in LONG, item.path not in slow))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
