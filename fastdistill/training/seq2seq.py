"""`DistillationTrainer` for models that generate texts of their own (T5, BART)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments

from fastdistill.training.config import DistillationConfig
from fastdistill.training.trainer import DistillationTrainer


@dataclass
class Seq2SeqDistillationConfig(DistillationConfig, Seq2SeqTrainingArguments):
    """`DistillationConfig` with transformers' options of generation: ``predict_with_generate`` and so on."""


class Seq2SeqDistillationTrainer(DistillationTrainer, Seq2SeqTrainer):
    """`DistillationTrainer`, whose evaluation generates texts where ``args.predict_with_generate`` asks for it, as
    transformers' Seq2SeqTrainer does; `fastdistill.data.sequence_metrics.text_metrics` measures them.

    Losses and distillation are `DistillationTrainer`'s, which trains these models too.
    """

    def __init__(self, model: Any = None, args: TrainingArguments | None = None, **options: Any) -> None:
        args = Seq2SeqDistillationConfig() if args is None else args
        if not isinstance(args, Seq2SeqTrainingArguments):
            raise TypeError(f"args is a {type(args).__name__}; expected Seq2SeqDistillationConfig")
        super().__init__(model, args, **options)
