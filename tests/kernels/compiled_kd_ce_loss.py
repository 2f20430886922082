"""Calls of kd_ce_loss and dkd_loss, for `tests.kernels.compiled`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from fastdistill.kernels import kd_ce_loss as module

OPTIONS = {
    "temperature": 2.0, "target_weight": None, "kd_weight": 0.5, "ce_weight": 0.5, "divergence": "forward_kl",
    "scale_by_temperature": True, "ignore_index": -100, "label_smoothing": 0.0, "reduction": "mean",
    "student_grad": True, "teacher_grad": False,
}  # fmt: skip
HALF, SINGLE, DOUBLE = (torch.bfloat16,) * 2, (torch.float32,) * 2, (torch.float64,) * 2
EVERYTHING = {"teacher_grad": True, "label_smoothing": 0.1, "temperature": 3.7, "return_terms": True}
APART = {"target_weight": 1.0}  # dkd_loss
CASES: list[tuple[int, int, tuple[torch.dtype, torch.dtype], dict[str, Any]]] = [
    (32, 2, HALF, {}),
    (32, 2, SINGLE, {}),
    (4096, 3, HALF, {}),
    (4096, 3, SINGLE, {}),
    (8, 1000, HALF, EVERYTHING),
    (2, 32000, HALF, {}),
    (2, 128256, HALF, {}),
    (2, 128256, HALF, {"student_grad": False}),
    (2, 128256, HALF, {"kd_weight": 0.0}),
    (2, 128256, HALF, {"divergence": "reverse_kl", "temperature": 3.7}),
    (2, 128256, HALF, EVERYTHING),
    (2, 128256, (torch.bfloat16, torch.float32), {"divergence": "soft_ce", "temperature": 3.7}),
    (2, 128256, SINGLE, {}),
    (2, 128256, DOUBLE, EVERYTHING),
    (32, 2, SINGLE, APART),
    (4096, 100, HALF, APART),
    (8, 1000, HALF, EVERYTHING | APART),
    (8, 1000, DOUBLE, EVERYTHING | APART),
    (2, 32000, HALF, APART),
    (2, 128256, SINGLE, APART),
    (2, 128256, HALF, EVERYTHING | APART),
    (2, 128256, HALF, EVERYTHING | APART | {"divergence": "reverse_kl"}),
    (2, 128256, DOUBLE, EVERYTHING | APART),
]
FEW = [CASES[i] for i in (0, 1, 4, 10, 16, 20)]


def launches(cases: list[Any]) -> Iterator[str]:
    for rows, classes, dtypes, changes in cases:
        student, teacher = (torch.zeros(rows, classes, dtype=dtype) for dtype in dtypes)
        labels = torch.zeros(rows, dtype=torch.int64)
        module._launch(student, teacher, labels, **{**OPTIONS, **changes})
        yield f"{rows}x{classes} {' '.join(str(d)[6:] for d in dtypes)} {changes or ''}"
