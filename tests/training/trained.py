"""Tiny models of a kind of head in a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from fastdistill import DistillationTrainer
from tests import heads, tiny

GENERATORS = ("T5ForConditionalGeneration", "BartForConditionalGeneration")


def trainer(folder: Path, name: str, objective: Any = None, **options: Any) -> DistillationTrainer:
    args = {"max_steps": 2, "logging_steps": 1, "learning_rate": 1e-3} | options.pop("args", {})
    settings = {
        "model": heads.model(name, 1),
        "teacher_model": heads.model(name, 2),
        "train_dataset": heads.rows(name),
        "data_collator": heads.collate,
        "args": tiny.config(folder, **args),
    }
    return DistillationTrainer(objective=objective, **settings | options)


def without_labels(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("labels", "start_positions", "end_positions")} for row in rows]


def log(t: DistillationTrainer, name: str = "loss") -> list[float]:
    t.train()
    return [entry[name] for entry in t.state.log_history if name in entry]


def bert_trainer(folder: Path, model: nn.Module | None = None, **options: Any) -> DistillationTrainer:
    """A student, a teacher and 40 examples; options that begin with `args_` go to the configuration."""
    args = {name.removeprefix("args_"): options.pop(name) for name in list(options) if name.startswith("args_")}
    settings = {
        "model": model if model is not None else tiny.bert(1),
        "teacher_model": tiny.bert(2, layers=3),
        "train_dataset": tiny.dataset(40),
        "processing_class": tiny.tokenizer(),
        "args": tiny.config(folder, **args),
    }
    return DistillationTrainer(**settings | options)


def batch(t: DistillationTrainer, dataset: Any, *places: int) -> dict[str, Tensor]:
    return dict(t.data_collator([dataset.remove_columns("length")[place] for place in places or range(len(dataset))]))


def vit(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(**shape, image_size=8, patch_size=4, num_labels=2))
