from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill import PKD, DistillationTrainer, LogitsKD, WeightedSum
from fastdistill.objectives.pkd import informative_layers
from tests import tiny


def states(layers: int, width: int, seed: int, *, grad: bool = False) -> SimpleNamespace:
    """Of embeddings and layers, on 3 examples of 5 tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(3, 5, width, generator=generator, dtype=torch.float64) for _ in range(layers + 1)]
    return SimpleNamespace(hidden_states=tuple(layer.requires_grad_(grad) for layer in made))


def by_hand(student: Any, teacher: Any, pairs: list[tuple[int, int]], maps: Any = None) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for place, (i, j) in enumerate(pairs):
        for b in range(3):
            s, t = student.hidden_states[i][b, 0], teacher.hidden_states[j][b, 0]
            s = s if maps is None else maps[place].weight @ s + maps[place].bias
            total = total + (s / s.norm() - t / t.norm()).pow(2).sum()
    return total / (3 * len(pairs))  # the papers' sum over the hidden size


@pytest.mark.parametrize(
    "pairs, student_layers, teacher_layers, meant",
    [
        ("skip", 3, 12, [(1, 4), (2, 8)]),
        ("skip", 2, 5, [(1, 2)]),
        ("last", 3, 12, [(1, 10), (2, 11)]),
        ("skip", 1, 6, [(1, 6)]),
        ("last", 1, 6, [(1, 6)]),
        ([(0, 0), (2, 1), (2, 6)], 2, 6, [(0, 0), (2, 1), (2, 6)]),
    ],
)
def test_pkd_is_the_papers_formula(pairs: Any, student_layers: int, teacher_layers: int, meant: Any) -> None:
    student, teacher = states(student_layers, 8, 1, grad=True), states(teacher_layers, 8, 2)
    loss = PKD(pairs, over="sum")(student, teacher)
    torch.testing.assert_close(loss, by_hand(student, teacher, meant))
    loss.backward()
    learned = {i for i, layer in enumerate(student.hidden_states) if layer.grad is not None}
    assert learned == {i for i, _ in meant}


@pytest.mark.parametrize("width", [8, 384])
def test_by_default_it_is_the_published_codes_scale(width: int) -> None:
    """Which takes mse_loss of states of length 1: a mean over the hidden size, too."""
    student, teacher = states(3, width, 1), states(6, width, 2)
    ours, theirs = ([layer[:, 0] for layer in of.hidden_states] for of in (student, teacher))
    pairs = [F.mse_loss(F.normalize(ours[i], dim=-1), F.normalize(theirs[j], dim=-1)) for i, j in [(1, 2), (2, 4)]]
    torch.testing.assert_close(PKD()(student, teacher), sum(pairs) / 2)
    torch.testing.assert_close(PKD(over="sum")(student, teacher), width * PKD()(student, teacher))


def test_widths_that_differ_are_bridged_by_what_is_learned() -> None:
    student, teacher, pairs = states(2, 8, 1), states(4, 6, 2), [(1, 2), (2, 4)]
    objective = PKD(pairs, widths=(8, 6), over="sum")
    assert [tuple(p.shape) for p in objective.module.parameters()] == [(6, 8), (6,)] * 2
    objective.module.double()
    loss = objective(student, teacher)
    torch.testing.assert_close(loss, by_hand(student, teacher, pairs, objective.module))
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in objective.module.parameters())
    with pytest.raises(
        ValueError, match=r"hidden size is 8 and the teacher's 6, but widths is None; expected widths=\(8, 6"
    ):
        PKD(pairs)(student, teacher)
    with pytest.raises(ValueError, match=r"but widths is \(4, 6\); expected widths=\(8, 6\)"):
        PKD(pairs, widths=(4, 6))(student, teacher)


def test_low_precision_is_compared_in_float32() -> None:
    student, teacher = states(2, 64, 1), states(2, 64, 2)
    expected = PKD()(student, teacher)
    for outputs in (student, teacher):
        outputs.hidden_states = tuple(layer.bfloat16() for layer in outputs.hidden_states)
    found = PKD()(student, teacher)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=2**-8)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PKD("middle"), "pairs is 'middle'; expected one of 'skip', 'last'"),
        (lambda: PKD(over="max"), "over is 'max'; expected one of 'mean', 'sum'"),
        (lambda: PKD([]), "pairs is \\[\\]; expected"),
        (lambda: PKD([(1, -1)]), "expected \\(student layer, teacher layer\\)"),
        (lambda: PKD(widths=(4, 8)), "widths is \\(4, 8\\) but pairs is 'skip'; expected the pairs as numbers"),
        (lambda: PKD([(1, 1)], widths=(4, 0)), "widths is \\(4, 0\\); expected the hidden sizes"),
        (lambda: PKD([(1, 1)], widths=(4, True)), "widths is \\(4, True\\); expected the hidden sizes"),
        (lambda: PKD()(states(3, 8, 1), states(2, 8, 2)), "the student has 3 layers and the teacher 2"),
        (lambda: PKD([(1, 3)])(states(1, 8, 1), states(2, 8, 2)), "pairs has \\(1, 3\\), but .* the teacher 2"),
        (lambda: PKD()(states(2, 8, 1), None), "teacher is None"),
        (
            lambda: PKD()(SimpleNamespace(), states(2, 8, 2)),
            "student has no hidden_states; call the model with output_h",
        ),
    ],
)
def test_what_is_wrong_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_informative_layers_have_the_highest_entropy_in_order_of_depth() -> None:
    made = (
        torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(0))
        * torch.tensor([3, 0.1, 2, 0.5, 1])[:, None, None]
    )
    entropy = [-(p * p.log()).sum(-1).mean().item() for p in made.softmax(-1)]
    assert sorted(range(5), key=entropy.__getitem__, reverse=True) == [1, 3, 4, 2, 0]
    for number in range(1, 6):
        assert informative_layers(made, number).tolist() == sorted([1, 3, 4, 2, 0][:number])
    for number in (0, 6):
        with pytest.raises(ValueError, match=f"number is {number}; expected from 1 to 5"):
            informative_layers(made, number)


def test_of_equally_informative_layers_the_first_come_first() -> None:
    made = torch.zeros(64, 3, 8)
    made[5, :, 0] = 2.0
    for number in (1, 5, 33):
        assert informative_layers(made, number).tolist() == [i for i in range(64) if i != 5][:number]


# In the trainer


def trainer(folder: Any, **options: Any) -> DistillationTrainer:
    torch.manual_seed(5)  # of the projections
    objective = WeightedSum({"kd": (1.0, LogitsKD()), "pkd": (10.0, PKD([(1, 1), (2, 3)], widths=(16, 24)))})
    teacher = tiny.bert(2, layers=3, hidden_size=24)
    args = tiny.config(folder, num_train_epochs=2, logging_steps=1, **options)
    data, words = tiny.dataset(40), tiny.tokenizer()
    return DistillationTrainer(
        tiny.bert(1), args, teacher_model=teacher, objective=objective, train_dataset=data, processing_class=words
    )


def test_projections_are_learned_beside_the_student(tmp_path: Any) -> None:
    t = trainer(tmp_path, weight_decay=0.1)
    before = [p.clone() for p in t.objective.module.parameters()]
    t.train()
    for old, new in zip(before, t.objective.module.parameters(), strict=True):
        assert not torch.equal(old, new)
    optimised = {id(p) for group in t.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for module in (t.model, t.objective.module) for p in module.parameters()}
    t.save_model(tmp_path / "saved")
    assert t.model.from_pretrained(tmp_path / "saved").state_dict().keys() == tiny.bert().state_dict().keys()
    logged = [entry["pkd"] for entry in t.state.log_history if "pkd" in entry]
    assert len(logged) == 10
    assert logged[-1] < logged[0]


def test_their_gradient_is_clipped_and_forgotten_with_the_students(tmp_path: Any) -> None:
    """With plain gradient descent a step is the gradient: accumulated, it is that of the whole batch."""
    options = {"optim": "sgd", "train_sampling_strategy": "sequential", "lr_scheduler_type": "constant"}
    ends = []
    for folder, size, micro_batches in (("whole", 8, 1), ("parts", 4, 2)):
        t = trainer(
            tmp_path / folder, per_device_train_batch_size=size, gradient_accumulation_steps=micro_batches,
            max_grad_norm=0.1, max_steps=4, **options,
        )  # fmt: skip
        for module in t.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        before = [p.clone() for m in (t.model, t.objective.module) for p in m.parameters()]
        t.train()
        after = [p for m in (t.model, t.objective.module) for p in m.parameters()]
        ends.append(after)
        moved = math.sqrt(sum((a - b).square().sum().item() for a, b in zip(after, before, strict=True)))
        assert 0 < moved <= 4 * 1e-2 * 0.1 * 1.001
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_projections_resume_with_the_same_bits(tmp_path: Any) -> None:
    whole = trainer(tmp_path, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    for parameter in resumed.objective.module.parameters():
        torch.nn.init.zeros_(parameter)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for one, other in ((whole.model, resumed.model), (whole.objective.module, resumed.objective.module)):
        torch.testing.assert_close(other.state_dict(), one.state_dict(), rtol=0, atol=0)
