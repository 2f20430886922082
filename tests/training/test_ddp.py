"""Two processes against one: the same training, within float rounding."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from fastdistill import DistillationTrainer, LogitsKD
from tests import tiny
from tests.parallel import launched


def train(folder: Path, processes: int) -> None:
    """Sixteen examples a step, with lengths that differ between processes. Plain gradient descent without dropout,
    so that the results are as alike as the gradients."""
    t = DistillationTrainer(
        model=tiny.bert(1, dropout=0.0),
        teacher_model=tiny.bert(2, layers=3),
        objective=LogitsKD(kd_weight=0.7),
        train_dataset=tiny.dataset(64),
        eval_dataset=tiny.dataset(16, seed=3),
        processing_class=tiny.tokenizer(),
        args=tiny.config(
            folder,
            per_device_train_batch_size=8 // processes,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            optim="sgd",
            max_grad_norm=0.0,
            logging_steps=2,
        ),
    )
    t.train()
    wrapped = [isinstance(m, DistributedDataParallel) for m in (t.model_wrapped, t.teacher_model)]
    assert wrapped == [processes > 1, False]
    loss = t.evaluate()["eval_loss"]
    t.save_model()
    if t.is_world_process_zero():
        logs = [[entry[k] for k in ("loss", "kd", "ce")] for entry in t.state.log_history if "loss" in entry]
        (folder / "seen.json").write_text(json.dumps({"logs": logs, "eval_loss": loss}))


def results(folder: Path) -> tuple[dict[str, torch.Tensor], Any]:
    return load_file(folder / "model.safetensors"), json.loads((folder / "seen.json").read_text())


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    with launched("tests.training.test_ddp", str(tmp_path / "two")):
        train(tmp_path / "one", 1)
    (one, seen), (two, seen_by_two) = results(tmp_path / "one"), results(tmp_path / "two")
    start = tiny.bert(1).state_dict()
    assert not torch.equal(one["classifier.weight"], start["classifier.weight"])
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
    assert len(seen["logs"]) == 4
    for ours, theirs in zip(seen_by_two["logs"], seen["logs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert seen_by_two["eval_loss"] == pytest.approx(seen["eval_loss"], rel=1e-4)


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(os.environ["WORLD_SIZE"]))
