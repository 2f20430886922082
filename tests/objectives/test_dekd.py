"""DeKD's objective alone; test_dekd_in_training.py has it in the trainer, tests/recipes/test_dekd.py the command."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill import (
    DeKD,
    LogitsKD,
    TeacherOutputs,
    WeightedSum,
)

EXACT = {"rtol": 0.0, "atol": 0.0}
ROOT = Path(__file__).parents[2]
B, C = 9, 4


def outputs(seed: int, *, layers: int = 3, width: int = 8, scale: float = 2.0, grad: bool = False) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_(grad)

    return SimpleNamespace(logits=draw(B, C), hidden_states=tuple(draw(B, 5, width) for _ in range(layers + 1)))


def teachers(layers: int = 6, width: int = 8) -> dict[str, Any]:
    return {"teacher": outputs(2, layers=layers, width=width), "assistant": outputs(3)}


STUDENT, TEACHERS = outputs(1), teachers()
LABELS = torch.tensor([0, 3, 1, 2, 2, 0, 1, 3, 0])


# The definition, an example and a layer at a time


def entropy(scores: Tensor) -> float:
    p = scores.detach().softmax(-1)
    return float(-(p * p.log()).sum())


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    return (p * (p / q).log()).sum()


def by_hand(
    student: Any,
    teacher: dict[str, Any],
    labels: Tensor,
    *,
    kept: list[int],
    temperature: float = 5.0,
    weights: tuple[float, float, float] = (0.5, 0.3, 0.2),
    ce_on: str = "all",
    assistant: bool = True,
    layers: int = 3,
    factor: float = 25.0,
    over_layers: str = "sum",
) -> dict[str, Tensor]:
    kept = sorted(kept, key=lambda i: entropy(student.logits[i]))  # the most certain first
    half = math.ceil(len(kept) / 2) if assistant else len(kept)
    certain, uncertain = kept[:half], kept[half:]
    of_ce = range(B) if ce_on == "all" else kept
    ce = sum(F.cross_entropy(student.logits[i], labels[i]) for i in of_ce) / len(of_ce)
    ta = sum(kl(student.logits[i], teacher["teacher"].logits[i], temperature) for i in certain) / len(certain)
    if uncertain:
        ta = ta + sum(kl(student.logits[i], teacher["assistant"].logits[i], temperature) for i in uncertain) / len(
            uncertain
        )
    states = teacher["teacher"].hidden_states[1:]
    informative = [sum(entropy(layer[i, 0]) for i in kept) / len(kept) for layer in states]
    chosen = sorted(sorted(range(len(states)), key=lambda j: informative[j], reverse=True)[:layers])
    da = 0.0
    for place, j in enumerate(chosen):
        for i in kept:
            s, t = student.hidden_states[1 + place][i, 0], states[j][i, 0]
            da = da + (s / s.norm() - t / t.norm()).pow(2).sum() / len(kept)
    da = da / layers if over_layers == "mean" else da
    ta = ta * factor * (1 if assistant else 2)
    return {"ce": ce, "ta": ta, "da": da, "loss": weights[0] * ce + weights[1] * ta + weights[2] * da}


def uncertain_first(measure: str = "entropy") -> list[int]:
    def score(i: int) -> float:
        top = STUDENT.logits[i].softmax(-1).sort(descending=True).values
        return {"entropy": entropy(STUDENT.logits[i]), "least_confidence": 1 - top[0], "margin": top[1] - top[0]}[
            measure
        ]

    return sorted(range(B), key=score, reverse=True)


@pytest.mark.parametrize("strategy", ["entropy", "least_confidence", "margin"])
@pytest.mark.parametrize("ratio, number", [(0.1, 1), (0.25, 2), (0.5, 4), (0.6, 5), (1.0, 9)])
@pytest.mark.parametrize("ce_on", ["all", "selected"])
def test_it_is_the_papers_formula(strategy: Any, ratio: float, number: int, ce_on: Any) -> None:
    loss, parts = DeKD(ratio=ratio, strategy=strategy, ce_on=ce_on).parts(STUDENT, TEACHERS, LABELS)
    expected = by_hand(STUDENT, TEACHERS, LABELS, kept=uncertain_first(strategy)[:number], ce_on=ce_on)
    torch.testing.assert_close({"loss": loss, **parts}, expected)


def test_every_setting_is_used() -> None:
    objective = DeKD(
        ratio=0.5, ce_weight=0.7, ta_weight=1.5, da_weight=3.0, temperature=2.0, scale_by_temperature=False, layers=2
    )
    loss, parts = objective.parts(STUDENT, TEACHERS, LABELS)
    expected = by_hand(
        STUDENT,
        TEACHERS,
        LABELS,
        kept=uncertain_first()[:4],
        temperature=2.0,
        weights=(0.7, 1.5, 3.0),
        layers=2,
        factor=1.0,
    )
    torch.testing.assert_close({"loss": loss, **parts}, expected)
    smooth = DeKD(label_smoothing=0.1).parts(STUDENT, TEACHERS, LABELS)[1]["ce"]
    torch.testing.assert_close(smooth, F.cross_entropy(STUDENT.logits, LABELS, label_smoothing=0.1))


def test_as_it_is_printed_and_the_mean_over_layers() -> None:
    """The two choices that the paper leaves open, each by its name."""
    for scaled in (True, False):
        for over in ("sum", "mean"):
            objective = DeKD(scale_by_temperature=scaled, over_layers=over)
            expected = by_hand(
                STUDENT, TEACHERS, LABELS, kept=uncertain_first()[:4], factor=25.0 if scaled else 1.0, over_layers=over
            )
            torch.testing.assert_close(objective(STUDENT, TEACHERS, LABELS), expected["loss"])


def test_without_an_assistant_teachers_keep_their_weight() -> None:
    """A student with the teacher in the assistant's place learns as one that has no assistant."""
    twice = {"teacher": TEACHERS["teacher"], "assistant": TEACHERS["teacher"]}
    ours, theirs = outputs(1, grad=True), outputs(1, grad=True)
    DeKD(assistant=False)(ours, TEACHERS["teacher"], LABELS).backward()
    DeKD()(theirs, twice, LABELS).backward()
    torch.testing.assert_close(ours.logits.grad, theirs.logits.grad)


def test_random_keeps_any_and_orders_them_by_entropy() -> None:
    torch.manual_seed(4)
    kept = torch.randperm(B)[:4].tolist()
    torch.manual_seed(4)
    loss = DeKD(strategy="random")(STUDENT, TEACHERS, LABELS)
    torch.testing.assert_close(loss, by_hand(STUDENT, TEACHERS, LABELS, kept=kept)["loss"])
    assert set(kept) != set(uncertain_first()[:4])


@pytest.mark.parametrize(
    "change, leaves",
    [
        ({"ratio": 1.0}, {"ce", "ta", "da"}),
        ({"assistant": False}, {"ce", "ta", "da"}),
        ({"da_weight": 0.0}, {"ce", "ta"}),
        ({"ta_weight": 0.0}, {"ce", "da"}),
        ({"ce_weight": 0.0}, {"ta", "da"}),
        ({"ratio": 1.0, "assistant": False, "da_weight": 0.0}, {"ce", "ta"}),
    ],
)
def test_parts_can_be_left_out(change: dict[str, Any], leaves: set[str]) -> None:
    objective = DeKD(**change)
    teacher = TEACHERS if objective.needs.teachers else TEACHERS["teacher"]
    loss, parts = objective.parts(STUDENT, teacher, LABELS if objective.ce_weight else None)
    kept = uncertain_first()[: 9 if objective.ratio == 1 else 4]
    expected = by_hand(STUDENT, TEACHERS, LABELS, kept=kept, assistant=objective.assistant)
    assert parts.keys() == leaves
    torch.testing.assert_close(parts, {name: expected[name] for name in leaves})
    weights = {"ce": objective.ce_weight, "ta": objective.ta_weight, "da": objective.da_weight}
    torch.testing.assert_close(loss, sum(weights[name] * expected[name] for name in leaves))


def test_the_gradient_is_that_of_the_definition() -> None:
    ours, theirs = outputs(1, grad=True), outputs(1, grad=True)
    DeKD()(ours, TEACHERS, LABELS).backward()
    by_hand(theirs, TEACHERS, LABELS, kept=uncertain_first()[:4])["loss"].backward()
    torch.testing.assert_close(ours.logits.grad, theirs.logits.grad)
    for a, b in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_widths_that_differ_are_bridged() -> None:
    objective = DeKD(layers=3, widths=(8, 12))
    projections = objective.module["projections"].double()
    wide = teachers(width=12)
    student = outputs(1, grad=True)
    found = objective.parts(student, wide, LABELS)[1]["da"]
    mapped = copy.copy(STUDENT)
    mapped.hidden_states = (None, *(p(h) for p, h in zip(projections, STUDENT.hidden_states[1:], strict=True)))
    torch.testing.assert_close(found, by_hand(mapped, wide, LABELS, kept=uncertain_first()[:4])["da"])
    objective(student, wide, LABELS).backward()
    assert all(p.grad.abs().sum() > 0 for p in projections.parameters())
    with pytest.raises(ValueError, match=r"but widths is None; expected widths=\(8, 12\)"):
        DeKD()(STUDENT, wide, LABELS)


def test_what_is_kept_can_be_logged() -> None:
    parts = DeKD(log_selection=True).parts(STUDENT, TEACHERS, LABELS)[1]
    kept = uncertain_first()[:4]
    bins = [int(10 * entropy(STUDENT.logits[i]) / math.log(C)) for i in kept]
    assert [parts[f"entropy/{k}"].item() for k in range(10)] == [bins.count(k) for k in range(10)]
    states = TEACHERS["teacher"].hidden_states[1:]
    informative = torch.tensor([sum(entropy(layer[i, 0]) for i in kept) for layer in states])
    chosen = informative.topk(3).indices.tolist()
    assert [parts[f"layer/{j}"].item() for j in range(1, 7)] == [float(j in chosen) for j in range(6)]
    even = SimpleNamespace(logits=torch.zeros(B, C, dtype=torch.float64), hidden_states=STUDENT.hidden_states)
    assert DeKD(log_selection=True).parts(even, TEACHERS, LABELS)[1]["entropy/9"] == 4  # also where it is all of 1


@pytest.mark.parametrize("ce_on", ["all", "selected"])
@pytest.mark.parametrize("unlabelled", [(3, 5), tuple(range(B)), tuple(uncertain_first()[:4])])
def test_an_example_without_a_label_has_no_cross_entropy(ce_on: Any, unlabelled: tuple[int, ...]) -> None:
    student = outputs(1, grad=True)
    labels = LABELS.clone()
    labels[list(unlabelled)] = -100
    loss, parts = DeKD(ce_on=ce_on).parts(student, TEACHERS, labels)
    rows = uncertain_first()[:4] if ce_on == "selected" else range(B)
    counted = [i for i in rows if i not in unlabelled]
    ce = F.cross_entropy(STUDENT.logits[counted], LABELS[counted]) if counted else torch.zeros_like(loss)
    torch.testing.assert_close(parts["ce"], ce)
    everything = by_hand(STUDENT, TEACHERS, LABELS, kept=uncertain_first()[:4])
    torch.testing.assert_close(loss, 0.5 * ce + 0.3 * everything["ta"] + 0.2 * everything["da"])
    loss.backward()
    assert student.logits.grad.isfinite().all()


def test_it_sums_with_others() -> None:
    both = WeightedSum({"dekd": (2.0, DeKD(assistant=False, layers=3, widths=(8, 8))), "kd": (1.0, LogitsKD())})
    both.module.double()
    expected = 2 * both.terms["dekd"][1](STUDENT, TEACHERS["teacher"], LABELS) + LogitsKD()(
        STUDENT, TEACHERS["teacher"], LABELS
    )
    torch.testing.assert_close(both(STUDENT, TEACHERS["teacher"], LABELS), expected)
    assert len(list(both.module.parameters())) == 6
    with pytest.raises(ValueError, match="terms mixes teachers: {'dekd': \\('teacher', 'assistant'\\), 'kd': \\(\\)}"):
        WeightedSum({"dekd": (1.0, DeKD()), "kd": (1.0, LogitsKD())})


# Chosen for an epoch


def chosen(*examples: int, **settings: Any) -> DeKD:
    """Of twenty."""
    objective = DeKD(select_per="epoch", ratio=len(examples) / 20, **settings)
    logits = torch.full((20, 2), 0.0)
    logits[:, 0] = 9.0
    logits[list(examples)] = 0.0
    objective.choose(logits)
    return objective


def test_an_epochs_choice_is_followed_in_its_batches() -> None:
    examples = torch.tensor([3, 19, 7, 4, 11, 0, 12, 18, 1])
    for ce_on in ("all", "selected"):
        objective = chosen(19, 4, 0, 13, 1, ce_on=ce_on)
        loss, parts = objective.parts(STUDENT, TEACHERS, LABELS, example=examples)
        torch.testing.assert_close(
            {"loss": loss, **parts}, by_hand(STUDENT, TEACHERS, LABELS, kept=[1, 3, 5, 8], ce_on=ce_on)
        )


@pytest.mark.parametrize("ce_on", ["all", "selected"])
def test_a_batch_without_a_chosen_example_asks_nobody(ce_on: Any) -> None:
    student = outputs(1, grad=True)
    silent = {name: TeacherOutputs(None, {}, stored=object()) for name in ("teacher", "assistant")}
    objective = chosen(13, ce_on=ce_on)
    loss, parts = objective.parts(student, silent, LABELS, example=torch.arange(B))
    assert parts["ta"] == parts["da"] == 0
    ce = 0.0 if ce_on == "selected" else F.cross_entropy(STUDENT.logits, LABELS).item()
    assert parts["ce"].item() == pytest.approx(ce)
    loss.backward()
    assert student.logits.grad.isfinite().all()


# What is wrong


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"ratio": 0}, ValueError, "ratio is 0"),
        ({"ratio": 1.1}, ValueError, "ratio is 1.1"),
        ({"strategy": "energy"}, ValueError, "strategy is 'energy'"),
        ({"select_per": "run"}, ValueError, "select_per is 'run'"),
        ({"ce_on": "none"}, ValueError, "ce_on is 'none'"),
        ({"ce_weight": -1.0}, ValueError, "ce_weight is -1.0"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing is 1.0"),
        ({"ta_weight": 0, "da_weight": 0}, ValueError, "ta_weight and da_weight are both 0"),
        ({"da_weight": 0, "layers": 2}, ValueError, "layers is 2 but da_weight is 0"),
        ({"da_weight": 0, "widths": (8, 8)}, ValueError, "widths is \\(8, 8\\) but da_weight is 0"),
        ({"widths": (8, 8)}, ValueError, "widths is \\(8, 8\\) but layers is None"),
        ({"layers": 0}, ValueError, "layers is 0"),
        ({"layers": 1.5}, TypeError, "layers is 1.5"),
        ({"layers": 1, "widths": (8, True)}, ValueError, r"widths is \(8, True\); expected the hidden sizes"),
        ({"layers": 1, "widths": (8, 0)}, ValueError, r"widths is \(8, 0\); expected the hidden sizes"),
        ({"layers": 1, "widths": 8}, ValueError, "widths is 8; expected the hidden sizes of student and teacher"),
        ({"assistant": None}, TypeError, "assistant is None; expected True or False"),
        ({"log_selection": 1}, TypeError, "log_selection is 1; expected True or False"),
        ({"scale_by_temperature": "yes"}, TypeError, "scale_by_temperature is 'yes'; expected True or False"),
        ({"ta_weight": 0, "temperature": 2.0}, ValueError, "temperature is 2.0 but ta_weight is 0; expected 5.0"),
        (
            {"ta_weight": 0, "scale_by_temperature": False},
            ValueError,
            "scale_by_temperature is False but ta_weight is 0",
        ),
        ({"da_weight": 0, "over_layers": "mean"}, ValueError, "over_layers is 'mean' but da_weight is 0"),
        ({"over_layers": "max"}, ValueError, "over_layers is 'max'"),
        ({"ce_weight": 0, "label_smoothing": 0.1}, ValueError, "label_smoothing is 0.1 but ce_weight is 0; expected 0"),
        ({"ce_weight": 0, "ce_on": "selected"}, ValueError, "ce_on is 'selected' but ce_weight is 0; expected 'all'"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DeKD(**settings)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: DeKD()(STUDENT, TEACHERS), "labels is None"),
        (
            lambda: DeKD()(STUDENT, None, LABELS),
            "teacher has no 'teacher'; .* needs the outputs of teacher and assistant",
        ),
        (lambda: DeKD()(STUDENT, {"teacher": STUDENT}, LABELS), "teacher has no 'assistant'"),
        (lambda: DeKD()(STUDENT, STUDENT, LABELS), "teacher has no 'teacher'"),
        (lambda: DeKD(assistant=False)(STUDENT, None, LABELS), "teacher is None"),
        (lambda: DeKD(layers=4)(STUDENT, TEACHERS, LABELS), "layers is 4; expected at most 3, the student's layers"),
        (
            lambda: DeKD()(STUDENT, teachers(layers=2), LABELS),
            "number is 3; expected from 1 to 2, the teacher's layers",
        ),
        (lambda: DeKD(select_per="epoch")(STUDENT, TEACHERS, LABELS), "example is None, but select_per is 'epoch'"),
        (
            lambda: DeKD(select_per="epoch")(STUDENT, TEACHERS, LABELS, example=LABELS),
            r"no examples are chosen yet; give the trainer callbacks=\[SelectEachEpoch",
        ),
        (
            lambda: chosen(3)(STUDENT, TEACHERS, LABELS, example=torch.arange(12, 21)),
            "example holds 20; expected numbers from 0 to 19",
        ),
        (
            lambda: chosen(3)(STUDENT, TEACHERS, LABELS, example=torch.arange(-1, 8)),
            "example holds -1; expected numbers from 0 to 19",
        ),
        (
            lambda: DeKD()(SimpleNamespace(logits=torch.zeros(2, 5, C)), TEACHERS, LABELS),
            r"student.logits has shape \(2, 5, 4\); expected \[B, C\]",
        ),
        (
            lambda: DeKD()(SimpleNamespace(logits=STUDENT.logits), TEACHERS, LABELS),
            "student has no hidden_states; call the model with output_hidden_states=True",
        ),
    ],
)
def test_what_does_not_fit_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
