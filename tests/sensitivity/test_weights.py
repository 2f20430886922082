from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill import PKD, LogitsKD
from fastdistill.models.architectures import encoder_weights
from fastdistill.objectives.logits import TaskLoss
from fastdistill.sensitivity.weights import WeightScores, mask_weights, random_weight_scores, score_weights
from tests import tiny
from tests.tiny import batches, pair

NAMES = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")


def test_the_encoders_matrices_are_scored() -> None:
    names = [name for name, _ in encoder_weights(tiny.bert(layers=2))]
    kinds = (*NAMES, "intermediate.dense", "output.dense")
    assert names == [f"bert.encoder.layer.{layer}.{kind}.weight" for layer in range(2) for kind in kinds]


@pytest.mark.parametrize("objective", [None, LogitsKD(temperature=3.0)])
def test_scores_are_weights_times_gradients(objective: Any) -> None:
    teacher, student = pair()
    teacher.train()
    data = batches((4, 3))
    found = score_weights(teacher, data, student, objective=objective, progress=False)
    assert teacher.training and all(p.grad is None for p in teacher.parameters())
    teacher.eval(), student.eval()
    kd = objective or LogitsKD(temperature=2.0, divergence="soft_ce", ce_weight=0.0)
    for place, scores in enumerate((found.expressiveness, found.friendliness)):
        assert scores is not None
        expected = {name: torch.zeros_like(weight) for name, weight in encoder_weights(teacher)}
        for batch in data:
            features = {name: value for name, value in batch.items() if name != "labels"}
            theirs, ours = teacher(**features), student(**features)
            loss = TaskLoss()(theirs, None, batch["labels"]) if place == 0 else kd(ours, theirs, batch["labels"])
            gradients = torch.autograd.grad(loss, [weight for _, weight in encoder_weights(teacher)])
            for (name, weight), gradient in zip(encoder_weights(teacher), gradients, strict=True):
                expected[name] += (weight.detach() * gradient).abs() / len(data)
        for name, total in expected.items():
            torch.testing.assert_close(scores.matrices[name].double(), total, rtol=1e-5, atol=1e-10)


def test_weights_that_an_objective_does_not_reach_have_no_sensitivity_to_it() -> None:
    teacher, student = pair()
    found = score_weights(teacher, batches(), student, objective=PKD("last"), progress=False)
    assert found.friendliness is not None
    reached = {name: bool(matrix.any()) for name, matrix in found.friendliness.matrices.items()}
    assert any(reached.values())
    assert all(matrix.any() for matrix in found.expressiveness.matrices.values())


def test_the_lowest_of_all_matrices_are_masked() -> None:
    model = tiny.bert(layers=2)
    scores = random_weight_scores(model, torch.Generator().manual_seed(0))
    masked = mask_weights(model, scores, 0.3)
    before, after = dict(encoder_weights(model)), dict(encoder_weights(masked))
    values = torch.cat([scores.matrices[name].flatten() for name in before])
    threshold = values.sort().values[round(0.3 * len(values))]
    for name, weight in before.items():
        kept = scores.matrices[name] >= threshold
        assert torch.equal(after[name], weight * kept)
    others = [name for name in model.state_dict() if name not in before]
    for name in others:
        assert torch.equal(model.state_dict()[name], masked.state_dict()[name])


def test_of_equals_the_first_are_masked() -> None:
    model = tiny.bert(layers=1)
    equal = WeightScores({name: torch.ones_like(weight) for name, weight in encoder_weights(model)})
    total = sum(weight.numel() for _, weight in encoder_weights(model))
    weights = torch.cat([w.flatten() for _, w in encoder_weights(mask_weights(model, equal, 0.25))])
    assert (weights == 0).tolist() == [place < round(0.25 * total) for place in range(total)]
    assert all((w == 0).sum() == 0 for _, w in encoder_weights(mask_weights(model, equal, 0.0)))


def test_saved_normalised_and_interpolated(tmp_path: Path) -> None:
    scores = random_weight_scores(tiny.bert(layers=1), torch.Generator().manual_seed(0))
    scores.save(tmp_path / "scores.safetensors")
    loaded = WeightScores.load(tmp_path / "scores.safetensors")
    mixed = scores.lerp(loaded.normalized(), 0.25)
    for name, matrix in scores.matrices.items():
        assert torch.equal(loaded.matrices[name], matrix)
        torch.testing.assert_close(mixed.matrices[name], 0.75 * matrix + 0.25 * matrix / matrix.square().sum().sqrt())


def test_what_cannot_be_scored_or_masked() -> None:
    teacher, student = pair()
    with pytest.raises(ValueError, match="objective is given but student is None"):
        score_weights(teacher, batches(), objective=LogitsKD())
    with pytest.raises(ValueError, match="loader gave no labelled example"):
        score_weights(teacher, [], student, progress=False)
    scores = random_weight_scores(tiny.bert(layers=1), torch.Generator())
    with pytest.raises(ValueError, match="other matrices"):
        mask_weights(teacher, scores, 0.5)
    with pytest.raises(ValueError, match="sparsity is 2"):
        mask_weights(tiny.bert(layers=1), scores, 2)
    next(iter(scores.matrices.values()))[0, 0] = torch.nan
    with pytest.raises(ValueError, match="scores hold NaN"):
        mask_weights(tiny.bert(layers=1), scores, 0.5)
