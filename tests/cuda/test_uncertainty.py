"""What only a GPU shows; the answers themselves are checked in tests/ops on every device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastdistill import hidden_entropy, select_uncertain, uncertainty
from fastdistill.ops import reference
from fastdistill.ops.native import NATIVE
from tests import eager
from tests.accuracy import assert_accurate

pytestmark = pytest.mark.gpu

KINDS = ("entropy", "least_confidence", "margin")


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype) * 3


def gradient(logits: Tensor) -> Tensor:
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(uncertainty(logits).mean(), logits)[0]


@pytest.mark.parametrize("shape", [(64, 2), (5000, 3), (64, 100), (64, 32000)])
def test_never_waits_for_the_device(shape: tuple[int, int], request: pytest.FixtureRequest) -> None:
    logits = make(*shape)

    def everything() -> None:
        gradient(logits)
        hidden_entropy(logits[None])
        select_uncertain(logits, 0.5)

    everything()  # compiles the kernels, allocates
    request.getfixturevalue("no_synchronisation")
    for _ in range(3):
        everything()


@pytest.mark.parametrize("rows,classes", [(64, 128256), (1 << 20, 3), (4096, 1000)])
@pytest.mark.parametrize("kind", KINDS)
def test_large_problems_in_bfloat16(rows: int, classes: int, kind: str) -> None:
    logits = make(rows, classes)
    assert_accurate(
        uncertainty(logits, kind), eager.uncertainty(logits.double(), kind), eager.uncertainty(logits, kind)
    )


@pytest.mark.skipif(not NATIVE.cuda, reason=f"no CUDA C++ kernels: {NATIVE.why_no_cuda}")
@pytest.mark.parametrize("classes", [2, 16, 17, 1024, 1025, 30522])
@pytest.mark.parametrize("kind", KINDS)
def test_triton_and_cuda_agree(classes: int, kind: str) -> None:
    from fastdistill.kernels import uncertainty as triton

    logits = make(300, classes, dtype=torch.float32)
    logits[::7, 1:] = logits[::7, :1]  # equals
    upstream = torch.rand(300, device="cuda")
    torch.testing.assert_close(triton.uncertainty(logits, kind, True), uncertainty(logits, kind))
    grads = (op(upstream, logits, kind, True) for op in (
        triton.uncertainty_backward, torch.ops.fastdistill.uncertainty_backward, reference.uncertainty_backward
    ))  # fmt: skip
    ours, theirs, expected = grads
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(theirs, expected)


def test_selects_of_millions_the_same_again() -> None:
    logits = (torch.randn(3_000_000, 3, device="cuda") * 4).round()  # many ties
    first = select_uncertain(logits, 0.3)
    scores = uncertainty(logits, normalize=False)
    assert torch.equal(first, scores.cpu().argsort(descending=True, stable=True)[:900_000].cuda())
    for _ in range(5):
        assert torch.equal(select_uncertain(logits, 0.3), first)


def test_replays_in_a_cuda_graph() -> None:
    logits = make(32, 5, dtype=torch.float32)
    gradient(logits), select_uncertain(logits, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradient(logits), select_uncertain(logits, 0.5)
    logits.copy_(make(32, 5, dtype=torch.float32))
    graph.replay()
    torch.testing.assert_close(captured[0], gradient(logits))
    assert torch.equal(captured[1], select_uncertain(logits, 0.5))
