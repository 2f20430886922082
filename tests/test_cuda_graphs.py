from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import cuda_graphs
from fastdistill.cuda_graphs import AFTER, GraphedStep, as_if_captured, graphs_on
from tests import tiny
from tests.rerun import Rerun, WithoutWaiting


@pytest.fixture(autouse=True)
def lines_are_new() -> Iterator[None]:
    cuda_graphs.tell.cache_clear()
    yield
    cuda_graphs.tell.cache_clear()


def step_of(graphs: Rerun, function: Any = lambda x, scale: {"sum": (x * scale).sum(), "rows": len(x)}) -> Any:
    return GraphedStep(function, graphs, "a step")


def test_the_third_of_a_shape_is_captured_and_later_ones_are_replayed() -> None:
    graphs = Rerun()
    step = step_of(graphs)
    found = [step(torch.full((2,), float(value)), 3.0) for value in range(6)]
    assert found[: AFTER - 1] == [None, None]
    assert [one["sum"].item() for one in found[2:]] == [12.0, 18.0, 24.0, 30.0]  # of each call's own input
    assert (graphs.warmed, graphs.captured, graphs.replayed) == (1, 1, 3)
    assert found[2]["rows"] == 2


def test_results_are_copied_out_and_inputs_in() -> None:
    step, given = step_of(Rerun()), torch.ones(2)
    for _ in range(AFTER):
        step(given, 1.0)
    given.fill_(5)  # it is no input of the graph
    first = step(torch.full((2,), 2.0), 1.0)
    second = step(torch.full((2,), 3.0), 1.0)
    assert (first["sum"].item(), second["sum"].item()) == (4, 6)


@pytest.mark.parametrize(
    "other",
    [
        lambda step: step(torch.ones(3), 1.0),
        lambda step: step(torch.ones(2, dtype=torch.float64), 1.0),
        lambda step: step(torch.ones(2), 2.0),
        lambda step: step(torch.ones(2), 1),
        lambda step: step(torch.ones(2), 1.0, state=1),
        lambda step: torch.no_grad()(step)(torch.ones(2), 1.0),
        lambda step: torch.autocast("cpu", torch.bfloat16)(step)(torch.ones(2), 1.0),
    ],
    ids=["shape", "dtype", "number", "kind of number", "state", "no_grad", "autocast"],
)
def test_what_makes_another_step(other: Any) -> None:
    graphs = Rerun()
    step = step_of(graphs)
    for _ in range(AFTER + 1):
        step(torch.ones(2), 1.0)
    assert other(step) is None
    assert graphs.replayed == 1
    assert step(torch.ones(2), 1.0) is not None


def test_names_and_nesting_are_part_of_a_shape() -> None:
    step = step_of(Rerun(), lambda batch: batch["x"].sum())
    for _ in range(AFTER):
        step({"x": torch.ones(2)})
    assert step({"x": torch.ones(2)}) is not None
    assert step({"x": torch.ones(2), "y": torch.ones(2)}) is None


def test_no_more_are_captured_than_the_cap(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(cuda_graphs, "MOST", 2)
    graphs = Rerun()
    step = step_of(graphs)
    for _ in range(AFTER + 1):
        found = [step(torch.ones(size), 1.0) for size in range(1, 5)]
    assert graphs.captured == 2
    assert [one is None for one in found] == [False, False, True, True]
    assert capsys.readouterr().err == "a step: 2 shapes are captured as CUDA graphs; others run without\n"


def test_what_cannot_be_captured_ends_all(capsys: Any) -> None:
    """The run before the capture is the step's; what was captured before is given up."""
    graphs = Rerun(breaks=lambda number: number == 2)
    step = step_of(graphs)
    for _ in range(AFTER + 1):
        step(torch.ones(1), 1.0)
    for _ in range(AFTER - 1):
        step(torch.ones(2), 1.0)
    assert step(torch.ones(2), 1.0)["sum"].item() == 2
    assert step(torch.ones(1), 1.0) is None
    assert step(torch.ones(2), 1.0) is None
    assert (graphs.warmed, graphs.captured, graphs.replayed) == (2, 2, 1)
    told = "a step: no CUDA graphs: RuntimeError: operation not permitted when stream is capturing\n"
    assert capsys.readouterr().err == told
    again = step_of(Rerun(breaks=lambda number: True))
    for _ in range(AFTER):
        again(torch.ones(1), 1.0)
    assert capsys.readouterr().err == ""  # it was told


def test_an_error_of_the_function_is_left_to_the_caller(capsys: Any) -> None:
    def broken(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    graphs = Rerun()
    step = step_of(graphs, broken)
    assert [step(torch.ones(1)) for _ in range(AFTER + 1)] == [None] * (AFTER + 1)
    assert (graphs.warmed, graphs.captured) == (1, 0)
    assert capsys.readouterr().err == "a step: no CUDA graphs: OutOfMemoryError: no memory\n"


def test_what_a_broken_capture_of_others_spoiled_is_not_replayed(capsys: Any) -> None:
    graphs = Rerun()
    step = step_of(graphs)
    for _ in range(AFTER):
        step(torch.ones(1), 1.0)
    graphs.are_whole = False
    assert step(torch.ones(1), 1.0) is None
    assert (graphs.replayed, step.is_on) == (0, False)
    assert "a capture of others was broken off" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, told", [(["x", [object()]], "an input is a object"), (torch.ones(1, device="meta"), "an input is on meta")]
)
def test_inputs_that_no_graph_has(given: Any, told: str, capsys: Any) -> None:
    step = step_of(Rerun())
    assert step(given, 1.0) is None
    assert not step.is_on
    assert told in capsys.readouterr().err


def test_transformers_looks_at_no_mask_as_if_captured() -> None:
    """Of a batch without padding it then makes one, as it does while a stream is captured."""
    model = tiny.bert().eval()
    batch = {"input_ids": torch.full((2, 8), 7), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    with torch.no_grad():
        with pytest.raises(AssertionError, match="would wait for the device"), WithoutWaiting():
            model(**batch)
        with as_if_captured(), WithoutWaiting():
            found = model(**batch).logits
        torch.testing.assert_close(found, model(**batch).logits)


def test_there_are_none_on_a_cpu() -> None:
    assert graphs_on(torch.device("cpu")) is None
