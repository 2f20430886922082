from __future__ import annotations

import copy
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

from fastdistill import MSE, DistillationConfig, DistillationTrainer, LogitsKD, WeightedSum
from fastdistill.objectives.base import Needs, Objective
from fastdistill.objectives.logits import TaskLoss
from fastdistill.training.sampling import LengthGroupedSampler
from tests import tiny

EXACT = {"rtol": 0.0, "atol": 0.0}


def trainer(folder: Path, model: nn.Module | None = None, **options: Any) -> DistillationTrainer:
    """A student, a teacher and 40 examples; options that begin with `args_` go to the configuration."""
    args = {name.removeprefix("args_"): options.pop(name) for name in list(options) if name.startswith("args_")}
    settings = {
        "model": model if model is not None else tiny.bert(1),
        "teacher_model": tiny.bert(2, layers=3),
        "train_dataset": tiny.dataset(40),
        "processing_class": tiny.tokenizer(),
        "args": tiny.config(folder, **args),
    }
    return DistillationTrainer(**settings | options)


def batch(t: DistillationTrainer, dataset: Any, *places: int) -> dict[str, Tensor]:
    return dict(t.data_collator([dataset.remove_columns("length")[place] for place in places or range(len(dataset))]))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# What is learned


def test_the_student_comes_to_answer_as_the_teacher_does(tmp_path: Path) -> None:
    t = trainer(
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
    t = trainer(tmp_path, student, teacher_model=teacher, train_dataset=data, args_max_steps=1)
    assert t.objective == expected
    assert math.isfinite(t.train().training_loss)


def test_a_model_is_fine_tuned_without_a_teacher(tmp_path: Path) -> None:
    t = trainer(tmp_path, teacher_model=None, objective=TaskLoss(), args_max_steps=3)
    before = weights(t.model)
    t.train()
    assert t.teacher_model is None
    assert not torch.equal(before["classifier.weight"], t.model.classifier.weight)


def test_any_function_is_an_objective(tmp_path: Path) -> None:
    def squared(student: Any, teacher: Any, labels: Tensor | None) -> Tensor:
        return F.mse_loss(student.logits, teacher.logits)

    data = tiny.dataset(8)
    t = trainer(tmp_path, tiny.bert(1, dropout=0.0), objective=squared, train_dataset=data, args_max_steps=1)
    inputs = batch(t, data)
    labels = inputs.pop("labels")
    with torch.no_grad():
        expected = squared(t.model(**inputs), t.teacher_model(**inputs), labels)
    assert t.train().training_loss == pytest.approx(expected.item(), rel=1e-5)


def test_a_stream_of_stored_logits_trains(tmp_path: Path) -> None:
    data = tiny.dataset(16)
    stream = data.add_column("teacher_logits", [[1.0, -1.0]] * 16).to_iterable_dataset()
    t = trainer(tmp_path, teacher_model=None, train_dataset=stream, args_max_steps=2)
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
    t = trainer(tmp_path, objective=objective, eval_dataset=tiny.dataset(8), args_max_steps=1)
    t.train()
    assert objective.seen == [(3, 4)]  # two and three layers, and the embeddings
    assert t.predict(t.eval_dataset).predictions.shape == (8, 2)  # and not among the predictions


def test_bf16_computes_the_teacher_in_bf16_too(tmp_path: Path) -> None:
    seen = []

    def note(student: Any, teacher: Any, labels: Tensor | None) -> Tensor:
        seen.append(teacher.logits.dtype)
        return LogitsKD()(student, teacher, labels)

    trainer(tmp_path, objective=note, args_max_steps=2, args_bf16=True).train()
    assert seen == [torch.bfloat16] * 2


# The teacher


def test_the_teacher_is_frozen_and_apart(tmp_path: Path) -> None:
    teacher = tiny.bert(2, layers=3).train()
    before = weights(teacher)
    t = trainer(tmp_path, teacher_model=teacher, args_max_steps=3)
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
        trainer(tmp_path / "run", teacher_model=given, args_max_steps=3).train().training_loss
        for given in (teacher, folder, str(folder))
    ]
    assert losses[0] == losses[1] == losses[2]


def test_stored_logits_stand_for_the_teacher(tmp_path: Path) -> None:
    data, teacher = tiny.dataset(40), tiny.bert(2, layers=3).eval()
    collator = trainer(tmp_path)
    with torch.no_grad():
        logits = teacher(**{k: v for k, v in batch(collator, data).items() if k != "labels"}).logits
    stored = data.add_column("teacher_logits", logits.tolist())

    live = trainer(tmp_path, teacher_model=teacher, args_num_train_epochs=2, args_optim="sgd")
    live.train()
    kept = trainer(tmp_path, teacher_model=None, train_dataset=stored, args_num_train_epochs=2, args_optim="sgd")
    kept.train()
    torch.testing.assert_close(kept.model.state_dict(), live.model.state_dict(), rtol=1e-4, atol=1e-6)

    unused = tiny.bert(2, layers=3)
    unused.forward = None  # type: ignore[assignment]  # would fail if it were called
    both = trainer(
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
    t = trainer(tmp_path, teacher_model=None, train_dataset=stream, args_max_steps=1)
    with pytest.raises(ValueError, match="teacher_model is None and a batch has no 'teacher_logits'"):
        t.train()


# Logs


@pytest.mark.parametrize("accumulate", [1, 3])
def test_parts_are_logged_and_add_up_to_the_loss(tmp_path: Path, accumulate: int) -> None:
    objective = LogitsKD(kd_weight=0.7, ce_weight=0.4)
    t = trainer(
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
    t = trainer(tmp_path, objective=objective, args_logging_steps=2, args_num_train_epochs=1)
    t.train()
    for entry in t.state.log_history[:-1]:
        assert entry["loss"] == pytest.approx(0.5 * entry["soft"] + 2 * entry["hard"], rel=1e-4)


def test_unlabelled_micro_batches_are_averaged(tmp_path: Path) -> None:
    t = trainer(
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
    t = trainer(tmp_path)
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
    t = trainer(
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
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    assert whole.state.global_step == 15
    resumed = trainer(tmp_path / "resumed", tiny.bert(7), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{steps}"))
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), **EXACT)
    logs = [
        [{k: e[k] for k in ("loss", "kd", "ce", "step")} for e in t.state.log_history[:-1]] for t in (whole, resumed)
    ]
    assert logs[0] == logs[1]


# Data


def test_batches_hold_similar_lengths_and_every_example_once_an_epoch() -> None:
    lengths = torch.randint(1, 100, (1003,)).tolist()
    sampler = LengthGroupedSampler(lengths, 8, seed=3, epoch=lambda: 0)
    order = list(sampler)
    assert len(sampler) == 1003
    assert sorted(order) == list(range(1003))
    leftover = [list(LengthGroupedSampler(lengths[:11], 8, seed, lambda: 0))[8:] for seed in range(50)]
    assert {i for three in leftover for i in three} == set(range(11))  # any may be left over, not the longest alone
    groups = [[lengths[i] for i in order[at : at + 8]] for at in range(0, 1003, 8)]
    spread = [max(group) - min(group) for group in groups]
    assert sum(spread) / len(spread) < 10  # of a random order: about 78
    assert np.corrcoef([np.mean(group) for group in groups], range(len(groups)))[0, 1] < 0.3  # batches are shuffled


def test_batches_of_any_seed_have_about_the_same_lengths() -> None:
    """So that students with several seeds, side by side, hardly pad each other."""
    lengths = torch.randint(1, 100, (4003,)).tolist()
    orders = [list(LengthGroupedSampler(lengths, 8, seed, epoch=lambda: 2)) for seed in range(5)]
    longest = np.array([[max(lengths[i] for i in order[at : at + 8]) for at in range(0, 4000, 8)] for order in orders])
    assert longest.max(0).sum() < 1.1 * longest.mean(0).sum()  # of lengths in an order of each seed's own: about 1.7


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = list(range(100))
    epoch = [0]

    def order(seed: int) -> list[int]:
        torch.rand(1)  # the global generator does not matter
        return list(LengthGroupedSampler(lengths, 8, seed, lambda: epoch[0]))

    first = order(0)
    assert first == order(0)
    assert first != order(1)
    epoch[0] = 1
    assert first != order(0)


def test_every_epoch_has_its_own_order(tmp_path: Path) -> None:
    orders: list[list[int]] = []

    def note(student: Any, teacher: Any, labels: Tensor | None) -> Tensor:
        orders[-1] += labels.tolist()
        return LogitsKD()(student, teacher, torch.zeros_like(labels))

    class Epochs(TrainerCallback):
        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            orders.append([])

    data = tiny.dataset(40).remove_columns("labels").add_column("labels", list(range(40)))
    trainer(tmp_path, objective=note, train_dataset=data, callbacks=[Epochs()], args_num_train_epochs=2).train()
    assert [sorted(order) for order in orders] == [list(range(40))] * 2
    assert orders[0] != orders[1]


def test_lengths_come_from_the_column_or_the_tokens(tmp_path: Path) -> None:
    data = tiny.dataset(40)
    as_list = [data[i] for i in range(40)]
    orders = [
        list(trainer(tmp_path, train_dataset=dataset)._get_train_sampler())
        for dataset in (data, data.remove_columns("length"), as_list)
    ]
    assert orders[0] == orders[1] == orders[2]


def test_examples_without_lengths_come_in_random_order(tmp_path: Path) -> None:
    pixels = [{"pixel_values": torch.rand(3, 8, 8), "labels": i % 2} for i in range(16)]
    student, teacher = (vit(seed) for seed in (1, 2))
    t = trainer(tmp_path, student, teacher_model=teacher, train_dataset=pixels, processing_class=None, args_max_steps=2)
    assert math.isfinite(t.train().training_loss)


def vit(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(**shape, image_size=8, patch_size=4, num_labels=2))


def test_evaluation_runs_no_teacher_and_keeps_the_order(tmp_path: Path) -> None:
    data = tiny.dataset(30, seed=5)

    def accuracy(evaluated: Any) -> dict[str, float]:
        return {"accuracy": float((evaluated.predictions.argmax(-1) == evaluated.label_ids).mean())}

    t = trainer(tmp_path, eval_dataset=data, compute_metrics=accuracy, args_max_steps=2)
    t.train()
    t.teacher_model.forward = None
    inputs = batch(t, data)
    with torch.no_grad():
        logits = t.model.eval()(**inputs).logits
    found = t.predict(data)
    torch.testing.assert_close(torch.tensor(found.predictions), logits)
    assert found.label_ids.tolist() == data["labels"][:]
    metrics = t.evaluate()
    assert metrics["eval_accuracy"] == pytest.approx((logits.argmax(-1) == inputs["labels"]).float().mean().item())
    # Trainer weighs its batches alike, so compare with a single batch
    t.args.per_device_eval_batch_size = 30
    assert t.evaluate()["eval_loss"] == pytest.approx(F.cross_entropy(logits, inputs["labels"]).item(), rel=1e-5)


# Configuration


def test_the_configuration_is_training_arguments_with_batches_of_similar_length(tmp_path: Path) -> None:
    (parsed,) = HfArgumentParser(DistillationConfig).parse_args_into_dataclasses(["--output_dir", str(tmp_path)])
    assert parsed.train_sampling_strategy == "group_by_length"
    own = {f.name for f in fields(DistillationConfig)} - {f.name for f in fields(TrainingArguments)}
    assert own == {"read_lengths"}
    changed = ("train_sampling_strategy", *own)
    assert all(f.metadata.get("help") for f in fields(DistillationConfig) if f.name in changed)


def test_plain_training_arguments_serve(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, save_strategy="no", disable_tqdm=True)
    assert math.isfinite(trainer(tmp_path, args=args).train().training_loss)


def stored(width: int) -> Any:
    data = tiny.dataset(8)
    return data.add_column("teacher_logits", [[0.0] * width] * len(data))


def shares_embeddings() -> dict[str, Any]:
    student, teacher = tiny.bert(1), copy.deepcopy(tiny.bert(1))
    teacher.bert.embeddings = student.bert.embeddings
    return {"model": student, "teacher_model": teacher}


def named(*names: str) -> nn.Module:
    return tiny.bert(2, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


class NoStates(nn.Module):
    def forward(self, input_ids: Tensor) -> Any: ...


@pytest.mark.parametrize(
    "options, error, message",
    [
        (lambda: {"teacher_model": tiny.bert(2, num_labels=3)}, ValueError, "teacher_model has 3 labels but model"),
        (
            lambda: {"model": named("no", "yes"), "teacher_model": named("yes", "no")},
            ValueError,
            "teacher_model.config.id2label has 'yes' at 0 but model.config.id2label at 1",
        ),
        (
            lambda: {"model": named("No", "Yes"), "teacher_model": named("YES", "maybe")},
            ValueError,
            "id2label has 'YES' at 0",
        ),
        (lambda: {"teacher_model": tiny.bert(2, vocab_size=99)}, ValueError, "teacher_model has a vocabulary of 99"),
        (lambda: {"teacher_model": vit(2)}, ValueError, "teacher_model takes pixel_values but model takes input_ids"),
        (shares_embeddings, ValueError, "teacher_model shares parameters with model"),
        (lambda: {"teacher_model": None}, ValueError, "teacher_model is None and train_dataset has no column"),
        (lambda: {"teacher_model": 3}, TypeError, "teacher_model is a int"),
        (
            lambda: {"model": nn.Linear(2, 2), "teacher_model": "somewhere"},
            TypeError,
            "teacher_model is 'somewhere', but what to load it as beside a Linear is not known",
        ),
        (
            lambda: {"objective": TaskLoss()},
            ValueError,
            r"teacher_model is given but objective TaskLoss\(label_smoothing=0.0\) uses no teacher",
        ),
        (lambda: {"objective": MSE()}, ValueError, r"objective is MSE\(.*\), for one output, but model has 2"),
        (
            lambda: {"model": tiny.bert(1, num_labels=1), "objective": LogitsKD()},
            ValueError,
            r"objective is LogitsKD\(.*\), for classes, but model has one output",
        ),
        (lambda: {"objective": 3}, TypeError, "objective is 3"),
        (
            lambda: {"objective": LastState([]), "train_dataset": stored(2)},
            ValueError,
            "needs the teacher's hidden states, but the teacher is not run where train_dataset has the column",
        ),
        (
            lambda: {"objective": LastState([]), "teacher_model": NoStates()},
            ValueError,
            "teacher_model is a NoStates, whose forward takes no output_hidden_states",
        ),
        (
            lambda: {"train_dataset": stored(3), "teacher_model": None},
            ValueError,
            "train_dataset has 3 teacher_logits an example but model 2 labels",
        ),
        (lambda: {"compute_loss_func": print}, ValueError, "compute_loss_func would be ignored"),
        (lambda: {"args_label_smoothing_factor": 0.1}, ValueError, "args.label_smoothing_factor is 0.1"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_named(tmp_path: Path, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trainer(tmp_path, **options())


@pytest.mark.parametrize(
    "student, teacher",
    [
        (("no", "yes"), ("No", "YES")),
        (("no", "yes"), ("LABEL_0", "LABEL_1")),
        (("bad", "good"), ("negative", "positive")),
    ],
)
def test_labels_in_one_order_go_together(tmp_path: Path, student: Any, teacher: Any) -> None:
    assert trainer(tmp_path, named(*student), teacher_model=named(*teacher)).teacher_model is not None


def test_the_tokenizers_are_compared_where_the_teachers_is_beside_it(tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "teacher", tiny.bert(2))
    assert trainer(tmp_path, teacher_model=folder).teacher_model is not None
    # more rows of embeddings than tokens, as for a rounded size, do not matter
    padded = tiny.model_folder(tmp_path / "padded", tiny.bert(2, vocab_size=96))
    assert trainer(tmp_path, teacher_model=padded).teacher_model is not None
    swapped = tiny.tokenizer([tiny.WORDS[1], tiny.WORDS[0], *tiny.WORDS[2:]])
    for teacher in (folder, tiny.bert().from_pretrained(folder)):  # as many tokens, in another order
        with pytest.raises(ValueError, match=r"processing_class has token 'ba' at 6 but teacher_model's tokenizer"):
            trainer(tmp_path, teacher_model=teacher, processing_class=swapped)


def test_a_teacher_without_a_trained_head_is_an_error(tmp_path: Path) -> None:
    tiny.bert(2).bert.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"has no weights for classifier.bias, classifier.weight"):
        trainer(tmp_path, teacher_model=tmp_path / "encoder")
