from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastdistill import LogitsKD, shared_tokens
from tests import heads, tiny
from tests.training.trained import log, trainer

LABELS = torch.tensor([0, 5, -100, 6])


def outputs(seed: int, classes: int) -> Any:
    logits = torch.randn(4, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return SimpleNamespace(logits=logits.requires_grad_())


@pytest.mark.parametrize("sizes", [(7, 9), (9, 7), (7, 7)])
@pytest.mark.parametrize("ce_weight", [0.0, 0.4])
def test_the_common_tokens_are_distilled(sizes: tuple[int, int], ce_weight: float) -> None:
    student, teacher = outputs(1, sizes[0]), outputs(2, sizes[1])
    objective = LogitsKD(ce_weight=ce_weight, kd_weight=0.7, vocab="common")
    loss, parts = objective.parts(student, teacher, LABELS)
    counted = LABELS != -100
    p, q = ((o.logits[counted, :7] / 2).softmax(-1) for o in (teacher, student))
    kd, ce = 4 * (p * (p / q).log()).sum(-1).mean(), F.cross_entropy(student.logits, LABELS)
    torch.testing.assert_close(loss, 0.7 * kd + ce_weight * ce)
    torch.testing.assert_close(parts["kd"], kd.detach())
    expected = torch.autograd.grad(0.7 * kd + ce_weight * ce, student.logits)
    torch.testing.assert_close(torch.autograd.grad(loss, student.logits), expected)


def test_padded_vocabularies_train_where_it_is_asked_for(tmp_path: Path) -> None:
    name = "LlamaForCausalLM"
    wide = {"teacher_model": heads.model(name, 2, vocab_size=72)}
    assert len(log(trainer(tmp_path, name, LogitsKD(vocab="common"), **wide))) == 2
    with pytest.raises(ValueError, match="teacher_model has a vocabulary of 72 tokens but model of 64"):
        trainer(tmp_path, name, **wide)


def test_the_shared_tokens_of_two_tokenizers_are_counted(tmp_path: Path) -> None:
    ours, theirs = tiny.tokenizer(["ba", "be", "bi"]), tiny.tokenizer(["be", "zu", "ba"])
    shared = shared_tokens(ours, theirs)
    assert len(shared) == 7
    assert str(shared) == "7 tokens of 8 and 8"
    assert shared.ours.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert shared.theirs.tolist() == [0, 1, 2, 3, 4, 7, 5]
    teacher = heads.model("BertForSequenceClassification", 2)
    teacher.save_pretrained(tmp_path / "teacher")
    theirs.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="share 7 tokens of 8 and 8, of which 2 are at other places"):
        trainer(
            tmp_path,
            "BertForSequenceClassification",
            LogitsKD(vocab="common"),
            teacher_model=tmp_path / "teacher",
            processing_class=ours,
        )
