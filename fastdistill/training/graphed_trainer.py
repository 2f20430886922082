"""A trainer whose steps can be CUDA graphs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.cuda_graphs import Graphs, graphs_on
from fastdistill.objectives.base import Objective
from fastdistill.objectives.capturing import obstacle_to_capture
from fastdistill.training.checks import argument_of
from fastdistill.training.graphed import GraphedBackward, Told
from fastdistill.training.parts import PartsTrainer


class GraphedTrainer(PartsTrainer):
    """With ``args.cuda_graphs`` it replays forward and backward passes on CUDA, where they can be captured."""

    _of_step: Objective | None = None  # the objective once the host has decided what it has to
    teachers: dict[str, nn.Module]
    _learned: list[nn.Parameter]
    _graphed: GraphedBackward | None = None
    _operations: int | None = None  # of an element of the main input

    @property
    def _current(self) -> Objective:
        return self._of_step or self.objective

    @abstractmethod
    def _told(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Told, Any]:
        """What a micro-batch adds to a step: a function of tensors alone, but for the objective. And the outputs."""

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        self._graphed, self._operations = self._as_graphs(), None
        try:
            return super()._inner_training_loop(batch_size, *args, **kwargs)
        finally:
            self._graphed = None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As transformers has it, which counts the weights in each step: of 12 layers that is half a millisecond in
        which a host asks nothing of its GPU. Here they are counted once a training."""
        given = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        if not isinstance(given, Tensor) or not given.numel():
            return int(super().floating_point_ops(inputs))
        if self._operations is None:
            self._operations = super().floating_point_ops(inputs) // given.numel()
        return self._operations * given.numel()

    def _as_graphs(self) -> GraphedBackward | None:
        graphs, student = self.graphs("training"), self.model
        if graphs is None or student is None:
            return None
        others = (weight for model in self.teachers.values() for weight in model.parameters())
        return GraphedBackward(self._micro_batch, [*student.parameters(), *self._learned], others, graphs)

    def graphs(self, name: str) -> Graphs | None:
        """What captures training steps, if it is asked for, and they can be; a line, of that name, says why not."""
        if not getattr(self.args, "cuda_graphs", False):
            return None
        return graphs_on(self.args.device, name, self._obstacle_to_capture)

    def _obstacle_to_capture(self) -> str | None:
        kinds = type(self).__mro__
        ours, used = (next(kind for kind in kinds if name in vars(kind)) for name in ("_told", "compute_loss"))
        if used is not ours:
            return f"{used.__name__} has a compute_loss of its own"
        if self.accelerator.num_processes > 1 or self.args.n_gpu > 1:
            return "several processes or devices share a step"
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or self.args.torch_compile:
            return "the model is DeepSpeed's, FSDP's or compiled"
        if self.args.gradient_checkpointing:  # which Trainer enables later
            return "args.gradient_checkpointing saves the generator's state on the host"
        if self.accelerator.scaler is not None:
            return "float16 gradients are looked at for infinities"
        if self.objective.needs.lazily and self.teachers:
            return f"objective {self.objective} runs teachers on some rows, whose longest is looked for"
        student: Any = self.model
        named = {argument_of(name): model for name, model in self.teachers.items()}
        return obstacle_to_capture(self.objective, {"model": student, **named})

    def _micro_batch(self, inputs: dict[str, Any], num_items_in_batch: Tensor | None) -> Told:
        """What Trainer differentiates, and what is told of it."""
        student: Any = self.model
        with self.compute_loss_context_manager():
            (loss, parts, is_nan), _ = self._told(student, inputs, num_items_in_batch)
        if num_items_in_batch is None:
            loss = loss / self.current_gradient_accumulation_steps
        return loss, parts, is_nan

    def _replayed(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor | None:
        """A training step's loss, with its gradients where they belong; None where Trainer is to do it."""
        if self._graphed is None or model is not self.model:
            return None
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # type: ignore[union-attr]
        given: dict[str, Any] = dict(self._prepare_inputs(inputs))
        items = None if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=self.args.device)
        # an objective that a callback has changed is another
        told = self._graphed(given, items, state=(self.current_gradient_accumulation_steps, repr(self._current)))
        if told is None:
            self._graphed = self._graphed if self._graphed.step.is_on else None
            return None
        self._note(told)
        return told[0]
