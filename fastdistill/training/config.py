"""What `DistillationTrainer` is asked beside the loss."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments


@dataclass
class DistillationConfig(TrainingArguments):
    """TrainingArguments whose batches hold examples of similar length, so that little of a batch is padding.

    Unless `accelerator_config` is given, batches in pinned memory are copied to the device with ``non_blocking``.

    `DistillationTrainer` takes a plain TrainingArguments too. Nothing here is about the loss: that is its `objective`.
    """

    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "Order of the training examples. 'group_by_length' batches examples of similar length, "
            "in an order that depends on seed and epoch alone; without known lengths the order is 'random' "
            "(see read_lengths).",
            "choices": ["random", "sequential", "group_by_length", "batch_rebalance"],
        },
    )
    read_lengths: bool = field(
        default=False,
        metadata={
            "help": "Read every example before training to know its length, where the dataset is no table or list of "
            "them, and has no column of lengths."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Log the mean of the losses before in place of one that is NaN or infinite. The host looks for it "
            "in each step, and so waits for the device. Without, it is logged as it is."
        },
    )
    min_save_seconds: float = field(
        default=0.0,
        metadata={
            "help": "Leave out a checkpoint that would come sooner than this after the one before, or the beginning. "
            "An interruption then loses so much at most, beside what save_steps says. 0 leaves none out."
        },
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={
            "help": "On CUDA, capture forward and backward passes of shapes that come again as CUDA graphs, and replay "
            "them: of a small model's step most is else Python and launches. Batches of encoders' classifiers are "
            "padded to a multiple of 8 tokens, so that there are few shapes. What cannot be captured runs without, and "
            "a line says why: several processes, float16, compiled models, gradient checkpointing, hooks, objectives "
            "of which the host decides something in each step. It takes up to twice the memory."
        },
    )

    def __post_init__(self) -> None:
        if not self.min_save_seconds >= 0:
            raise ValueError(f"min_save_seconds is {self.min_save_seconds!r}; expected a number of at least 0")
        if self.accelerator_config is None:  # MPS has no pinned memory, from which alone such copies are safe
            can_pin = self.dataloader_pin_memory and not torch.backends.mps.is_available()
            self.accelerator_config = {"non_blocking": can_pin}
        super().__post_init__()  # type: ignore[no-untyped-call]
