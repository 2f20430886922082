"""`DistillationTrainer` whose steps someone else computes, of several trainers at once."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

from fastdistill.objectives.base import Objective
from fastdistill.teachers.outputs import stored_outputs
from fastdistill.training.checks import TEACHER
from fastdistill.training.trainer import DistillationTrainer

Steps = Generator[list[int], tuple[Tensor, Tensor], Any]
"""Gives the rows of each batch, and is sent its loss and the norm of the gradient by which the student has learned."""


class SteppedTrainer(DistillationTrainer):
    """A trainer whose `train` returns `Steps`. All but forward and backward passes and the optimizer's step is in them,
    and as `DistillationTrainer` has it: order of examples, schedule, logs, evaluations, checkpoints, callbacks.

    Whoever goes through the steps clips the gradients and has `optimizer` step, of which callbacks hear afterwards. No
    step waits for the device, unless it is logged.
    """

    def _inner_training_loop(  # type: ignore[override]
        self, batch_size: Any = None, args: Any = None, resume_from_checkpoint: str | None = None, *_: Any, **__: Any
    ) -> Steps:
        trainer: Any = self  # whose own parts are not typed
        self.accelerator.free_memory()
        loader = trainer.get_train_dataloader()
        epochs, in_epoch, _, samples, _, _, steps = trainer.set_initial_training_values(args, loader)
        start, skipped = trainer._init_training_state(steps, in_epoch, epochs, resume_from_checkpoint, None)
        model, loader = trainer._prepare_for_training(steps, loader, resume_from_checkpoint)
        self.accelerator.gradient_state._set_sync_gradients(True)
        self.current_gradient_accumulation_steps = 1
        self._initial_num_input_tokens_seen = self.state.num_input_tokens_seen
        self._initial_global_step = self._globalstep_last_logged = self.state.global_step
        self._tr_loss, self._total_loss_scalar = torch.zeros((), device=args.device), 0.0
        started, norm, rate = time.time(), None, None
        losses: list[Tensor] = []  # of the steps since the last log

        def tell() -> None:
            if self.control.should_log:
                self._add(losses)
            trainer._maybe_log_save_evaluate(self._tr_loss, norm, model, None, epoch, None, started, learning_rate=rate)

        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        for epoch in range(start, epochs):
            self.control = self.callback_handler.on_epoch_begin(args, self.state, self.control)
            batches = islice(loader.batch_sampler, skipped, None)
            if epoch == start:
                self._load_rng_state(resume_from_checkpoint)
            for place, rows in enumerate(batches, skipped + 1):
                self.control = self.callback_handler.on_step_begin(args, self.state, self.control)
                loss, norm = yield rows
                losses.append(loss)
                self.control = self.callback_handler.on_pre_optimizer_step(args, self.state, self.control)
                self.control = self.callback_handler.on_optimizer_step(args, self.state, self.control)
                rate = self._get_learning_rate()
                trainer.lr_scheduler.step()
                self.state.global_step += 1
                self.state.epoch = epoch + place / in_epoch
                self.control = self.callback_handler.on_step_end(args, self.state, self.control)
                tell()
                if self.control.should_epoch_stop or self.control.should_training_stop:
                    break
            skipped = 0
            self.control = self.callback_handler.on_epoch_end(args, self.state, self.control)
            tell()
            if self.control.should_training_stop:
                break
        self._add(losses)
        return trainer._finalize_training(None, samples, started)

    def _add(self, losses: list[Tensor]) -> None:
        """For the log; one that is no number counts as the mean of those before, as in Trainer."""
        total = 0.0
        for steps, loss in enumerate(torch.stack(losses).tolist() if losses else ()):
            is_number = math.isfinite(loss) or not self.args.logging_nan_inf_filter
            total += loss if is_number else total / (1 + steps)
        self._tr_loss += total
        losses.clear()

    def loss_of(
        self, objective: Objective, logits: Tensor, columns: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch's logits by its objective, once decided, and columns: labels, all of which count, and
        what teachers say, who are known to say numbers; and its parts, which `count` has logged."""
        student, needs = SequenceClassifierOutput(logits=logits), objective.needs
        teachers = {name: stored_outputs(name, columns) for name in needs.teachers or (TEACHER,)}
        teacher = teachers if needs.teachers else teachers[TEACHER]
        return objective.parts(student, teacher if needs.teacher else None, columns["labels"])
