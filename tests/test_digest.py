from __future__ import annotations

import datasets
import numpy as np

from fastdistill.digest import digest, row_pieces


def test_rows_have_one_digest_however_they_are_kept() -> None:
    """Of every type, with nulls, and of slices that begin and end within a byte."""
    columns = {
        "flags": [[True, False], None, [True]] * 40,
        "texts": ["a", None, "longer"] * 40,
        "numbers": [1, None, 3] * 40,
        "bytes": [b"\0", b"", b"xyz"] * 40,
        "nested": [{"a": [[1.5], []]}, {"a": None}, {"a": [[2.5, 3.5]]}] * 40,
        "array": [np.full((2, 3), float(row)) for row in range(120)],
    }
    features = {**datasets.Dataset.from_dict(columns).features, "array": datasets.Array2D((2, 3), "float32")}
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    taken = rows.select(range(119, -1, -1)).flatten_indices().select(range(119, -1, -1))
    for some in (range(120), range(5, 98), range(1, 2)):
        parts = [rows.select(some), taken.select(some)]
        parts.append(datasets.Dataset.from_list(parts[0].to_list(), features=rows.features))
        assert len({digest(row_pieces(part)) for part in parts}) == 1
    assert digest(row_pieces(rows)) != digest(row_pieces(taken.select(range(119, -1, -1))))
