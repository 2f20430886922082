"""transformers' Trainer, but a run that was cut off ends as if it had not been."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from accelerate.data_loader import BatchSamplerShard  # type: ignore[import-untyped]
from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastdistill.files import writing
from fastdistill.training.checkpoints import checkpoints, fault, is_sealed, last_whole, seal
from fastdistill.training.sampling import EvenShares, LengthGroupedSampler, lengths_of


class ResumableTrainer(Trainer):
    """A Trainer whose checkpoints count when they are whole, whose order of examples depends on seed and epoch alone,
    and whose processes share each batch evenly."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's. Of the checkpoints, True takes the latest that is as it was written; a line tells of each that
        is not. Raises ValueError for a damaged one that is named, and where all are."""
        folder = Path(self.args.output_dir or "")
        if resume_from_checkpoint is True and any(map(is_sealed, checkpoints(folder))):
            resume_from_checkpoint = last_whole(folder)
            if resume_from_checkpoint is None:
                raise ValueError(f"all checkpoints in {folder} are damaged; expected one that is whole")
        elif isinstance(resume_from_checkpoint, str):
            checkpoint = Path(resume_from_checkpoint)
            if is_sealed(checkpoint) and (wrong := fault(checkpoint)):
                raise ValueError(f"resume_from_checkpoint is {checkpoint}, which is damaged: {wrong}")
        self._saved_at = time.monotonic()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        least = getattr(self.args, "min_save_seconds", 0.0)
        if least and self.control.should_save:  # processes' clocks differ, and all save or none
            [is_time] = broadcast_object_list([time.monotonic() - self._saved_at >= least])
            self.control.should_save = is_time
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:  # what is left of one that was cut off or damaged would be taken for this one's
            shutil.rmtree(checkpoint, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            with writing(checkpoint):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    seal(checkpoint)
        except OSError:
            shutil.rmtree(checkpoint, ignore_errors=True)  # a full disk needs the room
            raise
        self._saved_at = time.monotonic()

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        loader = super()._get_dataloader(*args, **kwargs)
        shard: Any = getattr(loader, "batch_sampler", None)
        is_sharded = isinstance(shard, BatchSamplerShard) and shard.num_processes > 1 and not shard.split_batches
        if kwargs.get("is_training") and is_sharded and type(shard.batch_sampler) is BatchSampler:
            # else accelerate would fill the last batch up with examples of the first
            shard.batch_sampler = EvenShares(shard.batch_sampler, shard.num_processes)
            shard.even_batches = False
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(dataset)
        lengths = lengths_of(dataset, self.args.length_column_name, read=getattr(self.args, "read_lengths", False))
        if lengths is None:
            return RandomSampler(dataset)
        # Trainer's own length-grouped order comes from the global generator: a run resumed within an epoch
        # would see another one, and so would each process, once dropout has drawn differently in it.
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroupedSampler(lengths, step, seed, epoch=lambda: int(self.state.epoch or 0))

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        # Trainer's follows train_sampling_strategy, and would hand predictions back in another order.
        if self.args.world_size > 1 or not hasattr(eval_dataset, "__len__"):
            return None
        return SequentialSampler(eval_dataset)
