"""Trains a student against a frozen teacher with transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast  # type: ignore[import-untyped]
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from fastdistill.data.padding import padding_collator
from fastdistill.models.architectures import ARCHITECTURES, encoder_layers
from fastdistill.models.frozen import frozen
from fastdistill.models.heads import LABELS, head_of, used_states
from fastdistill.models.inputs import inputs_of, taken_by
from fastdistill.models.packed import packed_forward
from fastdistill.models.sharing import CONFIG_KEY
from fastdistill.objectives.base import LossFunction, Objective, as_needed, as_objective
from fastdistill.objectives.logits import TaskLoss
from fastdistill.processes import settle_at_exit
from fastdistill.teachers.outputs import LOGITS, TeacherOutputs, stored_outputs
from fastdistill.training.checks import (
    TEACHER,
    TeacherModel,
    argument_of,
    by_name,
    check_evaluation,
    check_head,
    check_objective,
    check_teacher,
    config_of,
    default_objective,
    load_teacher,
    own_columns,
)
from fastdistill.training.config import DistillationConfig
from fastdistill.training.graphed import Told
from fastdistill.training.graphed_trainer import GraphedTrainer
from fastdistill.training.labels import CheckedLabels
from fastdistill.training.padding import Padded, can_pad
from fastdistill.training.parts import is_mean, nan_of, weighted

OBJECTIVE_FILE = "objective.safetensors"
"""Holds, within a checkpoint, what the objective itself has learned."""


class DistillationTrainer(GraphedTrainer):
    """A Trainer whose loss is an `Objective` of the student's and a frozen teacher's outputs.

    Args:
        model: the student.
        args: a DistillationConfig or TrainingArguments.
        teacher_model: a model, or the folder or hub name of one (safetensors), loaded with the student's kind
            of head. It is never wrapped, optimised or saved; it moves to the student's device and runs in
            eval mode, without gradients, under the same autocast. A model given as an object is frozen in
            place, and stays so. None where the objective needs no teacher, or where the dataset's column
            "teacher_logits" holds what it would say (`fastdistill.store`): for a batch that has it, no teacher is
            run. (For an objective that needs hidden states "teacher_hidden_states" must be there too: the [CLS]
            token's, of embeddings and layers.) Several teachers are given by name,
            {"teacher": ..., "assistant": ...}; the columns of each begin with its name.
        objective: an `Objective` or a function of (student outputs, teacher outputs, labels). By default
            `LogitsKD`, for a regression `MSE`, and for many labels `MultiLabelKD`. An objective that `needs` them
            lazily has the teacher's outputs as `TeacherOutputs`, which runs when it is asked; for several teachers, a
            dictionary of them. What an objective itself learns (its `module`) is optimised, clipped, saved and resumed
            with the student, and averaged over processes.
        **trainer: everything else that Trainer takes, by name.

    Parts of the loss are logged by name beside "loss", which is their weighted sum, each averaged over the
    steps since the last log; those of an integer dtype are numbers of something, and are summed. Micro-batches count by
    their labelled examples, so that accumulated or data-parallel gradients are those of the whole batch, which
    processes share evenly, an epoch's last and smaller one too; one without any teaches nothing, not even what the
    teacher says of it. (Dropout draws other numbers in each process: only without it are results those of one process,
    within rounding. Of a batch with fewer examples than processes some count twice.) Evaluation runs no teacher:
    "eval_loss" is the task's own loss. Of data without labels it is that of an objective that does without.
    `predict` keeps the dataset's order.

    With ``args.cuda_graphs`` forward and backward passes on CUDA are replayed as CUDA graphs (`DistillationConfig`). On
    a CPU encoders with a classifier, students and teachers, compute no padding where a batch has 5 % or more, and of
    their last layer then the first token alone, unless hidden states of others are asked for
    (`fastdistill.models.packed`); the first token's are then ``[B, 1, d]``.

    What labels mean follows the student's head: `fastdistill.models.heads.Head` tells of each kind which logits they
    are of, and that padding never counts. Each model is given what its own forward takes of a batch, which has the
    columns that any of them takes.

    Raises ValueError or TypeError, naming the argument, where objective, models and data do not go together. A teacher
    that gives NaN is an error, too, when it is next logged or saved; for stored outputs it names the row. So is a label
    that the head does not know, before its batch is learned from.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        teacher_model: TeacherModel | Mapping[str, TeacherModel] | None = None,
        objective: Objective | LossFunction | None = None,
        **trainer: Any,
    ) -> None:
        args = args if args is not None else DistillationConfig()
        if trainer.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func would be ignored; give the loss as objective")
        if args.label_smoothing_factor:
            raise ValueError(
                f"args.label_smoothing_factor is {args.label_smoothing_factor} and would be ignored; "
                "expected 0, and label_smoothing in the objective"
            )
        settle_at_exit()
        super().__init__(model=model, args=args, **trainer)
        self.model_accepts_loss_kwargs = True  # so that compute_loss is told num_items_in_batch, whatever the model

        student = self.accelerator.unwrap_model(self.model)
        self.head = head_of(student)
        self._loss_shifts_labels = False  # by Trainer: the head's labels are where its logits are
        self._evaluating = False
        if self.is_fsdp_enabled:
            _shard_by_layer(self.accelerator.state.fsdp_plugin, student)
        given = by_name(teacher_model)
        named = tuple(given) if isinstance(teacher_model, Mapping) else ()
        self.objective: Objective = default_objective(student) if objective is None else as_objective(objective, named)
        check_head(self.objective, student, self.head, self.train_dataset)
        check_objective(self.objective, student, given, self.train_dataset)
        check_evaluation(self.args, self.objective, self.eval_dataset, self.head)
        self.teachers = {name: load_teacher(argument_of(name), model, student) for name, model in given.items()}
        for name, teacher in self.teachers.items():
            check_teacher(argument_of(name), student, teacher, self.processing_class, self.objective.needs.vocab)
            teacher.requires_grad_(False).eval()
            if getattr(teacher, "hf_device_map", None) is None:
                teacher.to(self.args.device)
        self._learned: list[nn.Parameter] = []
        self._stepped = True
        if self.objective.module is not None:
            self._learned = list(self.objective.module.to(self.args.device).parameters())
            if (self._learned or self.objective.needs.columns) and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
                does = "learns" if self._learned else "chooses from all data"
                raise ValueError(f"objective {self.objective} {does}, which works neither with DeepSpeed nor FSDP")
            broadcast(self._learned)

    @property
    def teacher_model(self) -> nn.Module | None:
        """The teacher, or of several the first."""
        return next(iter(self.teachers.values()), None)

    def _models(self) -> list[Any]:
        """The student, and the teachers that are models."""
        return [self.model, *self.teachers.values()]

    # Loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective's loss in training, the task's own in evaluation."""
        labels = self.head.labels(inputs)
        if not model.training and (labels is not None or self.objective.needs.labels is not False):
            batch, features = self._features(inputs)
            student = packed_forward(model, features)
            logits = self.head.aligned(student, batch).logits
            new = slice(self._not_repeated(len(logits)))
            counted = SequenceClassifierOutput(logits=logits[new])
            loss = TaskLoss()(counted, None, None if labels is None else labels[new])
            return (loss, self.head.told(student, logits)) if return_outputs else loss
        if not model.training:
            loss, _, student, *_ = self._objective_of(model, inputs)
            shown = {name: value for name, value in student.items() if name != "hidden_states"}
            return (loss, shown) if return_outputs else loss
        told, student = self._told(model, inputs, num_items_in_batch)
        self._note(told)
        return (told[0], student) if return_outputs else told[0]

    def _features(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of a batch what is not the objective's own, and of this what the student takes."""
        own, model = {*own_columns(self.objective), *own_columns(self._current)}, self.model
        batch = {name: value for name, value in inputs.items() if name not in own}
        assert model is not None
        return batch, inputs_of(model, batch, others=self.teachers.values())

    def _objective_of(
        self, model: nn.Module, inputs: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor], Any, Any, Tensor | None]:
        """The objective's loss and its parts, the student's and the teacher's outputs, and which rows count."""
        labels, objective = self.head.labels(inputs), self._current
        needs = objective.needs
        batch, features = self._features(inputs)
        teacher = self.teacher_outputs(batch | needs.asked, inputs)
        student = packed_forward(model, features | needs.asked, first_states=not needs.all_tokens)
        own_model: Any = self.model  # which `model` may wrap
        seen = self._seen(own_model, student, batch)
        counts = self.head.counted(labels, inputs)
        if labels is None and counts is not None:
            seen.counted = counts
        columns = {name: inputs[name] for name in needs.columns}
        loss, parts = objective.parts(seen, as_needed(objective, teacher), labels, **columns)
        return loss, parts, student, teacher, counts

    def _told(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Told, Any]:
        """What a micro-batch adds to a step: a function of tensors alone, but for the objective. And the outputs."""
        loss, parts, student, teacher, counts = self._objective_of(model, inputs)
        is_nan = nan_of(teacher, loss)
        if counts is not None and num_items_in_batch is not None:
            # The sum over micro-batches is then the mean of what counts in the step; processes are averaged.
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            share = counts.ne(-100).sum() * processes / torch.as_tensor(num_items_in_batch).clamp(min=1)
            loss = weighted(loss, share)
        else:  # Trainer divides the loss by the number of micro-batches
            share = torch.full_like(loss.detach(), 1 / self.current_gradient_accumulation_steps)
        parts = {name: weighted(part, share) if is_mean(part) else part for name, part in parts.items()}
        return (loss, parts, is_nan), student

    def _not_repeated(self, number: int) -> int:
        """Of so many examples of an evaluation's batch those that do not just fill up this process's last one."""
        state, place = self.accelerator.gradient_state, self.accelerator.process_index
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return number
        own = min(number, state.remainder - place * number)
        return own if own > 0 else number  # of none, Trainer drops the loss

    def _seen(self, model: nn.Module, outputs: Any, batch: Mapping[str, Any]) -> Any:
        """A model's outputs as objectives see them."""
        if self._current.needs.hidden_states and not self._current.needs.all_tokens:
            outputs = used_states(model, outputs, batch)
        return self.head.aligned(outputs, batch)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """How many examples, or tokens, count in so many batches; None where nothing says it."""
        counts = [self.head.counted(self.head.labels(batch), batch) for batch in batch_samples]
        counted: list[Any] = [{"labels": one} for one in counts if one is not None]
        return super()._get_num_items_in_batch(counted, device) if len(counted) == len(counts) else None

    def teacher_outputs(self, features: dict[str, Any], inputs: Mapping[str, Any]) -> Any:
        """What the teachers say to a batch of these features: what its columns hold of it, else the models' outputs.

        `TeacherOutputs`, or for several teachers a dictionary of them."""
        names = self._current.needs.teachers
        if not self._current.needs.teacher:
            return None
        outputs = {}
        for name in names or (TEACHER,):
            model, stored = self.teachers.get(name), stored_outputs(name, inputs)
            if model is None and stored is None:
                missing = f"{argument_of(name)} is None and a batch has no {name + LOGITS!r}"
                raise ValueError(f"{missing}; expected one of them")
            given = features if model is None else inputs_of(model, features)
            aligned = None if model is None else partial(self._seen, model)
            outputs[name] = TeacherOutputs(
                model,
                given,
                stored=stored,
                first_states=not self._current.needs.all_tokens,
                autocast=self.accelerator.autocast,
                aligned=aligned,
            )
        return outputs if names else outputs[TEACHER]

    # What the objective learns: beside the student, since it is no part of it

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self._learned:
            optimizer.add_param_group({"params": self._learned, "weight_decay": self.args.weight_decay})
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if self._stepped:
            for parameter in self._learned:
                parameter.grad = None
        self._of_step, inputs = self.objective.decided(inputs)  # type: ignore[assignment]
        try:
            loss = self._replayed(model, inputs, num_items_in_batch)
            if loss is None:
                loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._of_step = None
        self._stepped = self.accelerator.sync_gradients
        if self._stepped:
            for parameter in self._learned:
                # another process may have learned where this one's loss did not depend on it: all take part
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(gradient, "mean")
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        own = self.objective.module
        together = model if own is None or not self._learned else nn.ModuleList([model, own])
        return super()._clip_grad_norm(together)  # type: ignore[no-untyped-call]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.objective.module is not None and self.args.should_save:
            save_file(self.objective.module.state_dict(), Path(output_dir) / OBJECTIVE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.objective.module is not None and checkpoint is not None:
            self.objective.module.load_state_dict(load_file(Path(checkpoint) / OBJECTIVE_FILE))

    # Data

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        if not self.accelerator.is_fsdp2:
            # DataParallel's replicas would compute with the first one's copies
            is_split = self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.n_gpu > 1
            is_whole = not (is_split or self.args.torch_compile)
            autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
            with frozen(self.model if is_whole else None, autocast=autocast):
                return super().evaluation_loop(*args, **kwargs)
        if not self.accelerator._models:  # not trained yet, and accelerate shards a model with its optimizer only
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.create_optimizer())
            self.model_wrapped = self.model
        output = super().evaluation_loop(*args, **kwargs)
        from torch.distributed.fsdp import FSDPModule  # where torch has it

        model: Any = self.model
        for module in model.modules():  # some are whole still after a forward pass; accelerate wants none
            if isinstance(module, FSDPModule):
                module.reshard()
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **options: Any,
    ) -> tuple[Any, Tensor | None, Tensor | None]:
        if self._evaluating and self.objective.needs.labels is False and self.head.labels(inputs) is None:
            before = self.label_names, self.can_return_loss
            self.label_names, self.can_return_loss = [], True  # else Trainer asks for no loss
            try:
                loss, logits, _ = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **options)
            finally:
                self.label_names, self.can_return_loss = before
            return loss, logits, None
        others = set(own_columns(self.objective)) | self._of_teachers_alone()
        inputs = {name: value for name, value in inputs.items() if name not in others}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **options)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._evaluating = True
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._evaluating = False

    def _of_teachers_alone(self) -> set[str]:
        """The inputs that teachers name and the student does not."""
        student: Any = self.model
        ours = taken_by(student)
        theirs = [taken_by(teacher) for teacher in self.teachers.values()]
        return set() if ours is None else {name for names in theirs for name in names or ()} - ours - set(LABELS)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        more = (*own_columns(self.objective), *sorted(self._of_teachers_alone()))
        columns.extend(name for name in more if name not in columns)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        collator = self.data_collator
        self.data_collator = padding_collator(collator)
        if not kwargs.get("is_training") or self.objective.needs.labels is not None:
            dataset = kwargs["dataset"] if "dataset" in kwargs else args[0]
            self.data_collator = CheckedLabels(self.data_collator, self.head, dataset)
        if kwargs.get("is_training") and self._graphed is not None and all(map(can_pad, self._models())):
            self.data_collator = Padded(self.data_collator, self._models())
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.data_collator = collator


def _shard_by_layer(plugin: Any, student: nn.Module) -> None:
    """Unless it was said what to shard by. transformers would name BERT's embeddings too, but these accelerate shards
    itself: it cannot do so twice. Layers that share weights are sharded as one, for they cannot be apart."""
    if not isinstance(student, transformers.PreTrainedModel) or student.config.model_type not in ARCHITECTURES:
        return
    if config_of(student, CONFIG_KEY) is not None:
        plugin.transformer_cls_names_to_wrap = []
    elif not plugin.transformer_cls_names_to_wrap:
        plugin.transformer_cls_names_to_wrap = [type(encoder_layers(student)[0]).__name__]
