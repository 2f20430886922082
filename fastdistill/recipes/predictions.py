"""What a model answers to each reported example, kept beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastdistill.files import replacing

PREDICTIONS = "predictions.parquet"

_Array = np.ndarray[Any, np.dtype[Any]]


def save_predictions(path: Path, labels: _Array, outputs: _Array) -> None:
    """Columns "label" and "output", the logits or the score, in the order of the reported examples."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    table = pa.table({"label": labels, "output": list(outputs.astype(np.float32))})
    with replacing(path) as temporary:
        parquet.write_table(table, temporary)


def load_predictions(path: Path) -> tuple[_Array, _Array]:
    """Labels ``[N]`` and outputs ``[N, C]``."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(path)
    return table["label"].to_numpy(), np.stack(table["output"].to_numpy())
