"""Command-line options that recipes share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fastdistill.ops.kd_ce_loss import DIVERGENCES, Divergence

Item = TypeVar("Item")


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer of at least `low` and at most `high`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            wanted = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is not an integer {wanted}")
        return value

    parse.__name__ = "integer"  # argparse names the type after the function: "invalid integer value"
    return parse


def number(
    *, low: float | None = None, above: float | None = None, below: float | None = None, most: float | None = None
) -> Callable[[str], float]:
    """An argparse type: a finite number of at least `low`, or greater than `above`, and less than `below`, or at most
    `most`."""

    def parse(text: str) -> float:
        value = float(text)
        limits = {
            f"of at least {low}": low is None or value >= low,
            f"above {above}": above is None or value > above,
            f"below {below}": below is None or value < below,
            f"at most {most}": most is None or value <= most,
        }
        if not math.isfinite(value) or not all(limits.values()):
            wanted = " and ".join(limit for limit in limits if not limit.endswith("None"))
            raise argparse.ArgumentTypeError(f"{text} is not a finite number {wanted}")
        return value

    parse.__name__ = "number"
    return parse


def choice(*names: str) -> Callable[[str], str]:
    """An argparse type: one of these names."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is not among {', '.join(names)}")
        return text

    return parse


def listed(type: Callable[[str], Item], *, different: bool = True) -> Callable[[str], tuple[Item, ...]]:
    """An argparse type: one or more values of another type, with commas between them, which must be `different`."""

    def parse(text: str) -> tuple[Item, ...]:
        values = tuple(type(part.strip()) for part in text.split(","))
        if different and len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"{text} has a value twice")
        return values

    parse.__name__ = f"list of {type.__name__}s"
    return parse


def add_run(parser: argparse.ArgumentParser, *, needs_layers: bool = True, of_text_alone: bool = True) -> None:
    """What to learn, from whom, and where to keep it; a student of the teacher's first layers, if there is no other.

    A recipe that is not of text alone has tasks of images too, which have neither teacher nor layers."""
    add = parser.add_argument_group("what to run").add_argument
    add(
        "--task",
        required=True,
        help="a task's name (docstrings, which needs no network; sst2, mnli and the rest of GLUE; ag_news, emotion, "
        "imdb), or a folder or file of jsonl[.gz], csv, tsv or parquet with columns sentence1[, sentence2], label"
        + ("" if of_text_alone else "; or a folder of images, train/CLASS/* and validation/CLASS/*"),
    )
    add(
        "--teacher",
        required=of_text_alone,
        help="folder or hub name of a transformers encoder in safetensors, or minilm, which the extra 'demo' brings",
    )
    add(
        "--student-layers",
        required=needs_layers and of_text_alone,
        type=integer(1),
        metavar="K",
        help="the teacher's layers that the student has",
    )
    add(
        "--output",
        required=True,
        type=Path,
        metavar="DIR",
        help="where models and results.json go; the same command with the same DIR goes on where it was interrupted",
    )
    add("--overwrite", action="store_true", help="write over results.json of another recipe or program")
    add("--max-train-examples", type=integer(1), metavar="N", help="train on a random N (default: all)")
    add("--max-eval-examples", type=integer(1), metavar="N", help="evaluate on a random N (default: all)")
    add("--max-length", type=integer(3), metavar="N", help="tokens that an example is cut to (default: the task's)")


def add_training(parser: argparse.ArgumentParser) -> None:
    """How teachers and students are trained."""
    add = parser.add_argument_group("training").add_argument
    positive = number(above=0)
    add("--epochs", type=positive, default=3.0, metavar="N", help="epochs of a student (default: %(default)g)")
    add(
        "--teacher-epochs",
        type=number(low=0),
        metavar="N",
        help="epochs of the teacher's fine-tuning, 0 to take it as it is (default: 0 where its config names the task's "
        "labels, else 2)",
    )
    add(
        "--batch-size",
        type=integer(1),
        default=32,
        metavar="N",
        help="examples in a training batch, all processes' together (default: %(default)s)",
    )
    add(
        "--learning-rate",
        type=positive,
        metavar="X",
        help="peak learning rate of a student (default: 3e-4 for encoders of MiniLM's width, 384; less for "
        "wider, by the square: 7.5e-5 for BERT-base)",
    )
    add(
        "--teacher-learning-rate",
        type=positive,
        metavar="X",
        help="peak learning rate of the teacher's fine-tuning (default: a third of a student's default)",
    )
    add("--label-smoothing", type=number(low=0, below=1), metavar="X", help="of the students' labels (default: 0)")
    add("--seed", type=integer(0, 2**32 - 1), default=0, metavar="N", help="(default: %(default)s)")
    add(
        "--bf16",
        action="store_true",
        help="train and evaluate in bfloat16 mixed precision; scores of heads, neurons or weights stay float32",
    )
    add(
        "--checkpoints",
        type=integer(0),
        default=3,
        metavar="N",
        help="how often a model's training saves its state, to go on from if interrupted (default: %(default)s)",
    )
    add("--tensorboard", action="store_true", help="write TensorBoard logs beside the models")


def add_distillation(parser: argparse.ArgumentParser, *, divergence: Divergence = "forward_kl") -> None:
    """The distillation objective; its recipe's default divergence is to be told here."""
    add = parser.add_argument_group("distillation").add_argument
    add("--temperature", type=number(above=0), metavar="X", help="of the softmax on both sides (default: 2)")
    add(
        "--kd-weight",
        type=number(above=0),
        default=1.0,
        metavar="X",
        help="weight of the teacher's term (default: %(default)g)",
    )
    add(
        "--ce-weight", type=number(low=0), default=1.0, metavar="X", help="weight of the labels' (default: %(default)g)"
    )
    add(
        "--divergence",
        choices=DIVERGENCES,
        help=f"of the student's probabilities from the teacher's (default: {divergence})",
    )


def add_storing(add: Callable[..., object]) -> None:
    """Whether to store the first token's hidden states; `add` is the add_argument of a group."""
    add(
        "--store-hidden-states",
        action="store_true",
        help="run the teacher once, and keep its hidden states on disk: 4 bytes * (layers + 1) * width an example",
    )


def add_comparison(
    parser: argparse.ArgumentParser,
    *,
    plots: bool = True,
    baselines: str = "a student that has no teacher, and one by plain distillation",
) -> None:
    """What else to train beside a method, how often, and whether to draw it, if there are plots."""
    add = parser.add_argument_group("comparison").add_argument
    add(
        "--seeds",
        type=listed(integer(0, 2**32 - 1)),
        metavar="N[,N...]",
        help="train every student once with each, and report mean and spread (default: --seed)",
    )
    add("--baselines", action="store_true", help=baselines)
    add(
        "--chain",
        type=listed(integer(1)),
        metavar="K,K[,...]",
        help="a student by plain distillation down a chain of models with so many layers, such as 6,4,2 (TAKD)",
    )
    add(
        "--kd-temperature",
        type=number(above=0),
        metavar="X",
        help="of plain distillation: the assistants', the baseline's and the chain's (default: 2)",
    )
    if plots:
        add("--no-plots", action="store_true", help="draw none; they need matplotlib")


def add_executor(parser: argparse.ArgumentParser) -> None:
    """Where trainings run that do not wait for each other."""
    parser.add_argument_group("many trainings").add_argument(
        "--executor",
        choices=("local", "ray"),
        default="local",
        help="train students one after another (local), or as many at a time as a Ray cluster has GPUs, or else CPUs "
        "(ray: the cluster of RAY_ADDRESS, or this machine; --output and HF_HOME must be on a file system that all its "
        "machines share) (default: %(default)s)",
    )
