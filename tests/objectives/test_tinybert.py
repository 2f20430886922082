from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2ForSequenceClassification

from fastdistill import DistillationTrainer, TinyBERT, score, store
from fastdistill.models.attention_scores import call
from fastdistill.objectives.tinybert import AttentionMSE, HiddenMSE
from tests import tiny

LENGTHS = [7, 4, 9, 2]
LABELS = torch.tensor([0, 2, 1, 2])
MASK = (torch.arange(9) < torch.tensor(LENGTHS)[:, None]).long()
TERMS = ("attention", "hidden", "prediction")


def outputs(layers: int, seed: int, width: int = 6, heads: int = 2, classes: int = 3) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return SimpleNamespace(
        logits=made(4, classes),
        hidden_states=tuple(made(4, 9, width) for _ in range(layers + 1)),
        attentions=tuple(made(4, heads, 9, 9) for _ in range(layers)),
    )


def by_hand(student: Any, teacher: Any, pairs: list[tuple[int, int]], linear: Any = None) -> dict[str, Tensor]:
    attention, hidden = [], []
    for b, n in enumerate(LENGTHS):
        for i, j in pairs:
            s, t = student.hidden_states[i][b, :n], teacher.hidden_states[j][b, :n]
            hidden.append(((s if linear is None else linear(s)) - t).square().sum() / t.numel() / len(LENGTHS))
            if i:
                s, t = student.attentions[i - 1][b, :, :n, :n], teacher.attentions[j - 1][b, :, :n, :n]
                attention.append((s - t).square().sum() / t.numel() / len(LENGTHS))
    p = teacher.logits.softmax(-1)
    soft = -(p * student.logits.log_softmax(-1)).sum(-1).mean()
    return {"attention": sum(attention), "hidden": sum(hidden), "prediction": soft}  # type: ignore[dict-item]


def tensors(*models: Any) -> list[Tensor]:
    return [one for model in models for one in (model.logits, *model.hidden_states, *model.attentions)]


@pytest.mark.parametrize("pairs", ["all", [(0, 0), (2, 3), (1, 1)]])
def test_it_is_the_formula(pairs: Any) -> None:
    student, teacher = outputs(2, 1), outputs(4, 2)
    loss, parts = TinyBERT(pairs=pairs).parts(student, teacher, LABELS, attention_mask=MASK)
    wanted = by_hand(student, teacher, [(0, 0), (1, 2), (2, 4)] if pairs == "all" else pairs)
    assert tuple(parts) == TERMS
    for name, value in wanted.items():
        torch.testing.assert_close(parts[name], value.detach())
    expected = sum(wanted.values())
    torch.testing.assert_close(loss, expected)
    found, meant = (torch.autograd.grad(of, tensors(student, teacher), allow_unused=True) for of in (loss, expected))
    for ours, theirs in zip(found, meant, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_weights_and_temperature() -> None:
    student, teacher = outputs(2, 1), outputs(2, 2)
    loss, parts = TinyBERT(4.0, 0.5, 2.0, 3.0).parts(student, teacher, None, attention_mask=MASK)
    assert tuple(parts) == TERMS
    soft = -((teacher.logits / 4).softmax(-1) * (student.logits / 4).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(parts["prediction"], soft.detach())
    torch.testing.assert_close(loss, 0.5 * parts["attention"] + 2 * parts["hidden"] + 3 * parts["prediction"])
    assert tuple(TinyBERT(prediction_weight=0).parts(student, teacher, None, attention_mask=MASK)[1]) == TERMS[:2]


def test_of_one_output_the_prediction_is_the_label() -> None:
    """As in the published code."""
    student, teacher = outputs(2, 1, classes=1), outputs(2, 2, classes=1)
    labels = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    _, parts = TinyBERT(problem="regression").parts(student, teacher, labels, attention_mask=MASK)
    torch.testing.assert_close(parts["prediction"], (student.logits[:, 0] - labels).square().mean().detach())


def test_widths_that_differ_are_bridged_by_one_learned_map() -> None:
    student, teacher = outputs(2, 1, width=5), outputs(4, 2, width=6)
    objective = HiddenMSE(widths=(5, 6))
    assert objective.module is not None
    assert [tuple(p.shape) for p in objective.module.parameters()] == [(6, 5), (6,)]
    objective.module.double()
    loss = objective(student, teacher, attention_mask=MASK)
    wanted = by_hand(student, teacher, [(0, 0), (1, 2), (2, 4)], objective.module[0])["hidden"]
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in objective.module.parameters())
    assert TinyBERT(widths=(5, 6)).module is not None and TinyBERT().module is None


def test_gradcheck() -> None:
    student, teacher = outputs(1, 1), outputs(1, 2)

    def loss(ours: Tensor, theirs: Tensor) -> Tensor:
        maps = SimpleNamespace(attentions=(ours,)), SimpleNamespace(attentions=(theirs,))
        return AttentionMSE()(*maps, attention_mask=MASK)

    assert torch.autograd.gradcheck(loss, (student.attentions[0], teacher.attentions[0]))


def test_padding_changes_nothing_and_learns_nothing() -> None:
    """Its scores may be infinite: a mask was added to them."""
    student, teacher = outputs(2, 1), outputs(2, 2)
    before = TinyBERT()(student, teacher, LABELS, attention_mask=MASK)
    before.backward()
    away = ~(MASK[:, :, None] & MASK[:, None]).bool()[:, None].expand(-1, 2, -1, -1)
    for maps in student.attentions:
        assert not maps.grad[away].any() and maps.grad[~away].any()
    for states in student.hidden_states:
        assert not states.grad[MASK == 0].any() and states.grad[MASK == 1].any()
    padded = [
        SimpleNamespace(
            logits=of.logits.detach(),
            hidden_states=tuple(h.detach().masked_fill((MASK == 0)[..., None], 1e6) for h in of.hidden_states),
            attentions=tuple(a.detach().masked_fill(away, -torch.inf).requires_grad_() for a in of.attentions),
        )
        for of in (student, teacher)
    ]
    after = TinyBERT()(*padded, LABELS, attention_mask=MASK)
    torch.testing.assert_close(after, before)
    after.backward()
    for maps, theirs in zip(padded[0].attentions, student.attentions, strict=True):
        torch.testing.assert_close(maps.grad, theirs.grad)


def trainer(folder: Path, student: Any, teacher: Any, objective: Any, **options: Any) -> DistillationTrainer:
    return DistillationTrainer(
        model=student,
        teacher_model=teacher,
        objective=objective,
        args=tiny.config(folder, logging_steps=8, **options),
        train_dataset=tiny.dataset(64),
        processing_class=tiny.tokenizer(),
    )


@pytest.mark.parametrize("width", [16, 8])
def test_it_trains_a_student(width: int, tmp_path: Path) -> None:
    teacher, student = tiny.bert(0, layers=2, dropout=0.0), tiny.bert(1, layers=1, dropout=0.0, hidden_size=width)
    objective = TinyBERT(widths=None if width == 16 else (8, 16))
    one = trainer(tmp_path, student, teacher, objective, num_train_epochs=8)
    one.train()
    logs = [log for log in one.state.log_history if "attention" in log]
    assert all(logs[-1][name] < 0.9 * logs[0][name] for name in ("attention", "hidden"))
    assert logs[-1]["loss"] == pytest.approx(sum(logs[-1][name] for name in TERMS), rel=1e-3)


def test_accumulated_micro_batches_are_the_whole_batch(tmp_path: Path) -> None:
    found = []
    for size, steps in ((16, 1), (4, 4)):
        teacher, student = tiny.bert(0, layers=2, dropout=0.0), tiny.bert(1, layers=1, dropout=0.0)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 2}
        trainer(tmp_path, student, teacher, TinyBERT(), optim="sgd", learning_rate=0.1, **options).train()
        found.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_teacher_can_be_scored_by_it() -> None:
    """Its gates' gradients, of attention scores too, are those of autograd."""
    teacher, student = tiny.pair()
    batches, objective = tiny.batches((1,)), AttentionMSE()
    found = score(teacher, batches, student, objective=objective, progress=False).friendliness
    assert found is not None
    mask = batches[0]["attention_mask"]
    asked = {name: batches[0][name] for name in ("input_ids", "attention_mask")} | {"output_attentions": True}
    maps, weight = call(student.eval(), asked), teacher.bert.encoder.layer[0].output.dense.weight
    objective(maps, call(teacher.eval(), asked), attention_mask=mask).backward()
    expected = (weight * weight.grad).sum(0).abs()  # what a neuron's gate has
    torch.testing.assert_close(found.neurons[0].double(), expected, rtol=1e-4, atol=1e-6)
    assert not found.neurons[1].any()  # above the last scores


def test_what_has_no_attention_scores_is_refused_by_name(tmp_path: Path) -> None:
    data, collate = tiny.dataset(8), tiny.tokenizer().pad

    def collated(rows: Any) -> Any:
        return collate([{k: v for k, v in row.items() if k != "length"} for row in rows], return_tensors="pt")

    teacher = tiny.bert(0)
    stored = store(data, teacher, collate=collated, cache_file=tmp_path / "a.arrow", hidden_states=True)
    given = {"objective": TinyBERT(), "args": tiny.config(tmp_path)}
    with pytest.raises(ValueError, match="needs the teacher's attention scores, which no column has"):
        DistillationTrainer(model=tiny.bert(1), train_dataset=stored, processing_class=tiny.tokenizer(), **given)
    config = GPT2Config(vocab_size=65, n_positions=32, n_embd=16, n_layer=1, n_head=2, num_labels=2, pad_token_id=0)
    student, decoder = GPT2ForSequenceClassification(config), GPT2ForSequenceClassification(config)
    with pytest.raises(ValueError, match="compares attention scores, but model is a GPT2ForSequenceClassification"):
        DistillationTrainer(model=student, teacher_model=decoder, train_dataset=data, **given)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: TinyBERT(temperature=0), ValueError, "temperature is 0; expected"),
        (lambda: TinyBERT(attention_weight=-1), ValueError, r"the weight of terms\['attention'\] is -1"),
        (lambda: TinyBERT(pairs="skip"), ValueError, "pairs is 'skip'"),  # type: ignore[arg-type]
        (lambda: TinyBERT(pairs=[(1, 0)]), ValueError, "expected layers with layers: embeddings have no attention"),
        (lambda: TinyBERT(widths=(0, 4)), ValueError, r"widths is \(0, 4\)"),
        (lambda: TinyBERT(problem="multi_label"), ValueError, "problem is 'multi_label'"),  # type: ignore[arg-type]
        (lambda: TinyBERT()(outputs(1, 1), None, LABELS, attention_mask=MASK), ValueError, "teacher is None"),
        (
            lambda: TinyBERT()(outputs(1, 1), outputs(2, 2, heads=3), LABELS, attention_mask=MASK),
            ValueError,
            "the student's layer 1 has 2 heads and the teacher's layer 2 3; expected as many, or attention_weight=0",
        ),
        (
            lambda: HiddenMSE()(outputs(1, 1), outputs(2, 2, width=5), attention_mask=MASK),
            ValueError,
            r"hidden size is 6 and the teacher's 5, but widths is None; expected widths=\(6, 5\)",
        ),
        (
            lambda: HiddenMSE(widths=(4, 5))(outputs(1, 1), outputs(2, 2), attention_mask=MASK),
            ValueError,
            r"but widths is \(4, 5\); expected widths=None",
        ),
        (lambda: AttentionMSE()(outputs(1, 1), outputs(2, 2)), ValueError, "attention_mask is None"),
        (
            lambda: AttentionMSE()(outputs(1, 1), SimpleNamespace(attentions=None), attention_mask=MASK),
            ValueError,
            "teacher has no attentions, which stored outputs never have",
        ),
        (lambda: AttentionMSE()(outputs(3, 1), outputs(2, 2), attention_mask=MASK), ValueError, "student has 3 layers"),
    ],
)
def test_what_is_wrong_is_named(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
