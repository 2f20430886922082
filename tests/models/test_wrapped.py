"""Models that are wrapped or packed: PEFT's, quantized ones; and gates under gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding

import fastdistill
from fastdistill import DistillationTrainer, LogitsKD, TeacherTeam
from fastdistill.digest import model_digest
from tests import tiny

COLLATE = DataCollatorWithPadding(tiny.tokenizer())


def adapted(seed: int, *, alpha: int = 8, layers: int = 2) -> Any:
    peft = pytest.importorskip("peft")
    model = tiny.bert(seed, layers=layers, dropout=0.0)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=alpha, target_modules=["query", "dense"])
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # which begin as zeros
            nn.init.normal_(weight, generator=generator)
    return model.eval()


def prompted() -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(tiny.bert(1), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))


def batch(number: int = 4) -> dict[str, Tensor]:
    return dict(COLLATE(list(tiny.dataset(number).remove_columns("length"))))


def stored(model: Any, folder: Path, **options: Any) -> Tensor:
    rows = fastdistill.store(tiny.dataset(4), model, collate=COLLATE, cache_file=folder / "x.arrow", **options)
    return torch.tensor(rows["teacher_logits"][:])


def said(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(**{k: v for k, v in batch().items() if k != "labels"}).logits
    return logits


# PEFT


def test_a_peft_teacher_is_stored_with_its_adapters(tmp_path: Path) -> None:
    teacher = adapted(2)
    torch.testing.assert_close(stored(teacher, tmp_path), said(teacher), rtol=1e-3, atol=1e-4)
    stronger = adapted(2, alpha=32)  # the same weights, which weigh more
    assert model_digest(teacher) != model_digest(stronger)
    torch.testing.assert_close(stored(stronger, tmp_path), said(stronger), rtol=1e-3, atol=1e-4)
    team = TeacherTeam({"a": teacher, "b": tiny.bert(3)})
    rows = team.store(tiny.dataset(4), collate=COLLATE, folder=tmp_path)
    torch.testing.assert_close(torch.tensor(rows["a_logits"][:]), said(teacher), rtol=1e-3, atol=1e-4)


def test_a_peft_teacher_is_gated_and_scored_as_it_is_merged() -> None:
    teacher, student = adapted(2), adapted(1, layers=1)
    merged = adapted(2).merge_and_unload()
    loaders = [[batch()], [batch()]]
    found = fastdistill.score(teacher, loaders[0], student, progress=False)
    expected = fastdistill.score(merged, loaders[1], student, progress=False)
    for ours, theirs in ((found.expressiveness, expected.expressiveness), (found.friendliness, expected.friendliness)):
        assert ours is not None and theirs is not None
        torch.testing.assert_close([*ours.heads, *ours.neurons], [*theirs.heads, *theirs.neurons], rtol=1e-3, atol=1e-5)
    outputs = []
    for model in (teacher, merged):
        with fastdistill.gate(model) as gates, torch.no_grad():
            gates.heads[0] = torch.tensor([0.0, 1.0])
            outputs.append(said(model))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


def test_peft_teachers_and_students_are_trained(tmp_path: Path) -> None:
    student, teacher = adapted(1), adapted(2)
    before = {name: weight.clone() for name, weight in student.named_parameters()}
    t = DistillationTrainer(
        student,
        teacher_model=teacher,
        train_dataset=tiny.dataset(8),
        eval_dataset=tiny.dataset(8),
        args=tiny.config(tmp_path, max_steps=2),
        processing_class=tiny.tokenizer(),
    )
    t.train()
    changed = {name for name, weight in student.named_parameters() if not torch.equal(weight, before[name])}
    assert changed and all("lora" in name or "classifier" in name for name in changed)
    assert t.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize(
    "change",
    [
        lambda model: fastdistill.prune(model, fastdistill.Scores([], []), 0.5),
        lambda model: fastdistill.first_layers(model, 1),
        lambda model: fastdistill.score_weights(model, [batch()], progress=False),
    ],
)
def test_what_changes_weights_says_to_merge_first(change: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match="merge them first: model.merge_and_unload()"):
        change(adapted(2))


def test_a_learned_prompt_is_named(tmp_path: Path) -> None:
    for use in (lambda model: stored(model, tmp_path), lambda model: fastdistill.gate(model).__enter__()):
        with pytest.raises(ValueError, match="model has a prompt that PEFT learned"):
            use(prompted())


# Quantized teachers


def test_a_quantized_teacher_is_stored_as_it_speaks(tmp_path: Path) -> None:
    def quantized(seed: int) -> Any:
        return torch.ao.quantization.quantize_dynamic(tiny.bert(seed).eval(), {nn.Linear}, dtype=torch.qint8)

    teacher = quantized(2)
    torch.testing.assert_close(stored(teacher, tmp_path), said(teacher))
    assert model_digest(teacher) == model_digest(quantized(2)) != model_digest(quantized(3))
    live, kept = (
        DistillationTrainer(
            tiny.bert(1, dropout=0.0),
            objective=LogitsKD(),
            args=tiny.config(tmp_path, max_steps=2, logging_steps=1),
            processing_class=tiny.tokenizer(),
            **options,
        )
        for options in (
            {"teacher_model": teacher, "train_dataset": tiny.dataset(4)},
            {
                "train_dataset": fastdistill.store(
                    tiny.dataset(4), teacher, collate=COLLATE, cache_file=tmp_path / "x.arrow"
                )
            },
        )
    )
    losses = []
    for t in (live, kept):
        t.train()
        losses.append([entry["loss"] for entry in t.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# Gates under gradient checkpointing


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_gated_layer_is_not_computed_anew_without_its_gates(reentrant: bool) -> None:
    model = tiny.bert(1, dropout=0.0).train()
    plain = {}
    with fastdistill.gate(model) as gates:
        model(**batch()).loss.backward()
        plain = [gate.grad.clone() for gate in gates.tensors]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with fastdistill.gate(model) as gates:
        model(**batch()).loss.backward()
        torch.testing.assert_close([gate.grad for gate in gates.tensors], plain)
        loss = model(**batch()).loss
    with pytest.raises(RuntimeError, match="a backward pass outside of fastdistill.gate computes a layer anew"):
        loss.backward()
    model(**batch()).loss.backward()  # nothing is left behind
