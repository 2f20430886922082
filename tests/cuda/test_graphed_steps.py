"""Training and scoring find by CUDA graphs what they do without; a broken capture leaves the device as it was."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerCallback, masking_utils, set_seed

import fastdistill
from fastdistill import PKD, LogitsKD, WeightedSum, cuda_graphs
from fastdistill.cuda_graphs import AFTER, CudaGraphs, GraphedStep
from fastdistill.sensitivity.importance import importance
from tests import searches, tiny
from tests.training.graphable import TRAININGS, data
from tests.training.trained import bert_trainer

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
EAGER = pytest.mark.skipif(
    "torch.tensor(" in inspect.getsource(masking_utils.eager_mask),
    reason="this transformers' mask for eager attention copies a number from the host, which no graph captures",
)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has an element for each replay."""
    found: list[int] = []
    capture = CudaGraphs.capture

    def counted(graphs: CudaGraphs, run: Callable[[], Any]) -> Callable[[], Any]:
        replay = capture(graphs, run)

        def again() -> Any:
            found.append(1)
            return replay()

        return again

    monkeypatch.setattr(CudaGraphs, "capture", counted)
    cuda_graphs.tell.cache_clear()
    return found


def trained(folder: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "model": tiny.bert(1, dropout=0.0), "teacher_model": None, "train_dataset": data(96, "teacher"),
        "args_use_cpu": False, "args_dataloader_pin_memory": True, "args_num_train_epochs": 2, "args_optim": "sgd",
        "args_learning_rate": 0.05, "args_logging_steps": 4,
    }  # fmt: skip
    t = bert_trainer(folder, **settings | options)
    t.train()
    return t


def check(folder: Path, replays: list[int], make: Callable[[], dict[str, Any]], rtol: float, atol: float) -> None:
    plain = trained(folder, **make())
    assert not replays
    graphed = trained(folder, args_cuda_graphs=True, **make())
    assert len(replays) >= 8
    for (name, a), b in zip(graphed.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    for mine, theirs in zip(graphed.state.log_history[:-1], plain.state.log_history[:-1], strict=True):
        assert mine == pytest.approx(theirs, rel=100 * rtol, abs=100 * atol)


@pytest.mark.parametrize("training", [pytest.param(t, marks=EAGER if t == "TinyBERT" else ()) for t in TRAININGS])
def test_weights_and_logs_are_those_without(tmp_path: Path, replays: list[int], training: str) -> None:
    check(tmp_path, replays, TRAININGS[training], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", ["stored logits", "a live teacher"])
def test_in_bfloat16(tmp_path: Path, replays: list[int], training: str) -> None:
    """The cast of a weight must be made anew in each replay: a stale one would let nothing be learned of."""
    check(tmp_path, replays, lambda: {"args_bf16": True} | TRAININGS[training](), rtol=1e-2, atol=5e-3)


def of_one_length(number: int) -> Any:
    rows = data(number, "teacher").remove_columns(["input_ids", "attention_mask", "length"])
    rows = rows.add_column("input_ids", [[2, *range(5 + row % 40, 11 + row % 40), 3] for row in range(number)])
    return rows.add_column("attention_mask", [[1] * 8] * number)


@EAGER
def test_dropout_draws_what_it_does_without(tmp_path: Path, replays: list[int]) -> None:
    """Batches of one length, a multiple of 8: nothing is padded, and as many numbers are drawn in the same order."""
    rows = of_one_length(64)

    def make() -> dict[str, Any]:
        set_seed(7)
        return {"model": tiny.bert(1, dropout=0.2, attn_implementation="eager"), "train_dataset": rows}

    check(tmp_path, replays, make, rtol=1e-4, atol=1e-5)


def test_dropout_differs_between_replays(replays: list[int]) -> None:
    query = torch.randn(2, 2, 16, 32, device=DEVICE, dtype=torch.bfloat16)

    def run(x: Tensor, q: Tensor) -> dict[str, Tensor]:
        return {"plain": F.dropout(x, 0.5), "attention": fastdistill.gated_attention(q, q, q, None, None, 0.5)}

    step, x = GraphedStep(run, CudaGraphs(DEVICE), "dropout"), torch.ones(1000, device=DEVICE)
    found = [step(x, query) for _ in range(AFTER + 3)][AFTER - 1 :]
    assert len(replays) == 3
    for name in ("plain", "attention"):
        values = [one[name] for one in found if one is not None]
        assert len(values) == 4
        assert all(not torch.equal(a, b) for place, a in enumerate(values) for b in values[:place])
    torch.manual_seed(3)
    again = [step(x, query)["plain"] for _ in range(2)]  # type: ignore[index]
    torch.manual_seed(3)
    expected = []
    for _ in range(2):
        expected.append(run(x, query)["plain"])
    for a, b in zip(again, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("hidden", [False, True])
def test_scores_are_those_without(replays: list[int], dtype: torch.dtype, classes: int, hidden: bool) -> None:
    models = [tiny.bert(seed, layers=layers, num_labels=classes).to(DEVICE, dtype) for seed, layers in ((0, 3), (1, 2))]
    teacher, student = models
    loader = tiny.batches((4, 4, 4, 3, 4, 4, 3, 3, 3, 3), classes)
    objective = WeightedSum({"pkd": (2.0, PKD("last")), "kd": (1.0, LogitsKD(ce_weight=0.0))}) if hidden else None
    options: dict[str, Any] = {"objective": objective, "progress": False}
    plain = fastdistill.score(teacher, loader, student, **options)
    found = fastdistill.score(teacher, loader, student, cuda_graphs=True, **options)
    assert len(replays) == 4
    for one, other in ((found.expressiveness, plain.expressiveness), (found.friendliness, plain.friendliness)):
        assert one is not None
        assert other is not None
        for a, b in zip([*one.heads, *one.neurons], [*other.heads, *other.neurons], strict=True):
            scale = float(b.abs().max())
            torch.testing.assert_close(a, b, rtol=0, atol=(1e-5 if dtype == torch.float32 else 5e-2) * scale)


@pytest.mark.parametrize("method, order", [("sswo", 2), ("cr", 2), ("cr", 1)])
def test_a_search_is_that_without(replays: list[int], method: Any, order: int) -> None:
    student = tiny.bert(layers=1, dropout=0.0)
    settings = replace(searches.SETTINGS, method=method, order=order, epochs=12, optimizer="sgd", learning_rate=0.05)
    plain = searches.search(settings, student, device=DEVICE)
    assert not replays
    found = searches.search(settings, student, device=DEVICE, cuda_graphs=True)
    assert len(replays) >= 8
    torch.testing.assert_close(found.theta, plain.theta, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("hidden", [False, True])
def test_scores_of_weights_are_those_without(replays: list[int], hidden: bool) -> None:
    teacher, student = (tiny.bert(seed, layers=layers).to(DEVICE) for seed, layers in ((0, 3), (1, 2)))
    loader, objective = tiny.batches((1,) * 8, 2), PKD("last") if hidden else None
    plain = fastdistill.score_weights(teacher, loader, student, objective=objective, progress=False)
    found = fastdistill.score_weights(teacher, loader, student, objective=objective, progress=False, cuda_graphs=True)
    assert len(replays) == 5
    for one, other in ((found.expressiveness, plain.expressiveness), (found.friendliness, plain.friendliness)):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one.matrices, other.matrices, rtol=1e-3, atol=1e-5)


def test_importance_is_that_without(replays: list[int]) -> None:
    model, loader = tiny.bert(layers=2).to(DEVICE), tiny.batches((4,) * 6)
    plain = importance(model, loader, progress=False)
    found = importance(model, loader, progress=False, cuda_graphs=True)
    assert len(replays) == 3
    for one, other in zip([*found.heads, *found.neurons], [*plain.heads, *plain.neurons], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_a_step_waits_for_nothing(tmp_path: Path, replays: list[int]) -> None:
    """The host makes the next one, its batch too, while the device has this."""

    class Looked(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            torch.cuda.set_sync_debug_mode("error" if 8 <= state.global_step < 11 else "default")

    options = {"train_dataset": of_one_length(96), "args_logging_steps": 100}
    try:
        trained(tmp_path, args_cuda_graphs=True, callbacks=[Looked()], **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(replays) >= 8


def asks(x: Tensor) -> Tensor:
    return x * 2 if x.sum().item() else x


def raises(x: Tensor) -> Tensor:
    if torch.cuda.is_current_stream_capturing():
        raise ValueError("not while capturing")
    return F.dropout(x * 2, 0.0)


def asks_in_backward(x: Tensor) -> Tensor:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # in a thread of autograd's
            return grad * 2 if grad.sum().item() else grad

    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(Doubled.apply(leaf).sum(), leaf)[0]  # type: ignore[no-untyped-call,no-any-return]


def wants_memory(x: Tensor) -> Tensor:
    size = 2**46 if torch.cuda.is_current_stream_capturing() else 8
    return x * 2 + torch.zeros(size, device=DEVICE, dtype=torch.uint8)[0]


@pytest.mark.parametrize(
    "function, told",
    [
        (asks, "no CUDA graphs: "),
        (asks_in_backward, "no CUDA graphs: "),
        (raises, "no CUDA graphs: ValueError: not while capturing"),
        (wants_memory, "no CUDA graphs: OutOfMemoryError"),
    ],
)
def test_a_broken_capture_leaves_the_device_as_it_was(
    replays: list[int], capsys: pytest.CaptureFixture[str], function: Callable[[Tensor], Tensor], told: str
) -> None:
    def drops(x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)

    graphs, x = CudaGraphs(DEVICE), torch.ones(8, device=DEVICE)
    good, bad = GraphedStep(drops, graphs, "good"), GraphedStep(lambda x: function(F.dropout(x, 0.0)), graphs, "bad")
    for _ in range(AFTER + 1):
        good(x)
    before = torch.cuda.current_stream()
    found = [bad(x) for _ in range(AFTER + 1)]
    assert told in capsys.readouterr().err
    assert [one is None for one in found] == [True, True, False, True]  # the third from the run before the capture
    assert found[2] is not None
    assert torch.equal(found[2], torch.full_like(x, 2))
    assert good(x) is None  # its graphs drew from the generator that was broken
    assert torch.cuda.current_stream() == before
    assert not torch.cuda.is_current_stream_capturing()
    large = torch.ones(10_000, device=DEVICE)
    assert not torch.equal(F.dropout(large, 0.5), F.dropout(large, 0.5))  # the generator draws
    held = torch.cuda.memory_allocated()
    for _ in range(3):
        torch.empty(2**24, device=DEVICE)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == held
    another = GraphedStep(drops, CudaGraphs(DEVICE), "another")
    values = [another(large) for _ in range(AFTER + 2)]
    assert values[-1] is not None
    assert values[-2] is not None
    assert not torch.equal(values[-1], values[-2])


def test_a_training_goes_on_without_graphs(
    tmp_path: Path, replays: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    class Asking(LogitsKD):
        def parts(self, student: Any, teacher: Any, labels: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
            loss, parts = super().parts(student, teacher, labels)
            assert loss.item() == loss.item()
            return loss, parts

    options = {"args_cuda_graphs": True}
    broken, plain = trained(tmp_path, objective=Asking(), **options), trained(tmp_path, objective=LogitsKD())
    assert not replays
    assert "training: no CUDA graphs: " in capsys.readouterr().err
    for a, b in zip(broken.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_memory_is_given_back(tmp_path: Path, replays: list[int]) -> None:
    trained(tmp_path, args_cuda_graphs=True)  # what stays of the first, such as workspaces, is no leak
    gc.collect()
    held = torch.cuda.memory_allocated()
    for _ in range(2):
        trained(tmp_path, args_cuda_graphs=True)
    gc.collect()
    assert torch.cuda.memory_allocated() <= held + 2**20
