"""Where the time of a training step and of a scoring batch of `fastdistill stark` goes: PyTorch's operators by their
own time on the CPU, as shares of all, and what a step or a batch takes when nothing is recorded.

    python -m benchmarks.profiled --task FOLDER --teacher FOLDER [--examples 512]

The teacher is a classifier of the task already; its student has a third of its layers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch.profiler import ProfilerActivity, profile

from fastdistill import from_pretrained, score
from fastdistill.cli import main as run
from fastdistill.recipes import measuring

SHOWN = 12  # operators


class Watch:
    """Of a function's calls: the seconds, and by operator the seconds that are its own."""

    def __init__(self, record: bool) -> None:
        self.record, self.seconds, self.operators = record, 0.0, dict[str, float]()

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            if not self.record:
                start = time.perf_counter()
                result = function(*args, **options)
                self.seconds += time.perf_counter() - start
                return result
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                result = function(*args, **options)
            for one in seen.key_averages():
                self.operators[one.key] = self.operators.get(one.key, 0.0) + one.self_cpu_time_total / 1e6
            return result

        return watched


def search(options: argparse.Namespace, record: bool) -> tuple[Watch, Watch]:
    """A search of one sparsity, whose trial's training and scoring are watched."""
    training, scoring = Watch(record), Watch(record)
    train = transformers.Trainer.train

    def of_trial(self: Any, *args: Any, **more: Any) -> Any:
        is_trial = Path(self.args.output_dir).name.startswith("trial")
        return (training(train) if is_trial else train)(self, *args, **more)

    layers = from_pretrained(options.teacher).config.num_hidden_layers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.Trainer, "train", of_trial)
        patch.setattr(measuring, "score", scoring(score))
        run(
            [
                "stark", "--task", options.task, "--teacher", options.teacher, "--teacher-epochs", "0", "--no-plots",
                "--student-layers", str(max(1, layers // 3)), "--epochs", "1", "--max-train-examples",
                str(options.examples), "--max-eval-examples", "32", "--sparsity", "0.5", "--checkpoints", "0",
                "--output", tempfile.mkdtemp(),
            ]
        )  # fmt: skip
    return training, scoring


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--examples", type=int, default=512)
    options = parser.parse_args()
    steps = -(-options.examples // 32)
    for name, timed, seen in zip(
        ("a training step", "a scoring batch"), search(options, False), search(options, True), strict=True
    ):
        total = sum(seen.operators.values())
        print(f"{name}: {timed.seconds / steps * 1e3:.1f} ms")
        for operator, seconds in sorted(seen.operators.items(), key=lambda one: -one[1])[:SHOWN]:
            print(f"  {seconds / total:6.1%} {seconds / steps * 1e3:8.2f} ms  {operator}")


if __name__ == "__main__":
    main()
