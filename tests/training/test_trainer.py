from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback

import fastdistill
from fastdistill import MSE, DistillationTrainer, LogitsKD, WeightedSum
from fastdistill.objectives.base import Needs, Objective
from fastdistill.objectives.logits import TaskLoss
from tests import tiny
from tests.training.trained import batch, bert_trainer

EXACT = {"rtol": 0.0, "atol": 0.0}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# What is learned


def test_the_student_comes_to_answer_as_the_teacher_does(tmp_path: Path) -> None:
    t = bert_trainer(
        tmp_path,
        objective=LogitsKD(ce_weight=0),
        train_dataset=tiny.dataset(256).remove_columns("labels"),
        args_num_train_epochs=4,
        args_logging_steps=16,
    )
    t.train()
    divergence = [entry["kd"] for entry in t.state.log_history if "kd" in entry]
    assert divergence[-1] < 0.5 * divergence[0]


@pytest.mark.parametrize("labels, expected", [(1, MSE()), (2, LogitsKD())])
def test_the_objective_follows_the_number_of_outputs(tmp_path: Path, labels: int, expected: Objective) -> None:
    student, teacher = (tiny.bert(seed, num_labels=labels) for seed in (1, 2))
    data = tiny.dataset(16, regression=labels == 1)
    t = bert_trainer(tmp_path, student, teacher_model=teacher, train_dataset=data, args_max_steps=1)
    assert t.objective == expected
    assert math.isfinite(t.train().training_loss)


def test_a_model_is_fine_tuned_without_a_teacher(tmp_path: Path) -> None:
    t = bert_trainer(tmp_path, teacher_model=None, objective=TaskLoss(), args_max_steps=3)
    before = weights(t.model)
    t.train()
    assert t.teacher_model is None
    assert not torch.equal(before["classifier.weight"], t.model.classifier.weight)


def test_any_function_is_an_objective(tmp_path: Path) -> None:
    def squared(student: Any, teacher: Any, labels: Tensor | None) -> Tensor:
        return F.mse_loss(student.logits, teacher.logits)

    data = tiny.dataset(8)
    t = bert_trainer(tmp_path, tiny.bert(1, dropout=0.0), objective=squared, train_dataset=data, args_max_steps=1)
    inputs = batch(t, data)
    labels = inputs.pop("labels")
    with torch.no_grad():
        expected = squared(t.model(**inputs), t.teacher_model(**inputs), labels)
    assert t.train().training_loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    "returned, error, said",
    [
        (lambda loss: {"loss": loss.sum()}, TypeError, "objective wrong returned a dict; expected a Tensor, the loss"),
        (lambda loss: loss, ValueError, r"objective wrong returned \(8, 2\); expected a scalar"),
    ],
)
def test_what_a_function_returns_is_a_loss(tmp_path: Path, returned: Any, error: type[Exception], said: str) -> None:
    def wrong(student: Any, teacher: Any, labels: Tensor | None) -> Any:
        return returned((student.logits - teacher.logits).square())

    t = bert_trainer(tmp_path, objective=wrong, train_dataset=tiny.dataset(8))
    with pytest.raises(error, match=said):
        t.train()


def test_an_objective_of_a_user_s_own(tmp_path: Path) -> None:
    """As README has it."""

    @dataclass(frozen=True)
    class CosineOfFirstTokens(fastdistill.Objective):
        weight: float = 0.1
        needs = fastdistill.Needs(hidden_states=True)  # type: ignore[assignment]

        def parts(self, student: Any, teacher: Any, labels: Tensor | None) -> Any:
            ce = F.cross_entropy(student.logits, labels)
            first = (each.hidden_states[-1][:, 0] for each in (student, teacher))
            cosine = 1 - F.cosine_similarity(*first).mean()
            return ce + self.weight * cosine, {"ce": ce.detach(), "cosine": cosine.detach()}

    t = bert_trainer(tmp_path, objective=CosineOfFirstTokens(), args_logging_steps=1, args_max_steps=2)
    t.train()
    for entry in t.state.log_history[:2]:
        assert entry["loss"] == pytest.approx(entry["ce"] + 0.1 * entry["cosine"], rel=1e-3) and entry["cosine"] > 0


def test_a_stream_of_stored_logits_trains(tmp_path: Path) -> None:
    data = tiny.dataset(16)
    stream = data.add_column("teacher_logits", [[1.0, -1.0]] * 16).to_iterable_dataset()
    t = bert_trainer(tmp_path, teacher_model=None, train_dataset=stream, args_max_steps=2)
    assert math.isfinite(t.train().training_loss)


@dataclass(frozen=True)
class LastState(Objective):
    """Notes the hidden states that it is given."""

    seen: list[tuple[int, int]]

    @property
    def needs(self) -> Needs:
        return Needs(hidden_states=True)

    def parts(self, student: Any, teacher: Any, labels: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen.append((len(student.hidden_states), len(teacher.hidden_states)))
        return F.mse_loss(student.hidden_states[-1], teacher.hidden_states[-1]), {}


def test_hidden_states_are_there_for_an_objective_that_needs_them(tmp_path: Path) -> None:
    objective = LastState([])
    t = bert_trainer(tmp_path, objective=objective, eval_dataset=tiny.dataset(8), args_max_steps=1)
    t.train()
    assert objective.seen == [(3, 4)]  # two and three layers, and the embeddings
    assert t.predict(t.eval_dataset).predictions.shape == (8, 2)  # and not among the predictions


def test_bf16_computes_the_teacher_in_bf16_too(tmp_path: Path) -> None:
    seen = []

    def note(student: Any, teacher: Any, labels: Tensor | None) -> Tensor:
        seen.append(teacher.logits.dtype)
        return LogitsKD()(student, teacher, labels)

    bert_trainer(tmp_path, objective=note, args_max_steps=2, args_bf16=True).train()
    assert seen == [torch.bfloat16] * 2


# The teacher


def test_the_teacher_is_frozen_and_apart(tmp_path: Path) -> None:
    teacher = tiny.bert(2, layers=3).train()
    before = weights(teacher)
    t = bert_trainer(tmp_path, teacher_model=teacher, args_max_steps=3)
    modes = []

    class Modes(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            modes.append((t.model.training, teacher.training))

    t.add_callback(Modes())
    t.train()
    assert modes == [(True, False)] * 3
    torch.testing.assert_close(teacher.state_dict(), before, **EXACT)
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    optimised = {id(p) for group in t.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in t.model.parameters()}
    assert t.model.state_dict().keys() == tiny.bert().state_dict().keys()
    t.save_model(tmp_path / "saved")
    assert not [name for name in (tmp_path / "saved").iterdir() if "teacher" in name.name]


def test_the_teacher_may_be_a_folder(tmp_path: Path) -> None:
    teacher = tiny.bert(2, layers=3)
    folder = tiny.model_folder(tmp_path / "teacher", teacher)
    losses = [
        bert_trainer(tmp_path / "run", teacher_model=given, args_max_steps=3).train().training_loss
        for given in (teacher, folder, str(folder))
    ]
    assert losses[0] == losses[1] == losses[2]


def test_stored_logits_stand_for_the_teacher(tmp_path: Path) -> None:
    data, teacher = tiny.dataset(40), tiny.bert(2, layers=3).eval()
    collator = bert_trainer(tmp_path)
    with torch.no_grad():
        logits = teacher(**{k: v for k, v in batch(collator, data).items() if k != "labels"}).logits
    stored = data.add_column("teacher_logits", logits.tolist())

    live = bert_trainer(tmp_path, teacher_model=teacher, args_num_train_epochs=2, args_optim="sgd")
    live.train()
    kept = bert_trainer(tmp_path, teacher_model=None, train_dataset=stored, args_num_train_epochs=2, args_optim="sgd")
    kept.train()
    torch.testing.assert_close(kept.model.state_dict(), live.model.state_dict(), rtol=1e-4, atol=1e-6)

    unused = tiny.bert(2, layers=3)
    unused.forward = None  # type: ignore[assignment]  # would fail if it were called
    both = bert_trainer(
        tmp_path,
        teacher_model=unused,
        train_dataset=stored,
        eval_dataset=stored,
        args_num_train_epochs=2,
        args_optim="sgd",
    )
    both.train()
    torch.testing.assert_close(both.model.state_dict(), kept.model.state_dict(), **EXACT)
    assert both.evaluate()["eval_loss"] > 0
    unlabelled = stored.remove_columns("labels")
    assert both.predict(unlabelled).predictions.shape == (40, 2)


def test_a_stream_without_logits_and_teacher_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    stream = tiny.dataset(8).to_iterable_dataset()
    stream = type(stream)(stream._ex_iterable)  # its columns are not known beforehand
    t = bert_trainer(tmp_path, teacher_model=None, train_dataset=stream, args_max_steps=1)
    with pytest.raises(ValueError, match="teacher_model is None and a batch has no 'teacher_logits'"):
        t.train()


# Logs


def test_operations_are_as_in_transformers_and_weights_counted_once(tmp_path: Path) -> None:
    t = bert_trainer(tmp_path)
    with patch.object(type(t.model), "num_parameters", autospec=True) as counted:
        counted.side_effect = PreTrainedModel.num_parameters
        t.train()
        times = counted.call_count
        t.train()
        assert counted.call_count == 2 * times < t.state.global_step  # once in each
    for shape in ((3, 4), (2, 9)):
        inputs = {"input_ids": torch.zeros(shape)}
        assert t.floating_point_ops(inputs) == Trainer.floating_point_ops(t, inputs) > 0
    assert t.floating_point_ops({}) == 0
    assert t.state.total_flos > 0


@pytest.mark.parametrize("accumulate", [1, 3])
def test_parts_are_logged_and_add_up_to_the_loss(tmp_path: Path, accumulate: int) -> None:
    objective = LogitsKD(kd_weight=0.7, ce_weight=0.4)
    t = bert_trainer(
        tmp_path,
        objective=objective,
        train_dataset=tiny.dataset(67),
        args_per_device_train_batch_size=4,
        args_gradient_accumulation_steps=accumulate,
        args_num_train_epochs=2,
        args_logging_steps=2,
    )
    t.train()
    logs = [entry for entry in t.state.log_history if "loss" in entry]
    assert len(logs) == t.state.global_step // 2
    for entry in logs:
        assert entry["loss"] == pytest.approx(0.7 * entry["kd"] + 0.4 * entry["ce"], rel=1e-4)
    t.train()  # the second run's first log holds nothing of the first's end
    entry = next(entry for entry in t.state.log_history if "loss" in entry)
    assert entry["loss"] == pytest.approx(0.7 * entry["kd"] + 0.4 * entry["ce"], rel=1e-4)


def test_the_terms_of_a_sum_are_logged_by_name(tmp_path: Path) -> None:
    objective = WeightedSum({"soft": (0.5, LogitsKD(ce_weight=0)), "hard": (2.0, TaskLoss())})
    t = bert_trainer(tmp_path, objective=objective, args_logging_steps=2, args_num_train_epochs=1)
    t.train()
    for entry in t.state.log_history[:-1]:
        assert entry["loss"] == pytest.approx(0.5 * entry["soft"] + 2 * entry["hard"], rel=1e-4)


def test_unlabelled_micro_batches_are_averaged(tmp_path: Path) -> None:
    t = bert_trainer(
        tmp_path,
        objective=LogitsKD(ce_weight=0, kd_weight=2.0),
        train_dataset=tiny.dataset(24).remove_columns("labels"),
        args_per_device_train_batch_size=4,
        args_gradient_accumulation_steps=2,
        args_num_train_epochs=1,
        args_logging_steps=1,
    )
    t.train()
    assert [e["loss"] for e in t.state.log_history[:-1]] == pytest.approx(
        [2 * e["kd"] for e in t.state.log_history[:-1]]
    )


def test_nothing_is_read_from_the_device_between_logs(tmp_path: Path) -> None:
    """On a GPU, reading a number waits for it; tensors of the meta device have none to read."""
    t = bert_trainer(tmp_path)
    student = tiny.bert(1).to("meta")
    t.teacher_model.to("meta")
    t.current_gradient_accumulation_steps = 1
    inputs = {name: tensor.to("meta") for name, tensor in batch(t, tiny.dataset(8)).items()}
    del inputs["attention_mask"]  # transformers itself looks whether there is padding
    for _ in range(2):
        loss = t.compute_loss(student.train(), inputs, num_items_in_batch=torch.tensor(8, device="meta"))
    assert loss.device.type == "meta"
    assert {name: part.device.type for name, part in t._parts.items()} == {"kd": "meta", "ce": "meta"}


# The gradient of the whole batch


def one_epoch(folder: Path, data: Any, batch_size: int, accumulate: int, **options: Any) -> DistillationTrainer:
    """Plain gradient descent without dropout: its steps are as alike as the gradients are."""
    t = bert_trainer(
        folder,
        tiny.bert(1, dropout=0.0),
        train_dataset=data,
        args_per_device_train_batch_size=batch_size,
        args_gradient_accumulation_steps=accumulate,
        args_train_sampling_strategy="sequential",
        args_num_train_epochs=1,
        args_optim="sgd",
        args_max_grad_norm=0.0,
        args_logging_steps=1,
        **options,
    )
    t.train()
    return t


@pytest.mark.parametrize(
    "number, ignored", [(24, ()), (22, ()), (24, (0, 1, 9, 17, 18, 19)), (24, (4, 5, 6, 7)), (24, tuple(range(8, 16)))]
)
def test_accumulated_gradients_are_those_of_the_whole_batch(
    tmp_path: Path, number: int, ignored: tuple[int, ...]
) -> None:
    """Also where the last micro-batch is smaller, and where micro-batches have unequal numbers of labels, or none: a
    step without labels teaches nothing."""
    data = tiny.dataset(number)
    labels = [-100 if i in ignored else label for i, label in enumerate(data["labels"])]
    data = data.remove_columns("labels").add_column("labels", labels)
    whole, parts = one_epoch(tmp_path, data, 8, 1), one_epoch(tmp_path, data, 4, 2)
    assert whole.state.global_step == parts.state.global_step == 3
    torch.testing.assert_close(parts.model.state_dict(), whole.model.state_dict(), rtol=1e-4, atol=1e-6)
    for a, b in zip(whole.state.log_history[:-1], parts.state.log_history[:-1], strict=True):
        assert [a[k] for k in ("loss", "kd", "ce")] == pytest.approx([b[k] for k in ("loss", "kd", "ce")], rel=1e-4)


@pytest.mark.parametrize("objective", [LogitsKD(), TaskLoss(), LogitsKD(ce_weight=0.0)])
def test_without_labels_nothing_is_learned(tmp_path: Path, objective: Objective) -> None:
    data = tiny.dataset(16)
    data = data.remove_columns("labels").add_column("labels", [-100] * 16)
    options = {} if objective.needs.teacher else {"teacher_model": None}
    t = one_epoch(tmp_path, data, 4, 2, objective=objective, **options)
    torch.testing.assert_close(t.model.state_dict(), tiny.bert(1, dropout=0.0).state_dict(), **EXACT)
    assert {value for entry in t.state.log_history[:-1] for k, value in entry.items() if k in ("loss", "kd", "ce")} == {
        0
    }


# Resuming


@pytest.mark.parametrize("steps", [3, 5, 7, 10])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, steps: int) -> None:
    """Five steps an epoch: stopped within the first, at an epoch's end, and within the second; with dropout."""
    options = {
        "args_num_train_epochs": 3,
        "args_save_strategy": "steps",
        "args_save_steps": steps,
        "args_logging_steps": 1,
    }
    whole = bert_trainer(tmp_path / "whole", **options)
    whole.train()
    assert whole.state.global_step == 15
    resumed = bert_trainer(tmp_path / "resumed", tiny.bert(7), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{steps}"))
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), **EXACT)
    logs = [
        [{k: e[k] for k in ("loss", "kd", "ce", "step")} for e in t.state.log_history[:-1]] for t in (whole, resumed)
    ]
    assert logs[0] == logs[1]
