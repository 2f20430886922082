"""Trains a student and, by what the student then makes of a quiz, its teacher (MetaDistil)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.modeling_outputs import SequenceClassifierOutput

from fastdistill.autoskd.theta import Weights, tangent_of
from fastdistill.models.inputs import inputs_of
from fastdistill.objectives.logits import TaskLoss
from fastdistill.objectives.metakd import MetaKD
from fastdistill.sensitivity.units import evaluating
from fastdistill.training.checks import own_columns
from fastdistill.training.trainer import DistillationTrainer

Examples = tuple[Mapping[str, Any], Tensor]
"""What models take of a batch, and its labels."""


def feedback(
    student: nn.Module, teacher: nn.Module, objective: MetaKD, train: Examples, quiz: Examples, look_ahead: float
) -> Tensor:
    r"""A number whose gradient to the teacher's weights is that of
    :math:`L_{quiz}(\theta - \alpha \nabla_\theta L(\theta, \phi))`, exactly; to the student's there is none.

    With :math:`v = \nabla L_{quiz}` at the look-ahead it is :math:`-\alpha \langle v, \nabla_\theta L \rangle`, and the
    student's loss depends on its weights through its logits alone: :math:`v` moves these by a tangent, one pass of
    forward-mode differentiation, and what is left is a product with the teacher's probabilities. No second derivative
    of either model is taken.

    Args:
        student, teacher: classifiers or regression models, in eval mode for it.
        look_ahead: :math:`\alpha` > 0, the length of the student's step.
    """
    weights = {name: weight for name, weight in student.named_parameters() if weight.requires_grad}

    def forward(of: Weights, features: Mapping[str, Any]) -> Tensor:
        logits: Tensor = functional_call(student, dict(of), kwargs=inputs_of(student, features)).logits
        return logits

    with evaluating(student, teacher, trained=[*weights.values(), *teacher.parameters()]):
        answers = teacher(**inputs_of(teacher, train[0])).logits
        known = SequenceClassifierOutput(logits=answers.detach())
        loss = objective(SequenceClassifierOutput(logits=forward(weights, train[0])), known, train[1])
        slope = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
        moved = {
            name: (weight.detach() - look_ahead * step).requires_grad_()
            for (name, weight), step in zip(weights.items(), slope, strict=True)
        }
        reached = TaskLoss()(SequenceClassifierOutput(logits=forward(moved, quiz[0])), None, quiz[1])
        along = torch.autograd.grad(reached, list(moved.values()), materialize_grads=True)
        tangent = tangent_of(forward, weights, dict(zip(weights, along, strict=True)), train[0])
    return -look_ahead * objective.pull(answers, tangent)


class MetaTrainer(DistillationTrainer):
    """A `DistillationTrainer` whose teacher learns, too.

    In each step the teacher moves by `feedback`'s gradient, from a batch of the quiz, as the student does by its loss;
    the paper's student waits for the teacher's step. The teacher is a copy of the one that is given, has the learning
    rate ``objective.teacher_rate * args.learning_rate``, and is saved and resumed with the student. The look-ahead is
    as long as the student's peak learning rate.

    Args:
        teacher_model: one model.
        objective: `MetaKD`.
        quiz_dataset: labelled examples that `train_dataset` does not have.
        trainer: everything else, by name.

    Raises ValueError in a data-parallel run, whose processes would each have a teacher of their own.
    """

    def __init__(self, *, teacher_model: nn.Module, objective: MetaKD, quiz_dataset: Any, **trainer: Any) -> None:
        if not isinstance(objective, MetaKD):
            raise TypeError(f"objective is a {type(objective).__name__}; expected MetaKD")
        super().__init__(teacher_model=copy.deepcopy(teacher_model), objective=objective, **trainer)
        if self.accelerator.num_processes > 1:
            raise ValueError(
                f"MetaTrainer runs in one process, but there are {self.accelerator.num_processes}; expected one"
            )
        teacher = self.teacher_model
        assert teacher is not None
        objective.module = teacher.requires_grad_(True)
        self._learned = list(teacher.parameters())
        self.quiz_dataset = quiz_dataset

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        own = next(group for group in optimizer.param_groups if any(one is self._learned[0] for one in group["params"]))
        own["lr"] = self.args.learning_rate * self._meta.teacher_rate
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            return found
        loss, *outputs = found if return_outputs else (found,)
        student = self.accelerator.unwrap_model(model)
        assert self.teacher_model is not None
        train, quiz = self._examples(inputs), self._examples(self._quiz())
        said = feedback(student, self.teacher_model, self._meta, train, quiz, self.args.learning_rate)
        loss = loss + (said - said.detach())  # the student's loss as it is, and the teacher's gradient
        return (loss, *outputs) if return_outputs else loss

    @property
    def _meta(self) -> MetaKD:
        assert isinstance(self.objective, MetaKD)
        return self.objective

    def _examples(self, batch: dict[str, Any]) -> Examples:
        labels = self.head.labels(batch)
        if labels is None:
            raise ValueError("a batch has no labels, of which a quiz is made; expected labelled examples")
        return {name: value for name, value in batch.items() if name not in own_columns(self.objective)}, labels

    def _quiz(self) -> dict[str, Any]:
        """Of this step: the same whether or not the training was cut off before."""
        dataset: Any = self._remove_unused_columns(self.quiz_dataset, description="quiz")
        generator = torch.Generator().manual_seed(self.args.seed + self.state.global_step)
        rows = torch.randperm(len(dataset), generator=generator)[: self.args.per_device_train_batch_size]
        batch = self.data_collator([dataset[row] for row in rows.tolist()])
        return self._prepare_inputs(dict(batch))
