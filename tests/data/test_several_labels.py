import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastdistill.data.load import load_task, tokenize
from tests import tiny


def several(labels):
    return [{"sentence1": f"text {k}", "label": label} for k, label in enumerate(labels)]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("labels", [[["joy", "fear"], [], ["anger"], ["fear"]], [[2, 1], [], [0], [1]]])
def test_lists_are_several_labels(tmp_path, suffix, labels):
    rows = several(labels)
    for split in ("train", "validation"):
        if suffix == ".parquet":
            tmp_path.mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
        else:
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_task(tmp_path)
    assert data.task.multi_label and data.task.metric == "f1_micro"
    assert data.task.label_names == (("anger", "fear", "joy") if labels[0][0] == "joy" else ("0", "1", "2"))
    assert data.train["label"][:] == [[0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0]]
    tokenized = tokenize(data.train, tiny.tokenizer(), data.task)
    assert tokenized["labels"][:] == data.train["label"][:]


@pytest.mark.parametrize(
    "labels, problem",
    [
        ([["a"], "b"], "'b' is not a list, as the first row's is"),
        (["a", ["b"]], "['b'] is not one label, as the first row's is"),
        ([["a"], [1]], "1 is not a text, as the first row's is"),
        ([["a", 1.5]], "has 1.5; expected texts or integers"),
        ([[["a"]]], "has ['a']; expected texts or integers"),
        ([[0], [2]], "2 is out of range; expected 2 classes numbered 0..1"),
        ([[], []], "no row has a label; expected two classes or more"),
    ],
)
def test_lists_that_are_no_labels(tmp_path, labels, problem):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in several(labels)))
    with pytest.raises(ValueError, match=re.escape(problem)):
        load_task(tmp_path)
