"""Training steps by CUDA graphs, but for these: what is captured runs again (`tests.rerun`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastdistill
from fastdistill import CKD, DKD, MSE, PKD, DeKD, DistilBERT, LogitsKD, MultiLabelKD, TinyBERT, WeightedSum, cuda_graphs
from fastdistill.objectives.base import Objective
from fastdistill.objectives.capturing import obstacle_to_capture
from fastdistill.objectives.logits import TaskLoss
from fastdistill.objectives.team import MTBERT, AvgKD, SampledTeacher
from fastdistill.training.graphed import GraphedBackward
from fastdistill.training.padding import Padded, can_pad
from tests import tiny
from tests.rerun import Rerun
from tests.training import graphable
from tests.training.graphable import TRAININGS
from tests.training.trained import bert_trainer


@pytest.fixture(autouse=True)
def lines_are_new() -> Iterator[None]:
    cuda_graphs.tell.cache_clear()
    yield


def test_on_a_cpu_there_are_none(tmp_path: Path) -> None:
    assert bert_trainer(tmp_path, args_cuda_graphs=True)._as_graphs() is None


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Rerun:
    rerun = Rerun()
    monkeypatch.setattr(cuda_graphs, "capturing", lambda device: rerun)
    return rerun


def data(rows: int = 64, *names: str) -> Any:
    """With what teachers say, by default one; texts of few lengths."""
    return graphable.data(rows, *(names or ("teacher",)))


def made(folder: Path, *, cuda_graphs: bool, **options: Any) -> Any:
    # by plain descent: Adam makes steps of gradients that are nothing but rounding, as those of keys' biases
    args = {
        "args_optim": "sgd",
        "args_learning_rate": 0.05,
        "args_cuda_graphs": cuda_graphs,
        "args_num_train_epochs": 2,
        "args_logging_steps": 5,
        "args_seed": 3,
    }
    settings: dict[str, Any] = {"teacher_model": None, "train_dataset": data(), "model": tiny.bert(1, dropout=0.0)}
    return bert_trainer(folder, **{**settings, **args, **options})


def trained(folder: Path, **options: Any) -> Any:
    t = made(folder, **options)
    t.train()
    return t


def close(one: Any, other: Any) -> None:
    for (name, a), (_, b) in zip(one.model.named_parameters(), other.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    logs = [
        [{k: v for k, v in e.items() if not k.startswith(("train", "total"))} for e in t.state.log_history]
        for t in (one, other)
    ]
    for mine, theirs in zip(*logs, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "no labels"])
def test_weights_and_logs_are_those_without(tmp_path: Path, graphs: Rerun, accumulation: int, labels: bool) -> None:
    """With labels the share of a micro-batch is of a number that each step has anew; without, of their number."""
    rows = data() if labels else data().remove_columns("labels")
    options: dict[str, Any] = {"train_dataset": rows, "objective": LogitsKD(ce_weight=float(labels))}
    options["args_gradient_accumulation_steps"] = accumulation
    plain = trained(tmp_path, cuda_graphs=False, **options)
    assert not graphs.warmed
    close(trained(tmp_path, cuda_graphs=True, **options), plain)
    assert graphs.replayed >= 4


def test_a_live_teacher_runs_in_the_graph(tmp_path: Path, graphs: Rerun) -> None:
    options = {"teacher_model": tiny.bert(2, layers=3), "train_dataset": tiny.dataset(64)}
    close(*(trained(tmp_path, cuda_graphs=one, **options) for one in (True, False)))
    assert graphs.replayed >= 4


@pytest.mark.slow
@pytest.mark.parametrize("training", TRAININGS)
def test_each_objective_that_can_be_captured(tmp_path: Path, graphs: Rerun, training: str) -> None:
    """What runs again waits for nothing, or it is an error."""
    close(*(trained(tmp_path, cuda_graphs=one, **TRAININGS[training]()) for one in (True, False)))
    assert graphs.replayed >= 4


def test_what_an_objective_learns_is_learned(tmp_path: Path, graphs: Rerun) -> None:
    def run(cuda_graphs: bool) -> Any:
        torch.manual_seed(5)
        pkd = PKD(pairs=((1, 1),), widths=(16, 24))
        objective = WeightedSum({"kd": (1, LogitsKD()), "hidden": (10, pkd)})
        teacher = tiny.bert(2, hidden_size=24)
        rows = tiny.dataset(64)
        return trained(
            tmp_path, cuda_graphs=cuda_graphs, objective=objective, teacher_model=teacher, train_dataset=rows
        )

    one, other = run(True), run(False)
    close(one, other)
    for a, b in zip(one.objective.module.parameters(), other.objective.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert graphs.replayed


def test_what_a_drawn_teacher_gives_is_told(tmp_path: Path, graphs: Rerun) -> None:
    rows = data(64, "a", "b")
    logits = np.asarray(rows["b_logits"])
    logits[17, 1] = np.nan
    rows = rows.remove_columns("b_logits").add_column("b_logits", logits.tolist())
    rows = rows.add_column("other_logits", [[float("nan")]] * 64)
    objective = SampledTeacher({"a": 0.5, "b": 0.5})
    with pytest.raises(ValueError, match="NaN in row 17 of 'b_logits'"):
        trained(tmp_path, cuda_graphs=True, train_dataset=rows, objective=objective, args_num_train_epochs=4)
    assert graphs.replayed


def test_dekd_that_chooses_in_each_batch_is_captured(tmp_path: Path, graphs: Rerun) -> None:
    objective = DeKD(da_weight=0.0, assistant=False, log_selection=True)
    close(*(trained(tmp_path, cuda_graphs=one, objective=objective) for one in (True, False)))
    assert graphs.replayed


def test_weights_without_a_gradient_keep_none_and_frozen_ones_stay(tmp_path: Path, graphs: Rerun) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        new = tiny.bert(1, dropout=0.0)
        new.unused = nn.Linear(2, 2)
        new.bert.embeddings.requires_grad_(False)
        return new

    one, other = (trained(tmp_path, cuda_graphs=on, model=model(), args_weight_decay=0.5) for on in (True, False))
    close(one, other)
    assert graphs.replayed
    assert torch.equal(one.model.unused.weight, model().unused.weight)  # not even decayed
    assert torch.equal(one.model.bert.embeddings.LayerNorm.weight, model().bert.embeddings.LayerNorm.weight)


def test_a_nan_of_a_replayed_step_is_found(tmp_path: Path, graphs: Rerun) -> None:
    rows = data(64)
    logits = np.asarray(rows["teacher_logits"])
    logits[17, 1] = np.nan
    rows = rows.remove_columns("teacher_logits").add_column("teacher_logits", logits.tolist())
    with pytest.raises(ValueError, match="NaN in row 17 of 'teacher_logits'"):
        trained(tmp_path, cuda_graphs=True, train_dataset=rows, args_logging_steps=1000)


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, graphs: Rerun) -> None:
    whole = trained(tmp_path / "whole", cuda_graphs=True, args_save_strategy="steps", args_save_steps=9)
    again = made(tmp_path / "again", cuda_graphs=True, model=tiny.bert(4, dropout=0.0))
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-9"))
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_broken_capture_breaks_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    graphs = Rerun(breaks=lambda number: number == 2)
    monkeypatch.setattr(cuda_graphs, "capturing", lambda device: graphs)
    one = trained(tmp_path, cuda_graphs=True)
    assert (graphs.captured, capsys.readouterr().err.count("training: no CUDA graphs: RuntimeError")) == (2, 1)
    close(one, trained(tmp_path, cuda_graphs=False))


def test_graphs_are_given_up_with_the_training(tmp_path: Path, graphs: Rerun) -> None:
    assert trained(tmp_path, cuda_graphs=True)._graphed is None


# Gradients


def accumulated(backward: GraphedBackward, weight: nn.Parameter, *values: float) -> list[Tensor]:
    """Its gradient after each micro-batch of one step."""
    weight.grad, found = None, []
    for value in values:
        if backward(torch.tensor(value)) is None:
            (weight * value).sum().backward()
        assert weight.grad is not None
        found.append(weight.grad.clone())
    return found


def test_gradients_add_up_as_those_of_backward_do() -> None:
    weight = nn.Parameter(torch.ones(3))
    backward = GraphedBackward(lambda x: ((weight * x).sum(), {}, {}), [weight], [], Rerun())
    for _ in range(3):
        found = accumulated(backward, weight, 1.0, 2.0, 3.0)
        assert [one[0].item() for one in found] == [1.0, 3.0, 6.0]
    assert accumulated(backward, weight, 5.0)[0].tolist() == [5.0] * 3


def test_a_kept_gradient_is_not_written_over() -> None:
    weight = nn.Parameter(torch.ones(3))
    backward = GraphedBackward(lambda x: ((weight * x).sum(), {}, {}), [weight], [], Rerun())
    for _ in range(4):
        weight.grad = None
        backward(torch.tensor(2.0))
    with torch.no_grad():
        assert weight.grad is not None
        weight.grad.mul_(0.5)  # as clipping does
    backward(torch.tensor(2.0))
    assert weight.grad.tolist() == [3.0] * 3


def test_weights_that_are_moved_or_frozen_make_another_step() -> None:
    weight, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    graphs = Rerun()
    backward = GraphedBackward(lambda x: ((weight * x).sum() + other.sum(), {}, {}), [weight, other], [], graphs)
    for _ in range(4):
        backward(torch.tensor(2.0))
    assert graphs.replayed == 1
    weight.data = torch.zeros(3)
    assert backward(torch.tensor(2.0)) is None
    for _ in range(3):
        backward(torch.tensor(2.0))
    other.requires_grad_(False)
    assert backward(torch.tensor(2.0)) is None


# What cannot be captured


@pytest.mark.parametrize(
    "objective",
    [
        LogitsKD(), MSE(), MultiLabelKD(), TaskLoss(), DKD(), PKD(), CKD(), DistilBERT(), TinyBERT(), DeKD(),
        AvgKD(("a", "b")), MTBERT(("a",)), SampledTeacher({"a": 1.0}),
        WeightedSum({"kd": (1, LogitsKD()), "pkd": (1, PKD())}),
    ],
    ids=lambda one: type(one).__name__,
)  # fmt: skip
def test_objectives_of_tensors_alone(objective: Objective) -> None:
    assert obstacle_to_capture(objective, {}) is None


def test_what_an_objective_decides_on_the_host_is_told() -> None:
    sampled = SampledTeacher({"a": 0.5, "b": 0.5})
    both = WeightedSum({"one": (1, sampled), "other": (1, SampledTeacher({"a": 0.2, "b": 0.8}))})
    assert str(obstacle_to_capture(both, {})).endswith("decides something for each step by itself")
    within = WeightedSum({"kd": (1, LogitsKD()), "own": (1, lambda student, teacher, labels: student.logits.sum())})
    assert "is not known to be a function of tensors alone" in str(obstacle_to_capture(within, {}))
    assert "the epoch has chosen" in str(obstacle_to_capture(DeKD(select_per="epoch"), {}))


def checkpointing(model: Any) -> None:
    model.gradient_checkpointing_enable()


def hooked(model: Any) -> None:
    model.bert.encoder.register_forward_hook(lambda *_: None)


def compiled(model: Any) -> None:
    model.bert.compile()


def dropping(model: Any) -> None:
    model.config.encoder_layerdrop = 0.1


def with_a_hook_on_a_weight(model: Any) -> None:
    model.classifier.weight.register_post_accumulate_grad_hook(lambda weight: None)


@pytest.mark.parametrize(
    "change, told",
    [
        (checkpointing, "with gradient checkpointing"),
        (hooked, "with a hook on bert.encoder, which a replay does not call"),
        (with_a_hook_on_a_weight, "with a hook on classifier.weight"),
        pytest.param(compiled, "that is compiled", marks=pytest.mark.slow),
        (dropping, "whose config has encoder_layerdrop"),
    ],
)
def test_models_that_no_graph_can_be_of(tmp_path: Path, graphs: Rerun, capsys: Any, change: Any, told: str) -> None:
    model = tiny.bert(1, layers=1)
    change(model)
    t = bert_trainer(tmp_path, model, args_cuda_graphs=True, args_max_steps=1)
    assert t._as_graphs() is None
    line = capsys.readouterr().err
    assert line.startswith("training: no CUDA graphs: model is a BertForSequenceClassification ")
    assert told in line
    assert t._as_graphs() is None
    assert not capsys.readouterr().err  # it was told


def test_gates_and_what_is_looked_for_on_the_host(tmp_path: Path, graphs: Rerun, capsys: Any) -> None:
    t = bert_trainer(tmp_path, args_cuda_graphs=True)
    with fastdistill.gate(t.teacher_model):
        assert t._as_graphs() is None
    assert "teacher_model is a BertForSequenceClassification within fastdistill.gate" in capsys.readouterr().err
    t = bert_trainer(tmp_path, args_cuda_graphs=True, objective=DeKD(assistant=False))
    assert t._as_graphs() is None
    assert "runs teachers on some rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda t: setattr(t.accelerator, "scaler", object()), "float16 gradients"),
        (lambda t: setattr(t.args, "torch_compile", True), "FSDP's or compiled"),
        (lambda t: setattr(t.args, "gradient_checkpointing", True), "args.gradient_checkpointing"),
        (lambda t: setattr(t.args, "_n_gpu", 2), "several processes or devices share a step"),
    ],
)
def test_runs_that_no_graph_can_be_of(tmp_path: Path, graphs: Rerun, capsys: Any, change: Any, told: str) -> None:
    t = bert_trainer(tmp_path, args_cuda_graphs=True)
    assert t._as_graphs() is not None
    change(t)
    assert t._as_graphs() is None
    assert told in capsys.readouterr().err


def test_a_loss_of_ones_own_is_not_passed_by(tmp_path: Path, graphs: Rerun, capsys: Any) -> None:
    class Own(fastdistill.DistillationTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    t = Own(model=tiny.bert(1), args=tiny.config(tmp_path, cuda_graphs=True), objective=TaskLoss())
    assert t._as_graphs() is None
    assert "Own has a compute_loss of its own" in capsys.readouterr().err


# Padding


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra", "xlm-roberta"])
def test_padding_changes_no_logits(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = AutoConfig.for_model(kind, vocab_size=70, max_position_embeddings=34, pad_token_id=1, **shape)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert can_pad(model)
    ids = torch.randint(5, 65, (3, 11))
    mask = (torch.arange(11) < torch.tensor([[11], [4], [7]])).long()
    batch = {"input_ids": torch.where(mask == 1, ids, 1), "attention_mask": mask, "teacher_logits": torch.zeros(3, 11)}
    padded = Padded(lambda rows: dict(batch), [model])([])
    assert padded["input_ids"].shape == padded["attention_mask"].shape == (3, 16)
    assert padded["teacher_logits"] is batch["teacher_logits"]
    given = [{name: one[name] for name in ("input_ids", "attention_mask")} for one in (batch, padded)]
    with torch.no_grad():
        expected, found = (model(**one).logits for one in given)
    torch.testing.assert_close(found, expected)


def test_what_is_not_padded() -> None:
    def batch(length: int, **more: Tensor) -> dict[str, Tensor]:
        return {"input_ids": torch.ones(2, length).long(), "attention_mask": torch.ones(2, length)} | more

    model = tiny.bert(max_position_embeddings=12)
    for given in (
        batch(8),  # a multiple already
        batch(11),  # there are but 12 positions
        batch(3, position_ids=torch.zeros(2, 3).long()),
        {"pixel_values": torch.zeros(2, 3)},
    ):
        assert Padded(lambda rows, given=given: given, [model])([]) is given
    assert Padded(lambda rows: batch(3), [model])([])["input_ids"].shape == (2, 8)
    model.config.pad_token_id = None  # it may not have the embedding of token 0
    ids = {"input_ids": torch.tensor([[7, 9, 9]] * 2)}
    assert Padded(lambda rows: batch(3) | ids, [model])([])["input_ids"].unique().tolist() == [7, 9]
    assert not can_pad(nn.Linear(2, 2))
