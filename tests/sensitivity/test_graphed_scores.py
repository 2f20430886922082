from __future__ import annotations

from typing import Any

import pytest
import torch

import fastdistill
from fastdistill import PKD, LogitsKD, WeightedSum, cuda_graphs
from fastdistill.sensitivity.importance import importance
from tests.rerun import Rerun
from tests.tiny import batches, pair

OBJECTIVES = {
    "logits": LogitsKD(temperature=3.0, ce_weight=0.0),
    "hidden states": WeightedSum({"pkd": (2.0, PKD("last")), "kd": (1.0, LogitsKD(ce_weight=0.0))}),
}


@pytest.mark.parametrize("reduce", ["example", "batch"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("classes", [2, 3])
def test_scores_by_graphs_are_those_without(
    monkeypatch: pytest.MonkeyPatch, objective: str, reduce: Any, classes: int
) -> None:
    graphs = Rerun()
    monkeypatch.setattr(cuda_graphs, "capturing", lambda device: graphs)
    teacher, student = pair(classes)
    data = batches((4, 4, 4, 3, 4, 4, 3, 3, 3), classes)
    data[5]["labels"][1] = -100  # which makes it one of three
    options: dict[str, Any] = {"objective": OBJECTIVES[objective], "reduce": reduce, "progress": False}
    plain = fastdistill.score(teacher, data, student, **options)
    assert not graphs.warmed
    found = fastdistill.score(teacher, data, student, cuda_graphs=True, **options)
    assert (graphs.captured, graphs.replayed) == (2, 3)
    for one, other in ((found.expressiveness, plain.expressiveness), (found.friendliness, plain.friendliness)):
        for a, b in zip([*one.heads, *one.neurons], [*other.heads, *other.neurons], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_scores_of_weights_by_graphs_are_those_without(monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    graphs = Rerun()
    monkeypatch.setattr(cuda_graphs, "capturing", lambda device: graphs)
    teacher, student = pair(2)
    data = batches((1,) * 6, 2)
    options: dict[str, Any] = {"objective": OBJECTIVES[objective], "progress": False}
    plain = fastdistill.score_weights(teacher, data, student, **options)
    assert not graphs.warmed
    found = fastdistill.score_weights(teacher, data, student, cuda_graphs=True, **options)
    assert (graphs.captured, graphs.replayed) == (1, 3)
    for one, other in ((found.expressiveness, plain.expressiveness), (found.friendliness, plain.friendliness)):
        torch.testing.assert_close(one.matrices, other.matrices, rtol=1e-5, atol=1e-9)


def test_importance_by_graphs_is_that_without(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Rerun()
    monkeypatch.setattr(cuda_graphs, "capturing", lambda device: graphs)
    teacher, _ = pair(2)
    data = batches((4, 4, 3, 4, 4, 3), 2)
    plain = importance(teacher, data, progress=False)
    found = importance(teacher, data, progress=False, cuda_graphs=True)
    assert (graphs.captured, graphs.replayed) == (1, 1)
    for one, other in zip([*found.heads, *found.neurons], [*plain.heads, *plain.neurons], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


def test_a_capture_that_breaks_counts_its_batch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = pair()
    data = batches((4,) * 5)
    plain = fastdistill.score(teacher, data, student, progress=False)
    monkeypatch.setattr(cuda_graphs, "capturing", lambda device: Rerun(breaks=lambda number: True))
    found = fastdistill.score(teacher, data, student, progress=False, cuda_graphs=True)
    for a, b in zip(found.expressiveness.heads, plain.expressiveness.heads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("calls", [1, 2])
def test_passes_that_fail_half_way_count_their_batch_once(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Where memory runs out in so many backward passes of the run before a capture, the batch runs without graphs."""
    teacher, student = pair()
    data = batches((4,) * 5)
    plain = fastdistill.score_weights(teacher, data, student, progress=False)
    grad, left = torch.autograd.grad, [calls]

    class Failing(Rerun):
        def warm_up(self, run: Any) -> Any:
            def failing(*args: Any, **options: Any) -> Any:
                left[0] -= 1
                if not left[0]:
                    raise torch.OutOfMemoryError("no memory")
                return grad(*args, **options)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.autograd, "grad", failing)
                return super().warm_up(run)

    monkeypatch.setattr(cuda_graphs, "capturing", lambda device: Failing())
    found = fastdistill.score_weights(teacher, data, student, progress=False, cuda_graphs=True)
    assert left == [0]
    for one, other in ((found.expressiveness, plain.expressiveness), (found.friendliness, plain.friendliness)):
        torch.testing.assert_close(one.matrices, other.matrices, rtol=0, atol=0)


def test_what_no_graph_can_score_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cuda_graphs.tell.cache_clear()
    graphs = Rerun()
    monkeypatch.setattr(cuda_graphs, "capturing", lambda device: graphs)
    teacher, student = pair()
    options: dict[str, Any] = {"progress": False, "cuda_graphs": True}
    own = lambda student, teacher, labels: (student.logits - teacher.logits).square().mean()  # noqa: E731
    fastdistill.score(teacher, batches((4,) * 5), student, objective=own, **options)
    assert "score: no CUDA graphs: objective" in capsys.readouterr().err
    student.classifier.register_forward_hook(lambda *_: None)
    fastdistill.score(teacher, batches((4,) * 5), student, **options)
    assert "student is a BertForSequenceClassification with a hook on classifier" in capsys.readouterr().err
    assert not graphs.warmed
