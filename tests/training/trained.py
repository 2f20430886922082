"""Tiny models of a kind of head in a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdistill import DistillationTrainer
from tests import heads, tiny


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


def log(t: DistillationTrainer, name: str = "loss") -> list[float]:
    t.train()
    return [entry[name] for entry in t.state.log_history if name in entry]
