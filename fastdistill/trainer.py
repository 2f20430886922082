"""Trains a student against a frozen teacher with transformers' Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.data_loader import BatchSamplerShard  # type: ignore[import-untyped]
from accelerate.utils import broadcast, gather_object  # type: ignore[import-untyped]
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from fastdistill.architectures import ARCHITECTURES, encoder_layers
from fastdistill.objectives import ATTENTION_MASK, MSE, LogitsKD, LossFunction, Objective, TaskLoss, as_objective
from fastdistill.processes import settle_at_exit
from fastdistill.pruning import from_pretrained, is_reshaped
from fastdistill.sharing import CONFIG_KEY
from fastdistill.teachers import HIDDEN_STATES, LOGITS, TeacherOutputs, stored_outputs

TEACHER = "teacher"
"""The name of a teacher that is the only one."""

OBJECTIVE_FILE = "objective.safetensors"
"""Holds, within a checkpoint, what the objective itself has learned."""

POOL = 50
"""Batches of similar length are cut from a random pool of this many."""


@dataclass
class DistillationConfig(TrainingArguments):
    """TrainingArguments whose batches hold examples of similar length, so that little of a batch is padding.

    `DistillationTrainer` takes a plain TrainingArguments too. Nothing here is about the loss: that is its `objective`.
    """

    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "Order of the training examples. 'group_by_length' batches examples of similar length, "
            "in an order that depends on seed and epoch alone; without known lengths the order is 'random'.",
            "choices": ["random", "sequential", "group_by_length", "batch_rebalance"],
        },
    )


class DistillationTrainer(Trainer):
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
            `LogitsKD`, or `MSE` for a student with one output. The teacher's outputs are `TeacherOutputs`, for
            which it runs when they are first looked at; for several teachers, a dictionary of them. What an
            objective itself learns (its `module`) is optimised, clipped, saved and resumed with the student, and
            averaged over processes.
        **trainer: everything else that Trainer takes, by name.

    Parts of the loss are logged by name beside "loss", which is their weighted sum, each averaged over the
    steps since the last log. Micro-batches count by their labelled examples, so that accumulated or
    data-parallel gradients are those of the whole batch, which processes share evenly, an epoch's last and smaller one
    too. (Dropout draws other numbers in each process: only without it are results those of one process, within
    rounding. Of a batch with fewer examples than processes some count twice.) Evaluation runs no teacher: "eval_loss"
    is the task's own loss. `predict` keeps the dataset's order.

    Raises ValueError or TypeError, naming the argument, where objective, models and data do not go together.
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
        self._parts: dict[str, Tensor] = {}
        self._parts_since = 0

        student = self.accelerator.unwrap_model(self.model)
        if self.is_fsdp_enabled:
            _shard_by_layer(self.accelerator.state.fsdp_plugin, student)
        given = _by_name(teacher_model)
        named = tuple(given) if isinstance(teacher_model, Mapping) else ()
        self.objective: Objective = _default_objective(student) if objective is None else as_objective(objective, named)
        _check_objective(self.objective, student, given, self.train_dataset)
        self.teachers = {name: _load_teacher(_argument(name), model, student) for name, model in given.items()}
        for name, teacher in self.teachers.items():
            _check_teacher(_argument(name), student, teacher, self.processing_class)
            teacher.requires_grad_(False).eval()
            if getattr(teacher, "hf_device_map", None) is None:
                teacher.to(self.args.device)
        self._learned: list[nn.Parameter] = []
        self._stepped = True
        if self.objective.module is not None:
            self._learned = list(self.objective.module.to(self.args.device).parameters())
            if (self._learned or self.objective.needs_columns) and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
                does = "learns" if self._learned else "chooses from all data"
                raise ValueError(f"objective {self.objective} {does}, which works neither with DeepSpeed nor FSDP")
            broadcast(self._learned)

    @property
    def teacher_model(self) -> nn.Module | None:
        """The teacher, or of several the first."""
        return next(iter(self.teachers.values()), None)

    # Loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective's loss in training, the task's own in evaluation."""
        labels = inputs.get("labels")
        features = {name: value for name, value in inputs.items() if name not in ("labels", *self._own_columns())}
        if not model.training:
            student = model(**features)
            own = slice(self._not_repeated(len(student.logits)))
            counted = SequenceClassifierOutput(logits=student.logits[own])
            loss = TaskLoss()(counted, None, None if labels is None else labels[own])
            return (loss, student) if return_outputs else loss

        if self.objective.needs_hidden_states:
            features["output_hidden_states"] = True
        teacher = self.teacher_outputs(features, inputs)
        student = model(**features)
        columns = {name: inputs[name] for name in self.objective.needs_columns}
        loss, parts = self.objective.parts(student, teacher, labels, **columns)
        if labels is not None and num_items_in_batch is not None:
            # The sum over micro-batches is then the mean of the step's labelled examples; processes are averaged.
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            share = labels.ne(-100).sum() * processes / num_items_in_batch
            loss = loss * share
            self._count(parts, share)
        else:  # Trainer divides the loss by the number of micro-batches
            self._count(parts, 1 / self.current_gradient_accumulation_steps)
        return (loss, student) if return_outputs else loss

    def _not_repeated(self, number: int) -> int:
        """Of so many examples of an evaluation's batch those that do not just fill up this process's last one."""
        state, place = self.accelerator.gradient_state, self.accelerator.process_index
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return number
        own = min(number, state.remainder - place * number)
        return own if own > 0 else number  # of none, Trainer drops the loss

    def teacher_outputs(self, features: dict[str, Any], inputs: Mapping[str, Any]) -> Any:
        """What the teachers say to a batch of these features: what its columns hold of it, else the models' outputs.

        `TeacherOutputs`, or for several teachers a dictionary of them."""
        if not self.objective.needs_teacher:
            return None
        outputs = {}
        for name in self.objective.teachers or (TEACHER,):
            model, stored = self.teachers.get(name), stored_outputs(name, inputs)
            if model is None and stored is None:
                missing = f"{_argument(name)} is None and a batch has no {name + LOGITS!r}"
                raise ValueError(f"{missing}; expected one of them")
            outputs[name] = TeacherOutputs(model, features, stored=stored, autocast=self.accelerator.autocast)
        return outputs if self.objective.teachers else outputs[TEACHER]

    # What the objective learns: beside the student, since it is no part of it

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self._learned:
            optimizer.add_param_group({"params": self._learned, "weight_decay": self.args.weight_decay})
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._stepped:
            for parameter in self._learned:
                parameter.grad = None
        loss = super().training_step(*args, **kwargs)
        self._stepped = self.accelerator.sync_gradients
        if self._stepped:
            for parameter in self._learned:
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
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

    # Parts of the loss: summed on their device, read when Trainer logs

    def _count(self, parts: dict[str, Tensor], share: Tensor | float) -> None:
        if not self._parts:
            self._parts_since = self.state.global_step
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, 0) + value * share

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        names = list(dict.fromkeys(gather_object(list(self._parts)))) if "loss" in logs else []
        if names:  # a process may have had other parts than another
            zero = torch.zeros((), device=self.args.device)
            sums = torch.stack([self._parts.get(name, zero).float().mean() for name in names])
            means = self.accelerator.reduce(sums, "mean") / (self.state.global_step - self._parts_since)
            logs = {**logs, **dict(zip(names, means.tolist(), strict=True))}
        if "loss" in logs or "train_loss" in logs:  # a log of training, or its end
            self._parts = {}
        super().log(logs, start_time)

    # Data

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        if not self.accelerator.is_fsdp2:
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
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        own = self._own_columns()
        inputs = {name: value for name, value in inputs.items() if name not in own}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        columns.extend(name for name in self._own_columns() if name not in columns)

    def _own_columns(self) -> tuple[str, ...]:
        """Those that the objective uses, and no model."""
        names = self.objective.teachers or (TEACHER,)
        needed = (column for column in self.objective.needs_columns if column != ATTENTION_MASK)
        return (*(name + kind for name in names for kind in (LOGITS, HIDDEN_STATES)), *needed)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        loader = super()._get_dataloader(*args, **kwargs)
        shard: Any = getattr(loader, "batch_sampler", None)
        is_sharded = isinstance(shard, BatchSamplerShard) and shard.num_processes > 1 and not shard.split_batches
        if kwargs.get("is_training") and is_sharded and type(shard.batch_sampler) is BatchSampler:
            # else accelerate would fill the last batch up with examples of the first
            shard.batch_sampler = _EvenShares(shard.batch_sampler, shard.num_processes)
            shard.even_batches = False
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(dataset)
        lengths = _lengths(dataset, self.args.length_column_name)
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


class LengthGroupedSampler(Sampler[int]):
    """Indices whose every `batch_size` have similar lengths: random pools are sorted by length and cut into
    batches, and the batches shuffled. The order depends on `seed` and `epoch()` alone."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 16) + self.epoch())
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        size, pool = self.batch_size, self.batch_size * POOL
        whole = len(shuffled) // size  # the rest, fewer than a batch, comes last
        for start in range(0, whole * size, pool):
            end = min(start + pool, whole * size)
            shuffled[start:end] = sorted(shuffled[start:end], key=self.lengths.__getitem__)
        for batch in torch.randperm(whole, generator=generator).tolist():
            yield from shuffled[batch * size : (batch + 1) * size]
        yield from shuffled[whole * size :]


class _EvenShares(BatchSampler):
    """Batches for each of so many processes in turn, where the epoch's last round is shared evenly, too."""

    def __init__(self, batches: BatchSampler, processes: int) -> None:
        super().__init__(batches.sampler, batches.batch_size, batches.drop_last)
        self.processes = processes

    def __len__(self) -> int:
        rounds = BatchSampler(self.sampler, self.batch_size * self.processes, self.drop_last)
        return len(rounds) * self.processes

    def __iter__(self) -> Iterator[list[int]]:
        for together in BatchSampler(self.sampler, self.batch_size * self.processes, self.drop_last):
            if len(together) < self.processes:
                together = (together * self.processes)[: self.processes]
            share, more = divmod(len(together), self.processes)
            for place in range(self.processes):  # the first ones have the greater shares
                start = place * share + min(place, more)
                yield together[start : start + share + (place < more)]


def _lengths(dataset: Any, column: str) -> list[int] | None:
    columns = _columns(dataset)
    if column in columns and hasattr(dataset, "column_names"):
        return [int(length) for length in dataset[column][:]]
    return [len(example["input_ids"]) for example in dataset] if "input_ids" in columns else None


def _columns(dataset: Any) -> set[str]:
    """The columns of a dataset, as far as they can be known without consuming it."""
    if getattr(dataset, "column_names", None) is not None:
        return set(dataset.column_names)
    first = dataset[0] if hasattr(dataset, "__len__") and len(dataset) else {}
    return set(first) if isinstance(first, Mapping) else set()


def _shard_by_layer(plugin: Any, student: nn.Module) -> None:
    """Unless it was said what to shard by. transformers would name BERT's embeddings too, but these accelerate shards
    itself: it cannot do so twice. Layers that share weights are sharded as one, for they cannot be apart."""
    if not isinstance(student, transformers.PreTrainedModel) or student.config.model_type not in ARCHITECTURES:
        return
    if _config(student, CONFIG_KEY) is not None:
        plugin.transformer_cls_names_to_wrap = []
    elif not plugin.transformer_cls_names_to_wrap:
        plugin.transformer_cls_names_to_wrap = [type(encoder_layers(student)[0]).__name__]


# What must hold before training starts


def _config(model: object, name: str) -> Any:
    return getattr(getattr(model, "config", None), name, None)


def _default_objective(student: nn.Module) -> Objective:
    return MSE() if _config(student, "num_labels") == 1 else LogitsKD()


TeacherModel = nn.Module | str | Path


def _by_name(teacher_model: TeacherModel | Mapping[str, TeacherModel] | None) -> dict[str, TeacherModel]:
    if isinstance(teacher_model, Mapping):
        return dict(teacher_model)
    return {} if teacher_model is None else {TEACHER: teacher_model}


def _argument(name: str) -> str:
    return "teacher_model" if name == TEACHER else f"teacher_model[{name!r}]"


def _check_objective(
    objective: Objective, student: nn.Module, teachers: Mapping[str, TeacherModel], dataset: Any
) -> None:
    labels = _config(student, "num_labels")
    if objective.problem == "classification" and labels == 1:
        raise ValueError(f"objective is {objective}, for classes, but model has one output; expected MSE or TaskLoss")
    if objective.problem == "regression" and labels not in (1, None):
        raise ValueError(f"objective is {objective}, for one output, but model has {labels}; expected LogitsKD")
    columns = set() if dataset is None else _columns(dataset)
    for column in objective.needs_columns:
        if columns and column not in columns:
            raise ValueError(f"train_dataset has no column {column!r}, which objective {objective} needs")
    if not objective.needs_teacher:
        if teachers:
            raise ValueError(f"teacher_model is given but objective {objective} uses no teacher; expected None")
        return
    names = objective.teachers or (TEACHER,)
    if unknown := sorted(teachers.keys() - set(names)):
        wanted = f"models by the names {', '.join(names)}" if objective.teachers else "one model"
        raise ValueError(f"teacher_model has {', '.join(unknown)}, but objective {objective} uses {wanted}")
    for name in names:
        _check_source(name, objective, teachers.get(name), labels, dataset, columns)
    for argument, model in (("model", student), ("teacher_model", teachers.get(names[0]))):
        if objective.needs_hidden_states and isinstance(model, nn.Module) and not _gives_hidden_states(model):
            raise ValueError(
                f"{argument} is a {type(model).__name__}, whose forward takes no output_hidden_states; "
                f"objective {objective} needs hidden states"
            )


def _check_source(
    name: str, objective: Objective, teacher: TeacherModel | None, labels: int | None, dataset: Any, columns: set[str]
) -> None:
    """That a teacher's outputs are to be had, from columns or a model."""
    if name + LOGITS in columns:
        is_first = name == (*objective.teachers, TEACHER)[0]
        if is_first and objective.needs_hidden_states and name + HIDDEN_STATES not in columns:
            raise ValueError(
                f"objective {objective} needs the teacher's hidden states, but the teacher is not run where "
                f"train_dataset has the column {name + LOGITS!r}; expected a dataset without it, or with "
                f"{name + HIDDEN_STATES!r} too"
            )
        sized = hasattr(dataset, "__len__") and len(dataset) > 0
        if labels is not None and sized and (width := len(dataset[0][name + LOGITS])) != labels:
            raise ValueError(f"train_dataset has {width} {name + LOGITS} an example but model {labels} labels")
    elif teacher is None and columns:
        raise ValueError(
            f"{_argument(name)} is None and train_dataset has no column {name + LOGITS!r}; "
            f"objective {objective} needs one of them"
        )


def _gives_hidden_states(model: nn.Module) -> bool:
    known = isinstance(model, transformers.PreTrainedModel)
    return known or "output_hidden_states" in inspect.signature(model.forward).parameters


def _load_teacher(argument: str, teacher: TeacherModel, student: nn.Module) -> nn.Module:
    if isinstance(teacher, nn.Module):
        return teacher
    if not isinstance(teacher, str | Path):
        raise TypeError(f"{argument} is a {type(teacher).__name__}; expected a model, or its folder or name")
    head = type(student).__name__.partition("For")[2]
    auto = getattr(transformers, f"AutoModelFor{head}", None) if head else None
    if auto is None:
        raise TypeError(
            f"{argument} is {str(teacher)!r}, but what to load it as beside a {type(student).__name__} is "
            "not known; expected a model object"
        )
    if is_reshaped(transformers.AutoConfig.from_pretrained(teacher, trust_remote_code=False)):
        return from_pretrained(teacher)
    model, loading = auto.from_pretrained(
        teacher, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"{argument} {str(teacher)!r} has no weights for {', '.join(missing)}; expected a model trained for {head}"
        )
    return model  # type: ignore[no-any-return]


def _check_teacher(argument: str, student: nn.Module, teacher: nn.Module, processing_class: Any) -> None:
    if {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}:
        raise ValueError(f"{argument} shares parameters with model, and would change with it; expected a copy")
    ours, theirs = (getattr(model, "main_input_name", None) for model in (student, teacher))
    if ours and theirs and ours != theirs:
        raise ValueError(f"{argument} takes {theirs} but model takes {ours}; expected the same input")
    ours, theirs = (_config(model, "num_labels") for model in (student, teacher))
    if ours and theirs and ours != theirs:
        raise ValueError(f"{argument} has {theirs} labels but model has {ours}; expected the same labels")
    _check_label_order(argument, _config(student, "id2label") or {}, _config(teacher, "id2label") or {})
    _check_vocabulary(argument, student, teacher, processing_class)


def _check_label_order(argument: str, student: dict[int, str], teacher: dict[int, str]) -> None:
    """A label that both name must be at one place; "LABEL_0" and its like, config's default, name nothing."""
    places = {str(name).casefold(): place for place, name in student.items() if name != f"LABEL_{place}"}
    for place, name in teacher.items():
        ours = places.get(str(name).casefold(), place)
        if ours != place:
            raise ValueError(
                f"{argument}.config.id2label has {name!r} at {place} but model.config.id2label at {ours}; "
                "expected the same order"
            )


def _check_vocabulary(argument: str, student: nn.Module, teacher: nn.Module, processing_class: Any) -> None:
    """Compare the tokenizers, where the teacher's is beside its weights, or else the vocabularies' sizes."""
    folder = getattr(teacher, "name_or_path", "")
    if hasattr(processing_class, "get_vocab") and folder and (Path(folder) / "tokenizer_config.json").is_file():
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        ours, theirs = processing_class.get_vocab(), tokenizer.get_vocab()
        if ours != theirs:
            token = min(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
            raise ValueError(
                f"processing_class has token {token!r} at {ours.get(token)} but {argument}'s tokenizer "
                f"({folder}) at {theirs.get(token)}; both see the same input_ids: expected one vocabulary"
            )
        return
    size, teacher_size = (_config(model, "vocab_size") for model in (student, teacher))
    if size and teacher_size and size != teacher_size:
        raise ValueError(
            f"{argument} has a vocabulary of {teacher_size} tokens but model of {size}; both see the same "
            "input_ids: expected one vocabulary"
        )
