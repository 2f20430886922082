"""Trainings of every objective whose steps CUDA graphs can replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastdistill import CKD, DKD, MSE, PKD, DeKD, DistilBERT, LogitsKD, MultiLabelKD, TinyBERT, WeightedSum
from fastdistill.objectives.logits import TaskLoss
from fastdistill.objectives.team import MTBERT, AvgKD, SampledTeacher
from tests import tiny


def data(rows: int = 96, *names: str, **options: Any) -> Any:
    made = tiny.dataset(rows, **options)
    for seed, name in enumerate(names):
        made = made.add_column(f"{name}_logits", np.random.default_rng(seed).normal(size=(rows, 2)).tolist())
    return made


TRAININGS: dict[str, Callable[[], dict[str, Any]]] = {
    "stored logits": dict,
    "accumulated": lambda: {"args_gradient_accumulation_steps": 3, "args_num_train_epochs": 4},
    "a live teacher": lambda: {"teacher_model": tiny.bert(2, layers=3), "train_dataset": data()},
    "no labels": lambda: {
        "objective": LogitsKD(ce_weight=0.0), "train_dataset": data(96, "teacher").remove_columns("labels")
    },
    "attention of ours": lambda: {"model": tiny.bert(1, dropout=0.0, attn_implementation="fastdistill")},
    "no teacher": lambda: {"objective": TaskLoss()},
    "decoupled": lambda: {"objective": DKD()},
    "regression": lambda: {
        "objective": MSE(), "teacher_model": tiny.bert(2, num_labels=1), "train_dataset": data(regression=True),
        "model": tiny.bert(1, dropout=0.0, num_labels=1),
    },
    "several labels": lambda: {
        "objective": MultiLabelKD(), "teacher_model": tiny.bert(2, problem_type="multi_label_classification"),
        "model": tiny.bert(1, dropout=0.0, problem_type="multi_label_classification"),
        "train_dataset": data().remove_columns("labels").add_column("labels", [[0.0, 1.0]] * 96),
    },
    "patient": lambda: {
        "objective": WeightedSum({"kd": (1, LogitsKD()), "pkd": (10, PKD())}), "teacher_model": tiny.bert(2, layers=4),
        "train_dataset": data(),
    },
    "contextual": lambda: {
        "objective": WeightedSum({"kd": (1, LogitsKD()), "ckd": (1, CKD(window=5))}), "teacher_model": tiny.bert(2),
        "train_dataset": data(),
    },
    "DistilBERT": lambda: {"objective": DistilBERT(), "teacher_model": tiny.bert(2), "train_dataset": data()},
    "TinyBERT": lambda: {
        "objective": TinyBERT(attention_weight=0.1), "teacher_model": tiny.bert(2), "train_dataset": data()
    },
    "DeKD": lambda: {"objective": DeKD(da_weight=0.0, assistant=False, log_selection=True)},
    "DeKD with hidden states": lambda: {
        "objective": DeKD(assistant=False),
        "train_dataset": data(96, "teacher").add_column(
            "teacher_hidden_states", np.random.default_rng(5).normal(size=(96, 4, 16)).tolist()
        ),
    },
    "a team": lambda: {"objective": AvgKD(("a", "b")), "train_dataset": data(96, "a", "b")},
    "a team of which one is drawn": lambda: {
        "objective": SampledTeacher({"a": 0.4, "b": 0.6}, seed=3), "train_dataset": data(96, "a", "b")
    },
    "a team by its labels": lambda: {"objective": MTBERT(("a", "b")), "train_dataset": data(96, "a", "b")},
}  # fmt: skip
