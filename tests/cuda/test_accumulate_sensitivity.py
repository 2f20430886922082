"""What only a GPU shows; the answers themselves are checked in tests/ops on every device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastdistill import accumulate_sensitivity_
from fastdistill.ops.native import NATIVE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not NATIVE.cuda, reason=f"no CUDA C++ kernels: {NATIVE.why_no_cuda}"),
]

Columns = tuple[list[Tensor], list[Tensor], list[Tensor]]


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def make(sizes: list[int], grad: torch.dtype = torch.bfloat16, weight: torch.dtype = torch.float32) -> Columns:
    totals = [torch.rand(size, device="cuda") for size in sizes]
    grads = [torch.randn(size, device="cuda").to(grad) for size in sizes]
    weights = [torch.randn(size, device="cuda").to(weight) for size in sizes]
    return totals, grads, weights


def expected(totals: list[Tensor], grads: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    return [t + (g.float() * w.float()).abs() for t, g, w in zip(totals, grads, weights, strict=True)]


def assert_equal(totals: list[Tensor], wanted: list[Tensor]) -> None:
    for i, (total, want) in enumerate(zip(totals, wanted, strict=True)):
        assert torch.equal(total, want), f"tensor {i} of {total.numel()}"


def launches(*columns: list[Tensor]) -> int:
    accumulate_sensitivity_(*columns)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        accumulate_sensitivity_(*columns)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert all("add_tiles" in name for name in kernels), kernels
    return len(kernels)


def test_one_launch_for_hundreds_of_tensors() -> None:
    assert launches(*make([1 + 37 * i % 9000 for i in range(256)])) == 1
    assert launches(*make([5] * 600)) == 3
    mixed = [a + b for a, b in zip(make([5, 6]), make([7, 8], torch.float16), strict=True)]
    assert launches(*mixed) == 2


def test_many_launches_cover_everything() -> None:
    columns = make([(i * 7919) % 6000 for i in range(1300)])
    wanted = expected(*columns)
    accumulate_sensitivity_(*columns)
    assert_equal(columns[0], wanted)


@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=str)
def test_addresses_off_sixteen_bytes(grad: torch.dtype, weight: torch.dtype) -> None:
    size = 3 * 4096 + 5
    for offsets in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (4, 8, 4), (3, 5, 7)]:
        columns = make([size + offset for offset in offsets], grad, weight)
        column = [column[i][offset:] for i, (column, offset) in enumerate(zip(columns, offsets, strict=True))]
        wanted = expected(*([x] for x in column))
        accumulate_sensitivity_(*([x] for x in column))
        assert_equal(column[:1], wanted)


def test_more_elements_than_32_bits_count() -> None:
    size = 2**31 + 4097
    if torch.cuda.mem_get_info()[0] < 3 * size * 4:
        pytest.skip("too little memory")
    total = torch.zeros(size, device="cuda")
    grad = torch.ones(size, device="cuda", dtype=torch.bfloat16)
    accumulate_sensitivity_([total], [grad], [grad])
    assert bool((total == 1).all())


def test_never_waits_for_the_device(request: pytest.FixtureRequest) -> None:
    totals, grads, weights = make([1000, 3, 70000])
    accumulate_sensitivity_(totals, grads, weights)
    request.getfixturevalue("no_synchronisation")
    accumulate_sensitivity_(totals, grads, weights)
    accumulate_sensitivity_([torch.zeros(8, 8, device="cuda")[:, ::2]], [torch.ones(8, 4, device="cuda")])


def test_runs_on_the_current_stream() -> None:
    totals, grads, weights = ([torch.full((100_000,), value, device="cuda")] for value in (0.0, 1.0, 0.0))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a launch on any other stream would see the weights before they are written
        weights[0].fill_(1)
        accumulate_sensitivity_(totals, grads, weights)
        seen = totals[0].clone()
    stream.synchronize()
    assert bool((seen == 1).all())


def test_replays_in_a_cuda_graph() -> None:
    columns = make([1000, 5, 70_001])
    accumulate_sensitivity_(*columns)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        accumulate_sensitivity_(*columns)
    for _ in range(2):
        for weight in columns[2]:
            weight.mul_(2)
        wanted = expected(*columns)
        accumulate_sensitivity_(*make([1000, 5, 70_001]))  # elsewhere: a graph keeps the addresses it was captured with
        graph.replay()
        assert_equal(columns[0], wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_runs_on_the_tensors_device() -> None:
    columns = [[x.to("cuda:1") for x in column] for column in make([1000, 5])]
    wanted = expected(*columns)
    accumulate_sensitivity_(*columns)
    assert torch.cuda.current_device() == 0
    assert_equal(columns[0], wanted)
