from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import CKD, DistillationTrainer, LogitsKD, WeightedSum
from fastdistill.objectives.ckd import TERMS
from tests import tiny

LENGTHS = [7, 4, 9, 2]
PAIRS = [(0, 0), (1, 2), (2, 4)]


def outputs(layers: int, width: int, seed: int, device: str = "cpu", tokens: int = 9) -> SimpleNamespace:
    """Hidden states with a direction in common, as those of transformers have."""
    generator = torch.Generator().manual_seed(seed)
    common = 3 * torch.randn(width, generator=generator, dtype=torch.float64)
    shape = len(LENGTHS), 9, width
    made = [common + torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(layers + 1)]
    return SimpleNamespace(hidden_states=tuple(layer[:, :tokens].to(device).requires_grad_() for layer in made))


def mask(device: str = "cpu") -> Tensor:
    return (torch.arange(9) < torch.tensor(LENGTHS)[:, None]).long().to(device)


def pair_by_hand(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """P of the docstring."""
    n, total = len(student), torch.zeros((), dtype=torch.float64)
    if n < 2:
        return total
    for i in range(n):
        p, q = (
            torch.stack([torch.cosine_similarity(h[i], h[j], dim=0) for j in range(n) if j != i]).softmax(0)
            for h in (teacher, student)
        )
        total = total + (p * (p / q).log()).sum() / n
    return total


def triple_by_hand(student: list[Tensor], teacher: list[Tensor], reach: int) -> Tensor:
    """T of the docstring."""
    n, squares = len(student), []
    for j in range(n):
        for i in range(n):
            for k in range(n):
                if len({i, j, k}) == 3 and abs(i - j) <= reach and abs(k - j) <= reach:
                    s, t = (torch.cosine_similarity(h[i] - h[j], h[k] - h[j], dim=0) for h in (student, teacher))
                    squares.append((s - t).square())
    return torch.stack(squares).mean() if squares else torch.zeros((), dtype=torch.float64)


def by_hand(student: Any, teacher: Any, reach: int, pairs: list[tuple[int, int]] = PAIRS) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {name: [] for name in TERMS}
    for b, length in enumerate(LENGTHS):
        ours = [student.hidden_states[i][b, :length] for i, _ in pairs]
        theirs = [teacher.hidden_states[j][b, :length] for _, j in pairs]
        layers = list(zip(ours, theirs, strict=True))
        tokens = [([h[x] for h in ours], [h[x] for h in theirs]) for x in range(length)]
        of_example = {
            "wr_pair": [pair_by_hand(list(s), list(t)) for s, t in layers],
            "wr_triple": [triple_by_hand(list(s), list(t), reach) for s, t in layers],
            "ltr_pair": [pair_by_hand(s, t) for s, t in tokens],
            "ltr_triple": [triple_by_hand(s, t, len(pairs)) for s, t in tokens],
        }
        for name, values in of_example.items():
            found[name].append(torch.stack(values).mean())
    return {name: torch.stack(values).mean() for name, values in found.items()}


def only(name: str, **options: Any) -> CKD:
    return CKD(**{term: float(term == name) for term in TERMS}, **options)


@pytest.mark.parametrize("window", [3, 5, 21])
def test_it_is_the_formula(device: str, window: int) -> None:
    student, teacher = outputs(2, 6, 1), outputs(4, 8, 2)
    expected = by_hand(student, teacher, window // 2)
    student, teacher = outputs(2, 6, 1, device), outputs(4, 8, 2, device)
    weights = dict(zip(TERMS, (0.5, 2.0, 3.0, 0.25), strict=True))
    loss, parts = CKD(**weights, window=window)(student, teacher, None, attention_mask=mask(device)), {}
    for name in TERMS:
        found, parts = only(name, window=window).parts(student, teacher, None, mask(device))
        assert parts.keys() == {name}
        torch.testing.assert_close(found.cpu(), expected[name])
    torch.testing.assert_close(loss.cpu(), sum(weights[name] * expected[name] for name in TERMS))


def test_gradients_are_the_formulas_for_student_and_teacher() -> None:
    ends = []
    for compute in (
        lambda s, t: CKD(window=5)(s, t, attention_mask=mask()),
        lambda s, t: sum(by_hand(s, t, 2).values()),
    ):
        student, teacher = outputs(2, 6, 1), outputs(4, 8, 2)
        compute(student, teacher).backward()
        ends.append([layer.grad for model in (student, teacher) for layer in model.hidden_states])
    for found, expected in zip(*ends, strict=True):
        assert (found is None) == (expected is None)  # the layers that are in no pair
        if found is not None:
            assert found.abs().sum() > 0
            torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_gradcheck() -> None:
    three = outputs(4, 3, 2, tokens=5)
    states = [
        layer[:3].detach().requires_grad_()
        for layer in (*outputs(2, 3, 1, tokens=5).hidden_states, *three.hidden_states)
    ]

    def loss(*layers: Tensor) -> Tensor:
        student, teacher = (SimpleNamespace(hidden_states=part) for part in (layers[:3], layers[3:]))
        return CKD(window=3, wr_triple=2.0)(student, teacher, attention_mask=mask()[:3, :5])

    assert torch.autograd.gradcheck(loss, states)


@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing(left: bool) -> None:
    """Whatever is in it, and on either side."""
    values, gradients = [], []
    for more in (0, 6):
        student, teacher = outputs(2, 6, 1), outputs(4, 8, 2)
        padded = []
        for model in (student, teacher):
            layers = model.hidden_states
            junk = [torch.full((len(LENGTHS), more, layer.shape[-1]), math.nan) for layer in layers]
            padded.append(
                [torch.cat([x, layer] if left else [layer, x], 1) for x, layer in zip(junk, layers, strict=True)]
            )
        extra = torch.zeros(len(LENGTHS), more, dtype=torch.int64)
        real = torch.cat([extra, mask()] if left else [mask(), extra], 1)
        loss = CKD(window=5)(*(SimpleNamespace(hidden_states=p) for p in padded), attention_mask=real)
        loss.backward()
        values.append(loss)
        gradients.append([layer.grad for layer in student.hidden_states])
        for layer in student.hidden_states:
            assert not layer.grad[mask() == 0].any()
    torch.testing.assert_close(values[1], values[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_student_that_is_the_teacher_loses_nothing() -> None:
    student = outputs(3, 8, 1)
    turned = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    for change in (lambda h: h, lambda h: 2 * h @ turned):  # nor one that is turned and scaled
        teacher = SimpleNamespace(hidden_states=tuple(change(layer.detach()) for layer in student.hidden_states))
        loss = CKD()(student, teacher, attention_mask=mask())
        assert abs(loss.item()) < 1e-14
        gradients = torch.autograd.grad(loss, student.hidden_states)
        assert max(gradient.abs().max().item() for gradient in gradients) < 1e-8


def test_examples_of_one_token_and_of_none_count_as_0() -> None:
    student, teacher = outputs(2, 6, 1), outputs(4, 8, 2)
    real = mask()
    real[1, 1:] = real[3] = 0
    loss = WeightedSum({"words": (1.0, CKD(ltr_pair=0, ltr_triple=0))})(student, teacher, attention_mask=real)
    loss.backward()
    for b in (1, 3):
        assert not any(layer.grad[b].any() for layer in student.hidden_states)
    kept = [0, 2]
    student, teacher = (
        SimpleNamespace(hidden_states=[layer[kept] for layer in model.hidden_states]) for model in (student, teacher)
    )
    expected = CKD(ltr_pair=0, ltr_triple=0)(student, teacher, attention_mask=real[kept]) / 2
    torch.testing.assert_close(loss, expected)


def test_points_that_coincide_have_no_angle() -> None:
    student, teacher = outputs(2, 6, 1), outputs(4, 8, 2)
    layers = [layer.detach().clone() for layer in student.hidden_states]
    layers[1][:, 3] = layers[1][:, 2]
    layers[2] = layers[0].clone()
    student = SimpleNamespace(hidden_states=[layer.requires_grad_() for layer in layers])
    loss = CKD()(student, teacher, attention_mask=mask())
    loss.backward()
    assert loss.isfinite()
    assert all(layer.grad.isfinite().all() for layer in layers)
    with torch.no_grad():  # of the terms, those of coinciding points have 0 for the student's cosine
        squares = []
        s, t = student.hidden_states[1][0], teacher.hidden_states[2][0]
        for i, j, k in ((i, j, k) for j in range(7) for i in range(7) for k in range(7) if len({i, j, k}) == 3):
            teachers = torch.cosine_similarity(t[i] - t[j], t[k] - t[j], dim=0)
            same = {2, 3} in ({i, j}, {k, j})
            squares.append((0 if same else torch.cosine_similarity(s[i] - s[j], s[k] - s[j], dim=0)) - teachers)
        one = [SimpleNamespace(hidden_states=[h[:1]]) for h in (student.hidden_states[1], teacher.hidden_states[2])]
        found = only("wr_triple", pairs=[(0, 0)])(*one, attention_mask=mask()[:1])
    torch.testing.assert_close(found, torch.stack(squares).square().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_states_are_compared_in_float32(dtype: torch.dtype) -> None:
    """Also under autocast: the error is that of the states themselves."""
    student, teacher = outputs(2, 32, 1), outputs(4, 48, 2)
    for model in (student, teacher):
        model.hidden_states = tuple(layer.detach().to(dtype) for layer in model.hidden_states)
    with torch.autocast("cpu", torch.bfloat16):
        found = CKD()(student, teacher, attention_mask=mask())
    for model in (student, teacher):
        model.hidden_states = tuple(layer.double() for layer in model.hidden_states)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(CKD()(student, teacher, attention_mask=mask()).item(), rel=1e-5)


@pytest.mark.parametrize("function", ["wr_pair", "wr_triple", "ltr_pair", "ltr_triple"])
def test_no_tensor_has_the_hidden_size_for_each_pair_or_triplet(function: str) -> None:
    """What is kept for the backward: at most the states, [B, layers, S, S] and [B, layers, S, W, W]."""
    batch, tokens, width, window = 2, 24, 64, 5
    layers = [torch.randn(batch, tokens, width).requires_grad_() for _ in range(3)]
    model, teacher = (SimpleNamespace(hidden_states=x) for x in (layers, [torch.randn_like(h) for h in layers]))
    most = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal most
        most = max(most, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        only(function, window=window, pairs=[(0, 0), (1, 1), (2, 2)])(
            model, teacher, attention_mask=torch.ones(batch, tokens)
        )
    assert 0 < most <= batch * 3 * tokens * max(width, tokens, window * window)


# In the trainer


def test_it_trains_a_student(tmp_path: Path) -> None:
    objective = WeightedSum({"kd": (1.0, LogitsKD()), "ckd": (10.0, CKD(window=5))})
    trainer = DistillationTrainer(
        tiny.bert(1, dropout=0.0),
        tiny.config(tmp_path, num_train_epochs=4, logging_steps=10, eval_strategy="epoch"),
        teacher_model=tiny.bert(2, layers=4, hidden_size=24),
        objective=objective,
        train_dataset=tiny.dataset(80),
        eval_dataset=tiny.dataset(16, seed=3),
        processing_class=tiny.tokenizer(),
    )
    masks = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, inputs: masks.append(inputs["attention_mask"]), with_kwargs=True
    )
    trainer.train()
    assert any((one == 0).any() for one in masks)  # the student sees the padding too, in training and evaluation
    assert len(masks) == 4 * (10 + 2)
    logged = [entry["ckd"] for entry in trainer.state.log_history if "ckd" in entry]
    assert len(logged) == 4
    assert logged == sorted(logged, reverse=True)
    assert logged[-1] < 0.9 * logged[0]
    assert trainer.predict(tiny.dataset(5)).predictions.shape == (5, 2)


def test_accumulated_micro_batches_are_the_whole_batch(tmp_path: Path) -> None:
    """With other padding in each, too."""
    ends = []
    for size, micro_batches in ((8, 1), (2, 4)):
        trainer = DistillationTrainer(
            tiny.bert(1, dropout=0.0),
            tiny.config(
                tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=micro_batches, max_steps=2,
                optim="sgd", train_sampling_strategy="sequential", max_grad_norm=0.0,
            ),
            teacher_model=tiny.bert(2, layers=4),
            objective=CKD(),
            train_dataset=tiny.dataset(16),
            processing_class=tiny.tokenizer(),
        )  # fmt: skip
        trainer.train()
        ends.append(trainer.model.bert.state_dict())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-6)


# What is wrong


def call(objective: CKD, student: Any = None, teacher: Any = None, real: Any = None) -> Tensor:
    student = outputs(2, 6, 1) if student is None else student
    teacher = outputs(4, 8, 2) if teacher is None else teacher
    return objective(student, teacher, attention_mask=mask() if real is None else real)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: CKD(wr_pair=-1.0), ValueError, "wr_pair is -1.0; expected a finite number >= 0"),
        (lambda: CKD(ltr_triple="a"), TypeError, "ltr_triple is 'a'; expected a number"),
        (lambda: CKD(0, 0, 0, 0), ValueError, "wr_pair, wr_triple, ltr_pair, ltr_triple are all 0"),
        (lambda: CKD(window=4), ValueError, "window is 4; expected an odd number, 3 or more"),
        (lambda: CKD(window=1), ValueError, "window is 1; expected an odd number, 3 or more"),
        (lambda: CKD(window=5.0), TypeError, "window is 5.0; expected an integer"),
        (lambda: CKD(pairs="middle"), ValueError, "pairs is 'middle'; expected one of 'all', 'skip', 'last'"),
        (lambda: CKD(pairs=[(0, 0), (1, 1.5)]), ValueError, r"expected \(student layer, teacher layer\)"),
        (lambda: CKD(pairs=3), ValueError, "pairs is 3; expected"),
        (
            lambda: call(CKD(pairs="skip")),
            ValueError,
            "pairs is 'skip', 1 for these models; expected 3 or more, or ltr_pair=0 and ltr_triple=0",
        ),
        (lambda: call(CKD(pairs=[(0, 0), (1, 1), (2, 5)])), ValueError, r"pairs has \(2, 5\), but .* the teacher 4"),
        (lambda: call(CKD(), student=outputs(5, 6, 1)), ValueError, "the student has 5 layers and the teacher 4"),
        (lambda: CKD()(outputs(2, 6, 1), None, attention_mask=mask()), ValueError, "teacher is None"),
        (lambda: CKD()(outputs(2, 6, 1), outputs(4, 8, 2)), ValueError, "attention_mask is None; expected"),
        (
            lambda: call(CKD(), teacher=SimpleNamespace()),
            ValueError,
            "teacher has no hidden_states; call the model with output_h",
        ),
        (
            lambda: call(CKD(), teacher=outputs(4, 8, 2, tokens=1)),
            ValueError,
            r"teacher has hidden_states of shape \(4, 1, 8\), student \(4, 9, 6\); .* stored ones",
        ),
        (lambda: call(CKD(), real=mask()[:, :5]), ValueError, r"attention_mask has shape \(4, 5\); expected \(4, 9\)"),
        (
            lambda: call(CKD(), outputs(2, 6, 1, tokens=1), outputs(4, 8, 2, tokens=1), mask()[:, :1]),
            ValueError,
            "attention_mask has 1 token an example; expected 2 or more",
        ),
    ],
)
def test_what_is_wrong_is_named(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
