"""What only a GPU shows; the answers themselves are checked in tests/ops on every device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastdistill import hidden_entropy, select_uncertain, uncertainty
from fastdistill.ops import reference
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


@pytest.mark.parametrize("classes", [2, 16, 17, 2048, 2049, 30522])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_equals(classes: int, kind: str) -> None:
    logits = make(300, classes, dtype=torch.float32)
    logits[::7, 1:] = logits[::7, :1]
    upstream = torch.rand(300, device="cuda")
    torch.testing.assert_close(
        torch.ops.fastdistill.uncertainty_backward(upstream, logits, kind, True),
        reference.uncertainty_backward(upstream, logits, kind, True),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selects_of_millions_the_same_again(dtype: torch.dtype) -> None:
    logits = (torch.randn(3_000_000, 3, device="cuda", dtype=dtype) * 4).round()  # many ties
    scores = uncertainty(logits, normalize=False)
    expected = scores.cpu().argsort(descending=True, stable=True).cuda()
    for count in (1, 900_000, 2_999_999, 3_000_000):
        for _ in range(3):
            assert torch.equal(select_uncertain(logits, count / 3_000_000), expected[:count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 5), (5000, 3), (64, 1000), (16, 5000)])
def test_replays_in_a_cuda_graph(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits = make(*shape, dtype=dtype)
    gradient(logits), select_uncertain(logits, 0.3), select_uncertain(logits, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = uncertainty(logits), gradient(logits), select_uncertain(logits, 0.3), select_uncertain(logits, 1)
    for _ in range(2):
        logits.copy_(make(*shape, dtype=dtype))
        graph.replay()
        torch.testing.assert_close(captured[0], uncertainty(logits))
        torch.testing.assert_close(captured[1], gradient(logits))
        assert torch.equal(captured[2], select_uncertain(logits, 0.3))
        assert torch.equal(captured[3], select_uncertain(logits, 1))


def enough_memory(gigabytes: int) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"{free:.0f} GB of device memory are free; this takes {gigabytes}")


@pytest.mark.parametrize("rows,classes", [((1 << 30) + 9, 2), ((1 << 31) // 3000 + 9, 3001)])
def test_more_elements_than_fit_32_bits(rows: int, classes: int) -> None:
    """Rows at the end are like those at the beginning."""
    enough_memory(20)
    some = make(64, classes)
    logits = some.repeat(rows // 64 + 1, 1)[:rows]
    assert logits.numel() > 1 << 31
    few = some.repeat(2, 1)
    tail = (torch.arange(64, device="cuda") + rows - 64) % 64
    for kind in KINDS:
        value = uncertainty(logits, kind)
        assert torch.equal(value[:128], uncertainty(few, kind)) and torch.equal(value[-64:], value[tail])
        del value
    grad = torch.ops.fastdistill.uncertainty_backward(torch.ones(rows, device="cuda"), logits, "margin", True)
    assert torch.equal(grad[-64:], grad[tail])


def test_selects_of_a_billion_rows() -> None:
    enough_memory(16)
    rows = (1 << 30) + 9
    logits = make(64, 2).repeat(rows // 64 + 1, 1)[:rows]
    logits[5] = logits[rows - 3] = torch.nan
    chosen = select_uncertain(logits, 0.02)
    assert chosen[:2].tolist() == [5, rows - 3]
    highest = uncertainty(logits[64:128], normalize=False).argmax()
    assert torch.equal(chosen[2:1000] % 64, highest.expand(998)) and bool((chosen[3:1000] > chosen[2:999]).all())
