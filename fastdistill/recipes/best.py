"""The best epoch of a training, kept on disk while later ones are tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, TrainerCallback, TrainerState

from fastdistill.files import load_tensors, save_tensors
from fastdistill.recipes.folder import UNFINISHED
from fastdistill.training.trainer import DistillationTrainer

Log = Sequence[Mapping[str, float]]


class Noted:
    """Metrics that keep what they were last computed of."""

    evaluated: EvalPrediction

    def __init__(self, compute: Callable[[EvalPrediction], dict[str, float]]) -> None:
        self.compute = compute

    def __call__(self, evaluated: EvalPrediction) -> dict[str, float]:
        self.evaluated = evaluated
        return self.compute(evaluated)


class BestEpoch(TrainerCallback):
    """Keeps the weights of the best epoch so far, and ends a training that has had none for some time.

    It knows what was before from the trainer's log, which its checkpoints have: a run that was cut off goes on as if it
    had not been.

    Args:
        trainer: its compute_metrics are `Noted`.
        metric: of the evaluations; of equal ones that of the lowest loss is better.
        best: by the "metric", or by the "loss" alone.
        patience: epochs without a better one, after which it ends; None for none.
    """

    said: EvalPrediction | None = None
    """The model's outputs in the best epoch's evaluation; None where a run that was cut off had that."""

    def __init__(
        self,
        trainer: DistillationTrainer,
        folder: Path,
        metric: str,
        best: Literal["metric", "loss"],
        patience: int | None,
    ) -> None:
        self.trainer, self.folder, self.metric, self.by, self.patience = trainer, folder, metric, best, patience

    @staticmethod
    def evaluations(log: Log) -> list[Mapping[str, float]]:
        return [entry for entry in log if "eval_loss" in entry]

    def best(self, log: Log) -> Mapping[str, float]:
        """The evaluation that counts."""
        return max(self.evaluations(log), key=self._rank)

    def is_over(self, log: Log) -> bool:
        """Whether there has been no better one for as long as there is patience."""
        evaluations = self.evaluations(log)
        if self.patience is None or not evaluations:
            return False
        return len(evaluations) - evaluations.index(self.best(log)) > self.patience

    def can_go_on(self, state: TrainerState) -> bool:
        """Whether the best so far, which a training that goes on from there may come back to, is there."""
        if not self.evaluations(state.log_history):
            return True
        best = self.best(state.log_history)
        return best["step"] == state.global_step == state.max_steps or self._file(best).is_file()

    def restore(self, log: Log) -> None:
        """Give the model the weights of the best epoch."""
        best = self.best(log)
        if best["step"] == self.trainer.state.global_step:
            return  # which it has
        state, _ = load_tensors(self._file(best))
        if self.trainer.is_fsdp_enabled:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

            options = StateDictOptions(full_state_dict=True)
            model: Any = self.trainer.model
            set_model_state_dict(model, dict(state), options=options)
            return
        with torch.no_grad():
            for name, tensor in _tensors(self._model()).items():
                tensor.copy_(state[name])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Its last checkpoint may be of an epoch's end, but of before it was evaluated."""
        if state.global_step and (state.epoch % 1 == 0 or state.global_step == state.max_steps):
            self._evaluate(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._evaluate(state)
        if self.is_over(state.log_history):
            control.should_training_stop = True

    def _evaluate(self, state: Any) -> None:
        evaluated = {entry["step"] for entry in self.evaluations(state.log_history)}
        if state.global_step not in evaluated:
            with torch.random.fork_rng():  # the rest must not depend on whether it was before the last checkpoint
                self.trainer.evaluate()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        best = self.best(state.log_history)
        if best["step"] == state.global_step:
            metrics: Any = self.trainer.compute_metrics
            self.said = metrics.evaluated
        if best["step"] == state.global_step < state.max_steps:
            self._save(best)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """No checkpoint needs what was best before."""
        if state.is_world_process_zero and self.evaluations(state.log_history):
            needed = self._file(self.best(state.log_history))
            for file in self.folder.glob(f"{UNFINISHED}.best-*"):
                if file != needed:
                    file.unlink()

    def _rank(self, evaluation: Mapping[str, float]) -> tuple[float, ...]:
        loss = -evaluation["eval_loss"]
        return (loss,) if self.by == "loss" else (evaluation[f"eval_{self.metric}"], loss)

    def _file(self, evaluation: Mapping[str, float]) -> Path:
        return self.folder / f"{UNFINISHED}.best-{evaluation['step']:.0f}"

    def _save(self, evaluation: Mapping[str, float]) -> None:
        trainer = self.trainer
        if trainer.is_fsdp_enabled:
            state = trainer.accelerator.get_state_dict(trainer.model)  # all processes send their shards
        else:
            state = _tensors(self._model())
        if trainer.is_world_process_zero():
            tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
            save_tensors(tensors, self._file(evaluation), {})
        trainer.accelerator.wait_for_everyone()

    def _model(self) -> nn.Module:
        model: nn.Module = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return model


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Each once, where layers share weights."""
    return dict([*model.named_parameters(), *model.named_buffers()])
