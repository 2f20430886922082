"""FSDP2 over two processes against one process: the same training, within float rounding, saved whole and resumed.

accelerate has FSDP on accelerators only; PyTorch's `fully_shard` itself runs on the CPU. Here accelerate is told that
the processes' kind is FSDP, and all the rest is as it would be on GPUs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from fastdistill import DistillationTrainer, LogitsKD
from fastdistill.models.first_token import first_token_only
from fastdistill.recipes.best import BestEpoch
from tests import tiny
from tests.parallel import ONE, TWO, assert_alike_runs, assert_alike_weights, launched, make_sources, run

RESUMED = "resumed"


def allow_on_cpu() -> None:
    from accelerate.state import AcceleratorState, DistributedType

    made = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if "fsdp_plugin" in self.__dict__:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init


def train(folder: Path, processes: int, checkpoint: Path | None = None) -> None:
    """Sixteen examples a step, the last step of an epoch twelve, and nineteen to evaluate."""
    student = tiny.bert(1, dropout=0.0)
    sharded = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["BertLayer"]}}
    t = DistillationTrainer(
        model=student,
        teacher_model=tiny.bert(2, layers=3),
        objective=LogitsKD(kd_weight=0.7),
        train_dataset=tiny.dataset(60),
        eval_dataset=tiny.dataset(19, seed=3),
        processing_class=tiny.tokenizer(),
        args=tiny.config(
            folder,
            per_device_train_batch_size=16 // processes,
            per_device_eval_batch_size=8,
            num_train_epochs=2,
            learning_rate=3e-3,
            max_grad_norm=0.5,
            logging_steps=2,
            save_strategy="steps",
            save_steps=2,
            **(sharded if processes > 1 else {}),
        ),
    )
    with first_token_only(student):
        losses = [t.evaluate()["eval_loss"]]
        t.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        losses.append(t.evaluate()["eval_loss"])
    assert isinstance(t.model, FSDPModule) == (processes > 1)
    t.save_model()
    if t.is_world_process_zero():
        logs = [entry for entry in t.state.log_history if "loss" in entry]
        seen = [[entry[name] for name in ("loss", "kd", "ce", "grad_norm")] for entry in logs]
        (folder / "seen.json").write_text(json.dumps({"logs": seen, "losses": losses}))


def run_kd(folder: Path, output: Path) -> None:
    """Of two epochs the first counts: its weights are given back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BestEpoch, "_rank", lambda self, evaluation: (-evaluation["step"],))
        run(folder, output, ["kd"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    folder = make_sources(tmp_path_factory.mktemp("fsdp"))
    with launched("tests.training.test_fsdp", str(folder)):
        train(folder / ONE, 1)
        run_kd(folder, folder / ONE)
    yield folder


@pytest.mark.slow
@pytest.mark.parametrize("number", [TWO, RESUMED])
def test_a_sharded_student_trains_as_a_whole_one(runs: Path, number: str) -> None:
    one, two = (json.loads((runs / name / "seen.json").read_text()) for name in (ONE, number))
    for ours, theirs in zip(two["logs"], one["logs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert_alike_weights(runs / number, runs / ONE)


@pytest.mark.slow
def test_a_recipe_saves_whole_models(runs: Path) -> None:
    marker = json.loads((runs / TWO / "kd" / "distilled" / "stage.json").read_text())
    assert marker["result"]["epoch"] == 1
    assert_alike_runs(runs / TWO / "kd", runs / ONE / "kd")


LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""What accelerate launch sets."""


if __name__ == "__main__":
    allow_on_cpu()
    folder = Path(sys.argv[1])
    train(folder / TWO, 2)
    train(folder / RESUMED, 2, checkpoint=folder / TWO / "checkpoint-2")
    os.environ |= LAUNCHED
    run_kd(folder, folder / TWO)
