from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill import DistilBERT, DistillationTrainer, store
from fastdistill.objectives.distilbert import CosineStates
from tests import tiny

LENGTHS = [7, 4, 9, 2]
LABELS = torch.tensor([0, 2, 1, 2])
MASK = (torch.arange(9) < torch.tensor(LENGTHS)[:, None]).long()


def outputs(seed: int, width: int = 6, classes: int = 3) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return SimpleNamespace(logits=made(4, classes), hidden_states=tuple(made(4, 9, width) for _ in range(3)))


def cosine_by_hand(student: Any, teacher: Any) -> Tensor:
    examples = []
    for b, length in enumerate(LENGTHS):
        s, t = student.hidden_states[-1][b, :length], teacher.hidden_states[-1][b, :length]
        examples.append((1 - (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))).mean())
    return torch.stack(examples).mean()


def by_hand(student: Any, teacher: Any) -> dict[str, Tensor]:
    p, q = ((z / 2).softmax(-1) for z in (teacher.logits, student.logits))
    return {
        "kd": 4 * (p * (p / q).log()).sum(-1).mean(),
        "ce": F.cross_entropy(student.logits, LABELS),
        "cos": cosine_by_hand(student, teacher),
    }


def test_it_is_the_formula_with_the_published_weights() -> None:
    student, teacher = outputs(1), outputs(2)
    loss, parts = DistilBERT().parts(student, teacher, LABELS, attention_mask=MASK)
    wanted = by_hand(student, teacher)
    assert parts.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(parts[name], value.detach())
    expected = 5 * wanted["kd"] + 2 * wanted["ce"] + wanted["cos"]
    torch.testing.assert_close(loss, expected)
    tensors = [student.logits, student.hidden_states[-1], teacher.logits, teacher.hidden_states[-1]]
    for ours, theirs in zip(torch.autograd.grad(loss, tensors), torch.autograd.grad(expected, tensors), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_angle_is_the_published_codes_where_no_example_has_padding() -> None:
    """Whose mean is over all tokens of the batch."""
    student, teacher = outputs(1), outputs(2)
    s, t = (of.hidden_states[-1].flatten(0, 1) for of in (student, teacher))
    expected = F.cosine_embedding_loss(s, t, torch.ones(len(s)))
    torch.testing.assert_close(CosineStates()(student, teacher, attention_mask=torch.ones(4, 9)), expected)


def test_gradcheck() -> None:
    student, teacher = outputs(1), outputs(2)

    def loss(states: Tensor, others: Tensor) -> Tensor:
        ours, theirs = SimpleNamespace(hidden_states=(states,)), SimpleNamespace(hidden_states=(others,))
        return CosineStates()(ours, theirs, attention_mask=MASK)

    assert torch.autograd.gradcheck(loss, (student.hidden_states[-1], teacher.hidden_states[-1]))


def test_padding_changes_nothing_and_learns_nothing() -> None:
    student, teacher = outputs(1), outputs(2)
    before = CosineStates()(student, teacher, attention_mask=MASK)
    before.backward()
    states = student.hidden_states[-1]
    assert states.grad is not None and not states.grad[MASK == 0].any() and states.grad[MASK == 1].any()
    padded = states.detach().masked_fill((MASK == 0)[..., None], torch.nan).requires_grad_()
    after = CosineStates()(SimpleNamespace(hidden_states=(padded,)), teacher, attention_mask=MASK)
    torch.testing.assert_close(after, before)
    after.backward()
    torch.testing.assert_close(padded.grad, states.grad)


def test_of_one_output_the_terms_are_squared_errors() -> None:
    student, teacher = outputs(1, classes=1), outputs(2, classes=1)
    labels = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    loss = DistilBERT(problem="regression")(student, teacher, labels, attention_mask=MASK)
    z, target = student.logits[:, 0], teacher.logits[:, 0]
    expected = 5 * (z - target).square().mean() + 2 * (z - labels).square().mean() + cosine_by_hand(student, teacher)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_states_are_compared_in_float32(dtype: torch.dtype) -> None:
    student, teacher = outputs(1), outputs(2)
    lower = [SimpleNamespace(hidden_states=(of.hidden_states[-1].to(dtype),)) for of in (student, teacher)]
    exact = [SimpleNamespace(hidden_states=(of.hidden_states[0].double(),)) for of in lower]
    found = CosineStates()(*lower, attention_mask=MASK)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), CosineStates()(*exact, attention_mask=MASK))


def test_it_trains_a_student(tmp_path: Path) -> None:
    teacher, student = tiny.bert(0, layers=2, dropout=0.0), tiny.bert(1, layers=1, dropout=0.0)
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        objective=DistilBERT(),
        args=tiny.config(tmp_path, num_train_epochs=8, logging_steps=8),
        train_dataset=tiny.dataset(64),
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "cos" in log]
    assert logs[-1]["cos"] < 0.7 * logs[0]["cos"]
    assert logs[-1]["loss"] == pytest.approx(5 * logs[-1]["kd"] + 2 * logs[-1]["ce"] + logs[-1]["cos"], rel=1e-3)


def test_a_stored_teacher_is_refused_by_name(tmp_path: Path) -> None:
    """It has states of the first token alone, or none."""
    teacher, collate = tiny.bert(0), tiny.tokenizer().pad
    data = tiny.dataset(8)
    options: dict[str, Any] = {
        "model": tiny.bert(1),
        "objective": DistilBERT(),
        "args": tiny.config(tmp_path),
        "processing_class": tiny.tokenizer(),
    }

    def collated(rows: Any) -> Any:
        return collate([{k: v for k, v in row.items() if k != "length"} for row in rows], return_tensors="pt")

    stored = store(data, teacher, collate=collated, cache_file=tmp_path / "a.arrow")
    with pytest.raises(ValueError, match="needs the teacher's hidden states, but the teacher is not run"):
        DistillationTrainer(train_dataset=stored, **options)
    stored = store(data, teacher, collate=collated, cache_file=tmp_path / "b.arrow", hidden_states=True)
    with pytest.raises(ValueError, match="of all tokens, and not of the first alone, as stored ones are"):
        DistillationTrainer(train_dataset=stored, **options).train()


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: DistilBERT(temperature=0), ValueError, "temperature is 0; expected"),
        (lambda: DistilBERT(cos_weight=-1), ValueError, r"the weight of terms\['cos'\] is -1"),
        (lambda: DistilBERT(2.0, 0, 0, 0), ValueError, "terms has no positive weight"),
        (lambda: DistilBERT(problem="multi_label"), ValueError, "problem is 'multi_label'; expected"),  # type: ignore[arg-type]
        (lambda: DistilBERT()(outputs(1), None, LABELS, attention_mask=MASK), ValueError, "teacher is None"),
        (
            lambda: CosineStates()(outputs(1), outputs(2, width=5), attention_mask=MASK),
            ValueError,
            "hidden size is 6 and the teacher's 5; expected the same",
        ),
        (lambda: CosineStates()(outputs(1), outputs(2)), ValueError, "attention_mask is None"),
    ],
)
def test_what_is_wrong_is_named(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
