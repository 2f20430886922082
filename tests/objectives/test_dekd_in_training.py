"""DeKD's objective in the trainer, in one process and in two."""

from __future__ import annotations

import copy
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding

from fastdistill import (
    DeKD,
    DistillationTrainer,
    SelectEachEpoch,
    TeacherOutputs,
    WeightedSum,
    uncertainty,
)
from fastdistill.recipes.plots import shares
from fastdistill.training.each_epoch import predict
from tests import tiny
from tests.parallel import launched

EXACT = {"rtol": 0.0, "atol": 0.0}


class Watched(nn.Module):
    """A model that notes how many rows, and of which examples, it is called with."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.seen = model, model.config, []

    def forward(self, output_hidden_states: bool = False, **inputs: Any) -> Any:
        self.seen.append(inputs["input_ids"].clone())
        return self.model(output_hidden_states=output_hidden_states, **inputs)


def models(*, width: int = 16) -> dict[str, Any]:
    return {"teacher": tiny.bert(2, layers=3, hidden_size=width), "assistant": tiny.bert(3, layers=2)}


def trainer(folder: Path, objective: Any = None, data: Any = None, **options: Any) -> DistillationTrainer:
    args = {name.removeprefix("args_"): options.pop(name) for name in list(options) if name.startswith("args_")}
    settings = {
        "model": tiny.bert(1),
        "teacher_model": models(),
        "train_dataset": tiny.dataset(40) if data is None else data,
        "processing_class": tiny.tokenizer(),
        "objective": DeKD(log_selection=True) if objective is None else objective,
        "args": tiny.config(folder, **{"num_train_epochs": 2, "logging_steps": 1, **args}),
    }
    if settings["objective"].select_per == "epoch":
        settings["callbacks"] = [SelectEachEpoch(settings["objective"])]
    return DistillationTrainer(**settings | options)


def numbered(number: int = 40) -> Any:
    return tiny.dataset(number).add_column("example", list(range(number)))


@pytest.mark.parametrize(
    "settings, teacher_rows, assistant_rows",
    [
        ({}, 4, 2),  # of a batch of eight four are kept; to align, the teacher sees them all
        ({"da_weight": 0.0}, 2, 2),
        ({"ratio": 0.6, "da_weight": 0.0}, 3, 2),
        ({"ratio": 0.1}, 1, 0),
        ({"ratio": 1.0}, 8, 4),
    ],
)
def test_teachers_see_the_rows_routed_to_them(
    tmp_path: Path, settings: dict[str, Any], teacher_rows: int, assistant_rows: int
) -> None:
    watched = {name: Watched(model) for name, model in models().items()}
    data = tiny.dataset(40)
    t = trainer(tmp_path, DeKD(**settings), data, teacher_model=watched)
    t.train()
    assert {len(ids) for ids in watched["teacher"].seen} == {teacher_rows}
    assert len(watched["teacher"].seen) == 10
    assert {len(ids) for ids in watched["assistant"].seen} == ({assistant_rows} if assistant_rows else set())
    for ids in watched["teacher"].seen:
        assert (ids[:, -1] != tiny.tokenizer().pad_token_id).any()  # no longer than the longest row


def test_the_rows_are_the_uncertain_ones(tmp_path: Path) -> None:
    watched = {name: Watched(model) for name, model in models().items()}
    data = tiny.dataset(8)
    t = trainer(
        tmp_path, DeKD(da_weight=0.0), data, model=tiny.bert(1, dropout=0.0), teacher_model=watched, args_max_steps=1
    )
    inputs = dict(t.data_collator([data.remove_columns("length")[i] for i in range(8)]))
    inputs.pop("labels")
    with torch.no_grad():
        logits = tiny.bert(1, dropout=0.0)(**inputs).logits
    order = sorted(
        range(8), key=lambda i: float(torch.distributions.Categorical(logits=logits[i]).entropy()), reverse=True
    )
    t.train()
    asked = {name: [tokens(row) for row in w.seen[0]] for name, w in watched.items()}
    assert asked == {
        "teacher": [data[i]["input_ids"] for i in order[2:4]],
        "assistant": [data[i]["input_ids"] for i in order[:2]],
    }


def tokens(row: Tensor) -> list[int]:
    return [i for i in row.tolist() if i != tiny.tokenizer().pad_token_id]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"da_weight": 0.0}, {"assistant": False}, {"select_per": "epoch"}])
def test_stored_columns_stand_for_the_teachers(tmp_path: Path, settings: dict[str, Any]) -> None:
    data = numbered()
    collator = trainer(tmp_path, data=data).data_collator
    inputs = dict(collator([data.remove_columns(["length", "example"])[i] for i in range(40)]))
    inputs.pop("labels")
    stored = data
    for name, model in models().items():
        with torch.no_grad():
            said = model.eval()(**inputs, output_hidden_states=True)
        stored = stored.add_column(f"{name}_logits", said.logits.tolist())
        if name == "teacher":
            states = torch.stack([layer[:, 0] for layer in said.hidden_states], 1)
            stored = stored.add_column("teacher_hidden_states", states.tolist())
    live = trainer(tmp_path, DeKD(**settings), data, teacher_model=given(settings), args_optim="sgd")
    live.train()
    kept = trainer(tmp_path, DeKD(**settings), stored, teacher_model=None, args_optim="sgd")
    kept.train()
    torch.testing.assert_close(kept.model.state_dict(), live.model.state_dict(), rtol=1e-4, atol=1e-6)
    one = stored.remove_columns(
        [f"{name}_logits" for name in (("teacher",) if "assistant" in settings else ("assistant",))]
    )
    mixed = trainer(tmp_path, DeKD(**settings), one, teacher_model=given(settings), args_optim="sgd")  # the rest is run
    mixed.train()
    torch.testing.assert_close(mixed.model.state_dict(), live.model.state_dict(), rtol=1e-4, atol=1e-6)


def given(settings: dict[str, Any]) -> Any:
    return models()["teacher"] if settings.get("assistant") is False else models()


def test_the_plain_loop_learns_as_the_trainer_does(tmp_path: Path) -> None:
    options = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 3}
    options["train_sampling_strategy"] = "sequential"
    student = tiny.bert(1, dropout=0.0)
    t = trainer(tmp_path, model=copy.deepcopy(student), **{f"args_{name}": value for name, value in options.items()})
    t.train()
    data, ours, objective = tiny.dataset(40).remove_columns("length"), models(), DeKD()
    optimizer = torch.optim.SGD(student.parameters(), 1e-2)
    for start in range(0, 24, 8):
        batch = dict(t.data_collator([data[i] for i in range(start, start + 8)]))
        labels = batch.pop("labels")
        batch["output_hidden_states"] = True
        answers = {name: TeacherOutputs(model.eval(), batch) for name, model in ours.items()}
        optimizer.zero_grad()
        objective(student.train()(**batch), answers, labels).backward()
        optimizer.step()
    torch.testing.assert_close(t.model.state_dict(), student.state_dict(), rtol=1e-5, atol=1e-7)


def test_parts_and_choices_are_logged(tmp_path: Path) -> None:
    t = trainer(tmp_path, args_logging_steps=3)
    t.train()
    for entry in t.state.log_history[:-1]:
        loss = 0.5 * entry["ce"] + 0.3 * entry["ta"] + 0.2 * entry["da"]
        assert entry["loss"] == pytest.approx(loss, rel=1e-4)
        assert sum(entry[f"entropy/{i}"] for i in range(10)) == 12  # of each of three batches four
        assert sum(entry[f"layer/{j}"] for j in (1, 2, 3)) == 6


def test_shares_are_of_all_that_was_kept(tmp_path: Path) -> None:
    """Whatever batches hold of it, or whether they hold any, and however many of their examples are labelled."""
    objective = DeKD(select_per="epoch", ratio=0.1, strategy="random", log_selection=True)
    kept: list[Tensor] = []

    def parts(student: Any, *args: Any, example: Tensor) -> Any:
        kept.append(uncertainty(student.logits.detach()[objective.module["chosen"].among(example)]))
        return DeKD.parts(objective, student, *args, example=example)

    objective.parts = parts  # type: ignore[method-assign]
    data = numbered()
    labels = [-100 if place % 3 else label for place, label in enumerate(data["labels"])]
    data = data.remove_columns("labels").add_column("labels", labels)
    options = {"args_gradient_accumulation_steps": 2, "args_num_train_epochs": 4, "args_logging_steps": 2}
    t = trainer(tmp_path, objective, data, **options)
    t.train()
    found = shares(t.state.log_history, "entropy")
    micro_batches = [kept[:5], kept[5:10], kept[10:15], kept[15:]]  # an epoch's three steps, of two, two and one
    steps = [torch.cat(part) for epoch in micro_batches for part in (epoch[:2], epoch[2:4], epoch[4:])]
    logs = [torch.cat(steps[i : i + 2]) for i in range(0, 12, 2)]
    assert len({len(part) for part in logs}) > 1 and any(not len(part) for epoch in micro_batches for part in epoch)
    for place, entropies in enumerate(logs):
        column = [row[place] for row in found]
        bins = (10 * entropies).long().clamp(max=9).bincount(minlength=10) / len(entropies)
        torch.testing.assert_close(torch.tensor(column), bins, equal_nan=True)
    layers = torch.tensor(shares(t.state.log_history, "layer", 2)).sum(0)
    asked = torch.tensor([bool(len(part)) for part in logs])
    torch.testing.assert_close(layers, torch.where(asked, 2.0, math.nan), equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("select_per", ["batch", "epoch"])
@pytest.mark.parametrize("strategy", ["entropy", "random"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, select_per: Any, strategy: Any) -> None:
    """Five steps an epoch: stopped within the first, at its end, and within the second; with dropout."""

    def run(folder: str, seed: int, checkpoint: int | None, **args: Any) -> DistillationTrainer:
        torch.manual_seed(seed)  # of the projections
        objective = DeKD(strategy=strategy, select_per=select_per, layers=2, widths=(16, 24), log_selection=True)
        t = trainer(tmp_path / folder, objective, numbered(), teacher_model=models(width=24), **args)
        t.train(resume_from_checkpoint=checkpoint and str(tmp_path / "whole" / f"checkpoint-{checkpoint}"))
        return t

    whole = run("whole", 0, None, args_save_strategy="steps", args_save_steps=1)
    for step in (3, 5, 8):
        resumed = run(f"resumed-{step}", 1, step)
        for one, other in ((whole.model, resumed.model), (whole.objective.module, resumed.objective.module)):
            torch.testing.assert_close(other.state_dict(), one.state_dict(), **EXACT)
        assert resumed.state.log_history[:-1] == whole.state.log_history[:-1]


def test_per_epoch_teachers_see_the_chosen_alone(tmp_path: Path) -> None:
    watched = {name: Watched(model) for name, model in models().items()}
    data = numbered()
    objective = DeKD(select_per="epoch", ratio=0.3, strategy="random")
    flags: list[set[tuple[int, ...]]] = []

    class Note(SelectEachEpoch):
        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            super().on_epoch_begin(*args, **kwargs)
            places = objective.module["chosen"].flags.nonzero().squeeze(1).tolist()
            flags.append({tuple(data[i]["input_ids"]) for i in places})
            seen.append(len(watched["teacher"].seen))

    seen: list[int] = []
    t = trainer(tmp_path, objective, data, teacher_model=watched, callbacks=[Note(objective)])
    t.train()
    seen.append(len(watched["teacher"].seen))
    for epoch in range(2):
        rows = [tuple(tokens(row)) for ids in watched["teacher"].seen[seen[epoch] : seen[epoch + 1]] for row in ids]
        assert len(rows) == 12
        assert set(rows) == flags[epoch]
    assert flags[0] != flags[1]


def test_bf16(tmp_path: Path) -> None:
    t = trainer(tmp_path, args_bf16=True)
    assert math.isfinite(t.train().training_loss)


def with_column(name: str, width: int = 2) -> Any:
    return tiny.dataset(8).add_column(name, [[0.0] * width] * 8)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            lambda: {"teacher_model": models()["teacher"]},
            "teacher_model\\['assistant'\\] is None and train_dataset has",
        ),
        (
            lambda: {"teacher_model": {"assistant": models()["assistant"]}},
            "teacher_model is None and train_dataset has no",
        ),
        (
            lambda: {"teacher_model": {**models(), "aide": tiny.bert(4)}},
            "teacher_model has aide, but .* by the names teacher, assistant",
        ),
        (
            lambda: {"objective": DeKD(assistant=False)},
            "teacher_model has assistant, but objective .* uses one model",
        ),
        (
            lambda: {"teacher_model": {**models(), "assistant": tiny.bert(3, num_labels=3)}},
            "teacher_model\\['assistant'\\] has 3 labels but model has 2",
        ),
        (
            lambda: {"objective": DeKD(select_per="epoch")},
            "train_dataset has no column 'example', which objective DeKD",
        ),
        (
            lambda: {"data": with_column("teacher_logits"), "teacher_model": models()},
            "needs the teacher's hidden states, .* or with 'teacher_hidden_states' too",
        ),
        (
            lambda: {"data": with_column("assistant_logits", 3)},
            "train_dataset has 3 assistant_logits an example but model 2",
        ),
        (
            lambda: {"model": tiny.bert(1, num_labels=1)},
            "objective is DeKD\\(.*, for classes, but model has one output",
        ),
    ],
)
def test_what_does_not_go_together_is_named(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options())


# Two processes


def train(folder: Path, processes: int) -> None:
    """With all examples kept and no halves, nothing depends on which micro-batch an example is in.

    In "rare", where one is kept an epoch, most of the time no process aligns, and never more than one."""
    torch.manual_seed(int(os.environ.get("RANK", 0)))  # each process draws other projections, and must use the first's
    objective = DeKD(select_per="epoch", assistant=False, da_weight=0.0, log_selection=True)
    aligned = WeightedSum({"dekd": (1.0, DeKD(ratio=1.0, assistant=False, layers=1, widths=(16, 24)))})
    rare = DeKD(select_per="epoch", ratio=1 / 48, assistant=False, layers=1, widths=(16, 24))
    for name, each in (("epoch", objective), ("widths", aligned), ("rare", rare)):
        t = DistillationTrainer(
            model=tiny.bert(1, layers=1, dropout=0.0),
            teacher_model=tiny.bert(2, layers=1, hidden_size=24),
            objective=each,
            train_dataset=numbered(48),
            processing_class=tiny.tokenizer(),
            callbacks=[] if each is aligned else [SelectEachEpoch(each)],
            args=tiny.config(
                folder,
                per_device_train_batch_size=8 // processes,
                num_train_epochs=1 if each is objective else 2,
                gradient_accumulation_steps=2,
                optim="sgd",
                per_device_eval_batch_size=4,
            ),
        )
        t.train()
        if t.is_world_process_zero():
            state = {**t.model.state_dict(), **{f"own.{k}": v for k, v in each.module.state_dict().items()}}
            torch.save(state, folder / f"{name}.pt")
    words = DataCollatorWithPadding(tiny.tokenizer())
    one = predict(tiny.bert(1), numbered(1).remove_columns("length"), words, 4)  # fewer examples than processes
    torch.save(one, folder / f"predicted-{os.environ.get('RANK', 0)}.pt")


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with launched("tests.objectives.test_dekd_in_training", str(tmp_path / "two")):
        train(tmp_path / "one", 1)
    one, two = (torch.load(tmp_path / folder / "widths.pt", weights_only=True) for folder in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
    one, two = (torch.load(tmp_path / folder / "epoch.pt", weights_only=True) for folder in ("one", "two"))
    (flags,) = (name for name in one if "chosen" in name)
    assert one[flags].sum() == 24
    assert torch.equal(one[flags], two[flags])  # the processes found their shares of the data's predictions
    rare = torch.load(tmp_path / "two" / "rare.pt", weights_only=True)
    assert rare[flags].sum() == 1
    files = ("one/predicted-0.pt", "two/predicted-0.pt", "two/predicted-1.pt")
    one, *two = (torch.load(tmp_path / file, weights_only=True) for file in files)
    assert one.shape == (1, 2)
    for found in two:
        torch.testing.assert_close(found, one)


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(os.environ["WORLD_SIZE"]))
