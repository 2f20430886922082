"""How weights are moved, by TrainingArguments' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from fastdistill.recipes.optimization import IMAGES, TEXT, Optimization, optimization_of
from fastdistill.recipes.settings import KDSettings
from fastdistill.training.config import DistillationConfig
from tests import tiny


def settings(**options: Any) -> KDSettings:
    return KDSettings(task="sst2", teacher="minilm", student_layers=1, output="run", **options)


@pytest.mark.parametrize(
    "options, of_images, wanted",
    [
        ({}, False, TEXT),
        ({}, True, IMAGES),
        ({"optim": "sgd"}, False, Optimization(optim="sgd", momentum=0.9)),
        (
            {"optim": "sgd", "momentum": 0.0, "weight_decay": 0.0},
            False,
            Optimization(optim="sgd", momentum=0.0, weight_decay=0.0),
        ),
        (
            {"warmup_steps": 0.2, "lr_scheduler_type": "cosine"},
            False,
            Optimization(lr_scheduler_type="cosine", warmup_steps=0.2),
        ),
    ],
)
def test_what_is_not_asked_is_as_for_texts_or_images(options: Any, of_images: bool, wanted: Any) -> None:
    assert optimization_of(settings(**options), is_of_images=of_images) == wanted


def test_momentum_is_of_sgd() -> None:
    with pytest.raises(ValueError, match="--momentum is 0.9, but --optim is adamw_torch_fused"):
        optimization_of(settings(momentum=0.9))
    with pytest.raises(ValueError, match="--momentum is 0.9, but --optim is adamw_torch;"):
        optimization_of(settings(momentum=0.9, optim="adamw_torch"), is_of_images=True)


@pytest.mark.parametrize("optimization, kind", [(TEXT, torch.optim.AdamW), (IMAGES, torch.optim.SGD)])
def test_trainer_has_what_was_asked(optimization: Optimization, kind: type, tmp_path: Path) -> None:
    config = DistillationConfig(str(tmp_path), learning_rate=0.2, use_cpu=True, **optimization.arguments())
    optimizer = Trainer(tiny.bert(), config).create_optimizer()
    assert type(optimizer) is kind
    assert bool(optimizer.defaults["fused"]) == (kind is torch.optim.AdamW)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.2, optimization.weight_decay)
    assert group.get("momentum") == optimization.momentum
    assert (config.lr_scheduler_type, config.max_grad_norm) == (
        optimization.lr_scheduler_type,
        optimization.max_grad_norm,
    )
