"""Teams of teachers: their stored logits, and the objectives of several teachers."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding

from fastdistill import DistillationTrainer, WeightedSum
from fastdistill.objectives.logits import TaskLoss
from fastdistill.objectives.team import MTBERT, AvgKD, SampledTeacher
from fastdistill.teachers.team import TeacherTeam
from tests import tiny
from tests.training.trained import bert_trainer

EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 0.0, "atol": 5e-5}
"""Of logits, which plain PyTorch has in float32 with errors of 1e-5, and others with other such errors."""
NAMES = ("small", "wide", "deep")
B, C = 7, 4


def models() -> dict[str, Any]:
    wide = {"hidden_size": 24, "num_attention_heads": 3}
    return {"small": tiny.bert(1, layers=1), "wide": tiny.bert(2, **wide), "deep": tiny.bert(3, layers=3)}


def collate(words: list[str] = tiny.WORDS) -> DataCollatorWithPadding:
    return DataCollatorWithPadding(tiny.tokenizer(words))


def logits_of(model: Any, dataset: Any) -> Tensor:
    batch = collate()([dict(row) for row in dataset.select_columns(["input_ids", "attention_mask"])])
    with torch.no_grad():
        return model.eval()(**batch).logits  # type: ignore[no-any-return]


# Storing


def test_a_teams_logits_become_columns(tmp_path: Path) -> None:
    team, dataset = TeacherTeam(models()), tiny.dataset(12)
    stored = team.store(dataset, collate=collate(), folder=tmp_path)
    assert stored.column_names == [*dataset.column_names, *(f"{name}_logits" for name in NAMES)]
    for name, model in team.items():
        torch.testing.assert_close(torch.tensor(stored[f"{name}_logits"][:]), logits_of(model, dataset), **CLOSE)
    files = sorted(tmp_path.iterdir())
    assert [file.name.partition("-")[0] for file in files] == sorted(NAMES)
    again = team.store(dataset, collate=collate(), folder=tmp_path)
    assert again[:] == stored[:]
    assert sorted(tmp_path.iterdir()) == files


def test_a_teacher_with_another_tokenizer(tmp_path: Path) -> None:
    """Of the same words with other numbers; the student sees nothing of it."""
    backwards = tiny.WORDS[::-1]
    sentences = [row["sentence1"] for row in tiny.rows(12)]
    dataset = tiny.dataset(12)
    ids = tiny.tokenizer(backwards)(sentences)
    theirs = dataset.remove_columns(["input_ids"]).add_column("input_ids", ids["input_ids"])
    team = TeacherTeam(models())
    collates = {name: collate(backwards if name == "wide" else tiny.WORDS) for name in NAMES}
    stored = team.store(dataset, collate=collates, inputs={"wide": theirs}, folder=tmp_path)
    assert stored["input_ids"][:] == dataset["input_ids"][:]
    torch.testing.assert_close(torch.tensor(stored["wide_logits"][:]), logits_of(team["wide"], theirs), **CLOSE)
    torch.testing.assert_close(torch.tensor(stored["deep_logits"][:]), logits_of(team["deep"], dataset), **CLOSE)

    options: dict[str, Any] = {"collate": collates, "folder": tmp_path}
    with pytest.raises(ValueError, match="has 11 examples but dataset 12"):
        team.store(dataset, inputs={"wide": theirs.select(range(11))}, **options)
    with pytest.raises(ValueError, match="has other labels"):
        team.store(dataset, inputs={"wide": theirs.select(range(11, -1, -1))}, **options)
    with pytest.raises(ValueError, match="inputs has other; expected names of small, wide, deep"):
        team.store(dataset, inputs={"other": theirs}, **options)
    with pytest.raises(ValueError, match="collate has no deep"):
        team.store(dataset, collate={"small": collate(), "wide": collate()}, folder=tmp_path)


def runs(team: TeacherTeam) -> dict[str, list[int]]:
    """How many examples each call of each teacher has, from now on."""
    seen: dict[str, list[int]] = {name: [] for name in team}
    for name, model in team.items():
        model.register_forward_pre_hook(
            lambda module, args, inputs, name=name: seen[name].append(len(inputs["input_ids"])), with_kwargs=True
        )
    return seen


def test_a_teacher_that_has_changed_runs_alone(tmp_path: Path) -> None:
    team, dataset = TeacherTeam(models()), tiny.dataset(12)
    before = team.store(dataset, collate=collate(), folder=tmp_path)
    again = TeacherTeam({name: team[name] for name in reversed(NAMES)})
    seen = runs(again)
    after = again.store(dataset, collate=collate(), folder=tmp_path)  # in another order
    assert all(not calls for calls in seen.values())
    assert after.column_names == [*dataset.column_names, *(f"{name}_logits" for name in reversed(NAMES))]
    with torch.no_grad():
        again["small"].classifier.bias[0] += 1
    after = again.store(dataset, collate=collate(), folder=tmp_path)
    assert {name for name, calls in seen.items() if calls} == {"small"}
    assert after["wide_logits"][:] == before["wide_logits"][:]
    torch.testing.assert_close(torch.tensor(after["small_logits"][:]), logits_of(again["small"], dataset), **CLOSE)


def test_the_format_is_the_datasets(tmp_path: Path) -> None:
    team, dataset = TeacherTeam(models()), tiny.dataset(12)
    formatted = dataset.with_format("torch", columns=["labels"], output_all_columns=True)
    theirs = dataset.with_format("numpy", columns=["input_ids"])
    options: dict[str, Any] = {"collate": collate(), "folder": tmp_path}
    stored = team.store(formatted, inputs={"wide": theirs}, **options)
    row = stored[0]
    assert row.keys() == set(stored.column_names)
    assert isinstance(row["wide_logits"], Tensor) and isinstance(row["labels"], Tensor)
    assert isinstance(row["input_ids"], list)
    with pytest.raises(ValueError, match="has other labels"):
        team.store(formatted, inputs={"wide": theirs.select(range(11, -1, -1))}, **options)


def test_a_column_that_is_there_is_named_before_a_teacher_runs(tmp_path: Path) -> None:
    team, dataset = TeacherTeam(models()), tiny.dataset(12).add_column("deep_hidden_states", [0] * 12)
    seen = runs(team)
    for inputs in ({}, {"deep": tiny.dataset(12)}):
        with pytest.raises(ValueError, match="dataset has a column 'deep_hidden_states' already"):
            team.store(dataset, collate=collate(), inputs=inputs, folder=tmp_path)
    assert all(not calls for calls in seen.values())


def test_a_team_must_be_of_the_same_labels() -> None:
    named = {"id2label": {0: "low", 1: "high"}, "label2id": {"low": 0, "high": 1}}
    other = {"id2label": {0: "high", 1: "low"}, "label2id": {"low": 1, "high": 0}}
    TeacherTeam({"a": tiny.bert(), "b": tiny.bert(**named)})  # one that names none agrees
    with pytest.raises(ValueError, match=r"teachers\['b'\] has the labels high, low but those before it low, high"):
        TeacherTeam({"a": tiny.bert(**named), "b": tiny.bert(**other)})
    with pytest.raises(ValueError, match=r"teachers\['c'\] has the labels high, low but those before it low, high"):
        TeacherTeam({"a": tiny.bert(), "b": tiny.bert(**named), "c": tiny.bert(**other)})
    with pytest.raises(TypeError, match=r"teachers\['b'\] is a Linear; expected a transformers.PreTrainedModel"):
        TeacherTeam({"a": tiny.bert(), "b": torch.nn.Linear(1, 1)})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="LABEL_2"):
        TeacherTeam({"a": tiny.bert(), "b": tiny.bert(num_labels=3)})
    with pytest.raises(ValueError, match="the name 'a b'"):
        TeacherTeam({"a b": tiny.bert()})
    with pytest.raises(ValueError, match="teachers is empty"):
        TeacherTeam({})


# Objectives in a plain loop


def outputs(seed: int, grad: bool = False) -> Any:
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(B, C, generator=draw, dtype=torch.float64)
    return SimpleNamespace(logits=logits.requires_grad_(grad))


LABELS = torch.arange(B) % C
TEAM = {name: outputs(seed) for seed, name in enumerate(NAMES, 1)}


def soft_ce(student: Any, teacher: Any, temperature: float) -> Tensor:
    target = (teacher.logits / temperature).softmax(-1)
    return -(temperature**2) * (target * (student.logits / temperature).log_softmax(-1)).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_avgkd(temperature: float) -> None:
    student = outputs(0, grad=True)
    loss = AvgKD(NAMES, temperature)(student, TEAM)
    expected = torch.stack([soft_ce(student, TEAM[name], temperature).mean() for name in NAMES]).mean()
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(one, student.logits)[0] for one in (loss, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_mtbert(temperature: float) -> None:
    student = outputs(0, grad=True)
    loss = MTBERT(NAMES, temperature)(student, TEAM, LABELS)
    expected = torch.zeros((), dtype=torch.float64)
    for name in NAMES:
        ce = torch.nn.functional.cross_entropy(TEAM[name].logits, LABELS, reduction="none")
        expected = expected + (soft_ce(student, TEAM[name], temperature) / (1 + ce)).mean()
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(one, student.logits)[0] for one in (loss, expected)]
    torch.testing.assert_close(*gradients)


class Strict(nn.Module):
    """Takes what it names, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny.bert(1, dropout=0.0)
        self.config = self.inner.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("models", [("a",), ("a", "b"), ()])
def test_a_student_sees_no_teachers_columns(tmp_path: Path, models: tuple[str, ...]) -> None:
    """Whichever teacher is drawn."""
    data = tiny.dataset(24)
    for name in {"a", "b"} - set(models):
        data = data.add_column(f"{name}_logits", [[1.0, 0.0]] * 24)
        data = data.add_column(f"{name}_hidden_states", np.zeros((24, 3, 16)).tolist())
    teachers = {name: tiny.bert(2) for name in models} or None
    objective = SampledTeacher({"a": 0.5, "b": 0.5}, seed=1)
    t = bert_trainer(
        tmp_path, Strict(), teacher_model=teachers, objective=objective, train_dataset=data, args_max_steps=6
    )
    assert math.isfinite(t.train().training_loss)


@pytest.mark.parametrize("make", [AvgKD, MTBERT, lambda names: SampledTeacher({names[0]: 1.0})])
def test_examples_without_a_label_do_not_count(make: Any) -> None:
    student, there = outputs(0, grad=True), LABELS != 1
    with torch.no_grad():
        student.logits[~there] *= 100
    loss = make(NAMES)(student, TEAM, LABELS.where(there, -100))
    fewer = SimpleNamespace(logits=student.logits[there])
    expected = make(NAMES)(
        fewer, {name: SimpleNamespace(logits=TEAM[name].logits[there]) for name in NAMES}, LABELS[there]
    )
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(one, student.logits)[0] for one in (loss, expected)]
    torch.testing.assert_close(*gradients)
    assert (gradients[0][~there] == 0).all()


def test_sampled_teachers_are_sampled_by_theta() -> None:
    theta = {"small": 0.5, "wide": 0.0, "deep": 0.5}
    student = outputs(0)
    objective, again = SampledTeacher(theta, seed=4), SampledTeacher(theta, seed=4)
    possible = {float(soft_ce(student, TEAM[name], 1.0).mean()): name for name in NAMES}

    def drawn(objective: SampledTeacher) -> list[str]:
        losses = [float(objective(student, TEAM)) for _ in range(200)]
        return [next(name for value, name in possible.items() if abs(value - loss) < 1e-9) for loss in losses]

    names = drawn(objective)
    assert set(names) == {"small", "deep"}
    assert 70 < names.count("small") < 130
    assert drawn(again) == names
    assert drawn(SampledTeacher(theta, seed=5)) != names


def test_no_other_teacher_is_looked_at() -> None:
    loss = SampledTeacher({"small": 1.0, "wide": 0.0})(outputs(0), {"small": TEAM["small"], "wide": None})
    torch.testing.assert_close(loss, soft_ce(outputs(0), TEAM["small"], 1.0).mean())


@pytest.mark.parametrize(
    "theta, error, message",
    [
        ({"a": 0.5, "b": 0.4}, ValueError, "theta sums to 0.9; expected 1"),
        ({"a": 1.5, "b": -0.5}, ValueError, r"theta\['b'\] is -0.5"),
        ({"a": float("nan")}, ValueError, r"theta\['a'\] is nan"),
        ({}, TypeError, "expected a dictionary"),
        ([1.0], TypeError, "expected a dictionary"),
    ],
)
def test_theta_must_be_a_distribution(theta: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SampledTeacher(theta)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="labels is None"):
        MTBERT(NAMES)(outputs(0), TEAM)
    with pytest.raises(
        ValueError, match="teacher is of small; expected a dictionary of the outputs of small, wide, deep"
    ):
        AvgKD(NAMES)(outputs(0), {"small": TEAM["small"]})
    with pytest.raises(ValueError, match="teacher is None"):
        SampledTeacher({"a": 1.0})(outputs(0))
    for names in ((), ("a", "a")):
        with pytest.raises(ValueError, match="one or more different names"):
            AvgKD(names)
    with pytest.raises(TypeError, match="a tuple"):
        MTBERT("abc")  # type: ignore[arg-type]


# In the trainer


def train(folder: Path, objective: Any, dataset: Any, teachers: Any = None, resume: Any = None, **args: Any) -> Any:
    trainer = DistillationTrainer(
        model=tiny.bert(5, layers=1),
        teacher_model=teachers,
        objective=objective,
        train_dataset=dataset,
        processing_class=tiny.tokenizer(),
        args=tiny.config(folder, num_train_epochs=2, **args),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("make", [MTBERT, lambda names: SampledTeacher(dict.fromkeys(names, 1 / 3))])
def test_stored_logits_train_as_the_teachers_would(tmp_path: Path, make: Any) -> None:
    team, dataset = TeacherTeam(models()), tiny.dataset(24)
    stored = team.store(dataset, collate=collate(), folder=tmp_path / "stored")
    from_columns = train(tmp_path / "a", make(NAMES), stored, logging_steps=1)
    from_models = train(tmp_path / "b", make(NAMES), dataset, team, logging_steps=1)
    ours, theirs = ([x["loss"] for x in t.state.log_history if "loss" in x] for t in (from_columns, from_models))
    assert len(ours) == 6
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_resumed_run_samples_the_same(tmp_path: Path) -> None:
    stored = TeacherTeam(models()).store(tiny.dataset(40), collate=collate(), folder=tmp_path / "stored")

    def objective() -> WeightedSum:
        theta = {"small": 0.3, "wide": 0.3, "deep": 0.4}
        return WeightedSum({"kd": (1.0, SampledTeacher(theta, seed=3)), "task": (0.1, TaskLoss())})

    saving = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
    whole = train(tmp_path / "whole", objective(), stored, **saving)
    again = train(tmp_path / "again", objective(), stored, resume=str(tmp_path / "whole" / "checkpoint-3"), **saving)
    for ours, theirs in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    losses = [[entry["kd"] for entry in t.state.log_history if "kd" in entry] for t in (whole, again)]
    assert losses[0] == losses[1]
