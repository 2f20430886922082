"""Small stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import DataCollatorWithPadding

from fastdistill import store
from tests import tiny

ROWS = 22
COLLATE = DataCollatorWithPadding(tiny.tokenizer())


def keep(folder: Path, data: Any = None, model: Any = None, **options: Any) -> Any:
    data, model = data if data is not None else tiny.dataset(ROWS), model if model is not None else tiny.bert(2)
    settings = {"collate": COLLATE, "batch_size": 4, "cache_file": folder / "teacher.arrow"}
    return store(data, model, **settings | options)
