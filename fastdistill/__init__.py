"""Compiled kernels and a training API for distilling and pruning transformers.

``fastdistill.ops`` holds differentiable functions for any training loop; the names below work on Hugging Face models.
"""

from __future__ import annotations

import importlib
from typing import Any

from fastdistill import attention, ops

__version__ = "0.1.0"

# Imported when first used: they bring transformers and datasets with them.
_LAZY = {
    "AvgKD": "multi_teacher",
    "CKD": "contextual",
    "DeKD": "dekd",
    "DistillationConfig": "trainer",
    "DistillationTrainer": "trainer",
    "LogitsKD": "objectives",
    "MSE": "objectives",
    "MTBERT": "multi_teacher",
    "PKD": "alignment",
    "SampledTeacher": "multi_teacher",
    "Scores": "scores",
    "SelectEachEpoch": "selection",
    "TeacherOutputs": "teachers",
    "TeacherTeam": "team",
    "WeightedSum": "objectives",
    "first_layers": "students",
    "first_token_only": "first_token",
    "from_pretrained": "pruning",
    "gate": "gates",
    "load_task": "data",
    "mask_weights": "weights",
    "parameter_pruned": "students",
    "prune": "pruning",
    "score": "scoring",
    "score_weights": "weights",
    "shuffled_sharing": "students",
    "store": "stored",
    "tokenize": "data",
    "doctor": "diagnosis",
}
__all__ = [
    "__version__",
    "accumulate_sensitivity_",
    "gated_attention",
    "gated_ffn",
    "hidden_entropy",
    "kd_ce_loss",
    "ops",
    "select_uncertain",
    "uncertainty",
    *_LAZY,
]

accumulate_sensitivity_ = ops.accumulate_sensitivity_
gated_attention = ops.gated_attention
gated_ffn = ops.gated_ffn
hidden_entropy = ops.hidden_entropy
kd_ce_loss = ops.kd_ce_loss
select_uncertain = ops.select_uncertain
uncertainty = ops.uncertainty


attention.register()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastdistill.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
