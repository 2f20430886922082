"""How weights are moved, by TrainingArguments' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import PropertyMock, patch

import pytest
import torch
from transformers import Trainer

from fastdistill import LogitsKD
from fastdistill.recipes.fitting import config_of
from fastdistill.recipes.optimization import IMAGES, TEXT, Optimization, optimization_of
from fastdistill.recipes.settings import KDSettings
from fastdistill.recipes.training import Training
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


def test_one_process_has_one_gpu(tmp_path: Path) -> None:
    """Else transformers would give each of a machine's GPUs a batch of that size."""
    training = Training(
        name="kd", model=tiny.bert(1), objective=LogitsKD(), epochs=1, learning_rate=1e-4, batch_size=32
    )
    options: dict[str, Any] = {"seed": 0, "bf16": False, "cuda_graphs": False, "checkpoints": None}
    for there_are, used in ((0, 0), (1, 1), (4, 1)):
        with patch.object(DistillationConfig, "n_gpu", PropertyMock(return_value=there_are)):
            config = config_of(training, tmp_path, TEXT, tensorboard=False, **options)
        assert config.n_gpu == used
