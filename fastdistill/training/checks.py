"""What must hold before training starts: that objective, student, teachers and data go together."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from fastdistill.models.fit import check_finite, check_fit, check_has_values
from fastdistill.models.heads import Head, head_of, is_causal, named_task
from fastdistill.models.hooks import unwrapped
from fastdistill.models.loading import from_pretrained, is_reshaped
from fastdistill.models.reading import load_config, reading
from fastdistill.models.tokenizers import shared_tokens
from fastdistill.objectives.base import ATTENTION_MASK, Objective
from fastdistill.objectives.logits import MSE, LogitsKD, MultiLabelKD
from fastdistill.teachers.outputs import DRAWN, HIDDEN_STATES, LOGITS
from fastdistill.training.sampling import columns_of

TEACHER = "teacher"
"""The name of a teacher that is the only one."""

TeacherModel = nn.Module | str | Path


def config_of(model: object, name: str) -> Any:
    return getattr(getattr(model, "config", None), name, None)


def default_objective(student: nn.Module) -> Objective:
    problem = head_of(student).problem
    return MSE() if problem == "regression" else MultiLabelKD() if problem == "multi_label" else LogitsKD()


def by_name(teacher_model: TeacherModel | Mapping[str, TeacherModel] | None) -> dict[str, TeacherModel]:
    if isinstance(teacher_model, Mapping):
        return dict(teacher_model)
    return {} if teacher_model is None else {TEACHER: teacher_model}


def own_columns(objective: Objective) -> tuple[str, ...]:
    """A dataset's columns that the objective uses, and no model."""
    names = objective.needs.teachers or (TEACHER,)
    needed = (column for column in objective.needs.columns if column != ATTENTION_MASK)
    return (*(name + kind for name in names for kind in (LOGITS, HIDDEN_STATES)), *needed)


def argument_of(name: str) -> str:
    """What the trainer's argument for the teacher of this name is called."""
    return "teacher_model" if name == TEACHER else f"teacher_model[{name!r}]"


_FITS = {"classification": "LogitsKD", "regression": "MSE", "multi_label": "MultiLabelKD"}


def check_head(objective: Objective, student: nn.Module, head: Head, dataset: Any) -> None:
    """That the objective is of the kind that the student's head is for."""
    name, labels, problem = type(unwrapped(student)).__name__, head.classes, objective.needs.problem
    if head.kind is None and problem is not None:
        raise ValueError(
            f"model is a {name}, of whose head it is not known what its labels mean, but objective {objective} is of "
            f"logits and labels; expected a model for {', '.join(_HEADS)}, or an objective of your own"
        )
    if head.kind == "regression" and labels not in (1, None):
        raise ValueError(f"model is for regression of {labels} numbers; expected one")
    if problem == "classification" and head.kind == "regression":
        raise ValueError(f"objective is {objective}, for classes, but model has one output; expected MSE or TaskLoss")
    if problem == "regression" and head.kind != "regression":
        raise ValueError(
            f"objective is {objective}, for one output, but model has {labels}; expected {_FITS[head.problem or '']}"
        )
    if problem is not None and problem != head.problem:
        raise ValueError(
            f"objective is {objective}, for {problem}, but model is for {head.kind}; expected "
            f"{_FITS[head.problem or '']}"
        )
    if objective.needs.per_example and (head.per_token or head.kind == "question_answering"):
        raise ValueError(f"objective {objective} is of examples, but model is for {head.kind}; expected a classifier")
    if head.per_token or head.kind == "question_answering":
        stored = {teacher + LOGITS for teacher in objective.needs.teachers or (TEACHER,)}
        if dataset is not None and (found := sorted(stored & columns_of(dataset))):
            raise ValueError(
                f"train_dataset has the column {found[0]!r}, of one row of logits an example, but model is for "
                f"{head.kind}; expected a teacher_model, and no such column"
            )
    columns = set() if dataset is None else columns_of(dataset)
    if head.kind == "seq2seq_lm" and columns and not columns & {"labels", "decoder_input_ids"}:
        raise ValueError(
            "train_dataset has no column 'labels', of which a decoder's inputs are made; expected it, or "
            "'decoder_input_ids'"
        )
    of_one_token = objective.needs.hidden_states and not objective.needs.all_tokens
    is_classifier = name.endswith("ForSequenceClassification") and not config_of(student, "is_encoder_decoder")
    if of_one_token and not is_classifier and is_causal(student):
        raise ValueError(
            f"objective {objective} is of the one token that a classifier looks at, but model is a {name}; "
            "expected an encoder, or a decoder ForSequenceClassification"
        )


_HEADS = (
    "sequence or image classification",
    "token classification",
    "question answering",
    "masked, causal or sequence-to-sequence language modelling",
)


def check_evaluation(args: Any, objective: Objective, dataset: Any, head: Head) -> None:
    """That the loss that the best model is chosen by can be had."""
    wanted = str(args.metric_for_best_model or "").removeprefix("eval_")
    if wanted != "loss" or objective.needs.labels is False or dataset is None or isinstance(dataset, dict):
        return
    names = ("start_positions",) if head.kind == "question_answering" else ("labels", "label", "label_ids")
    if (columns := columns_of(dataset)) and not columns & set(names):
        raise ValueError(
            f"args.metric_for_best_model is {args.metric_for_best_model!r}, but eval_dataset has no {names[0]}, "
            f"without which objective {objective} is not known to have a loss; expected labels, or an objective of the "
            "teacher's outputs alone"
        )


def check_objective(
    objective: Objective, student: nn.Module, teachers: Mapping[str, TeacherModel], dataset: Any
) -> None:
    labels = config_of(student, "num_labels")
    columns = set() if dataset is None else columns_of(dataset)
    for column in objective.needs.columns:
        if columns and column not in columns:
            raise ValueError(f"train_dataset has no column {column!r}, which objective {objective} needs")
    if objective.needs.attentions and is_causal(student):
        raise ValueError(
            f"objective {objective} compares attention scores, but model is a {type(unwrapped(student)).__name__}, "
            "whose tokens attend to none after them; expected an encoder"
        )
    if not objective.needs.teacher:
        if teachers:
            raise ValueError(f"teacher_model is given but objective {objective} uses no teacher; expected None")
        return
    names = objective.needs.teachers or (TEACHER,)
    if unknown := sorted(teachers.keys() - set(names)):
        wanted = f"models by the names {', '.join(names)}" if objective.needs.teachers else "one model"
        raise ValueError(f"teacher_model has {', '.join(unknown)}, but objective {objective} uses {wanted}")
    for name in names:
        _check_source(name, objective, teachers.get(name), labels, dataset, columns)
    for argument, model in (("model", student), ("teacher_model", teachers.get(names[0]))):
        if objective.needs.hidden_states and isinstance(model, nn.Module) and not _gives_hidden_states(model):
            raise ValueError(
                f"{argument} is a {type(model).__name__}, whose forward takes no output_hidden_states; "
                f"objective {objective} needs hidden states"
            )


def _check_source(
    name: str, objective: Objective, teacher: TeacherModel | None, labels: int | None, dataset: Any, columns: set[str]
) -> None:
    """That a teacher's outputs are to be had, from columns or a model."""
    if name + LOGITS in columns:
        if objective.needs.attentions:
            raise ValueError(
                f"objective {objective} needs the teacher's attention scores, which no column has, but the teacher is "
                f"not run where train_dataset has the column {name + LOGITS!r}; expected a dataset without it"
            )
        is_first = name == (*objective.needs.teachers, TEACHER)[0]
        if is_first and objective.needs.hidden_states and name + HIDDEN_STATES not in columns:
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
            f"{argument_of(name)} is None and train_dataset has no column {name + LOGITS!r}; "
            f"objective {objective} needs one of them"
        )


def _gives_hidden_states(model: nn.Module) -> bool:
    known = isinstance(model, transformers.PreTrainedModel)
    return known or "output_hidden_states" in inspect.signature(model.forward).parameters


def load_teacher(argument: str, teacher: TeacherModel, student: nn.Module) -> nn.Module:
    if isinstance(teacher, nn.Module):
        return teacher
    if not isinstance(teacher, str | Path):
        raise TypeError(f"{argument} is a {type(teacher).__name__}; expected a model, or its folder or name")
    head = named_task(student)
    auto = getattr(transformers, f"AutoModelFor{head}", None) if head else None
    if auto is None:
        raise TypeError(
            f"{argument} is {str(teacher)!r}, but what to load it as beside a {type(student).__name__} is "
            "not known; expected a model object"
        )
    if is_reshaped(load_config(teacher)):
        return from_pretrained(teacher)
    with reading(teacher):
        model, loading = auto.from_pretrained(
            teacher,
            ignore_mismatched_sizes=True,  # `check_fit` says which do not fit
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"{argument} {str(teacher)!r} has no weights for {', '.join(missing)}; expected a model trained for {head}"
        )
    check_fit(f"{argument} {str(teacher)!r}", model, loading)
    return model  # type: ignore[no-any-return]


def check_teacher(
    argument: str, student: nn.Module, teacher: nn.Module, processing_class: Any, vocab: str = "same"
) -> None:
    if {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}:
        raise ValueError(f"{argument} shares parameters with model, and would change with it; expected a copy")
    ours, theirs = (getattr(model, "main_input_name", None) for model in (student, teacher))
    if ours and theirs and ours != theirs:
        raise ValueError(f"{argument} takes {theirs} but model takes {ours}; expected the same input")
    ours, theirs = (config_of(model, "num_labels") for model in (student, teacher))
    if ours and theirs and ours != theirs:
        raise ValueError(f"{argument} has {theirs} labels but model has {ours}; expected the same labels")
    _check_label_order(argument, config_of(student, "id2label") or {}, config_of(teacher, "id2label") or {})
    head, theirs_head = head_of(student), head_of(teacher)
    if None not in (head.kind, theirs_head.kind) and head.kind != theirs_head.kind:
        raise ValueError(f"{argument} is for {theirs_head.kind} but model for {head.kind}; expected the same")
    _check_vocabulary(argument, student, teacher, processing_class, vocab)
    if (
        head.kind in ("masked_lm", "causal_lm", "seq2seq_lm")
        and vocab == "same"
        and head.classes
        and (theirs_head.classes not in (None, head.classes))
    ):
        raise ValueError(
            f"{argument} has logits of {theirs_head.classes} tokens but model of {head.classes}; expected the same "
            "number, or LogitsKD(vocab='common')"
        )
    check_has_values(argument, teacher)
    check_finite(argument, teacher)


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


def _check_vocabulary(argument: str, student: nn.Module, teacher: nn.Module, processing_class: Any, vocab: str) -> None:
    """Compare the tokenizers, where the teacher's is beside its weights, or else the vocabularies' sizes."""
    folder = getattr(teacher, "name_or_path", "")
    if hasattr(processing_class, "get_vocab") and folder and (Path(folder) / "tokenizer_config.json").is_file():
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        ours, theirs = processing_class.get_vocab(), tokenizer.get_vocab()
        if vocab == "common":
            shared = shared_tokens(processing_class, tokenizer)
            if not torch.equal(shared.ours, shared.theirs):
                raise ValueError(
                    f"processing_class and {argument}'s tokenizer ({folder}) share {shared}, of which "
                    f"{int((shared.ours != shared.theirs).sum())} are at other places; vocab='common' is for those "
                    "that are at the same"
                )
        elif ours != theirs:
            token = min(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
            raise ValueError(
                f"processing_class has token {token!r} at {ours.get(token)} but {argument}'s tokenizer "
                f"({folder}) at {theirs.get(token)}; both see the same input_ids: expected one vocabulary"
            )
        return
    size, teacher_size = (config_of(model, "vocab_size") for model in (student, teacher))
    if vocab == "same" and size and teacher_size and size != teacher_size:
        raise ValueError(
            f"{argument} has a vocabulary of {teacher_size} tokens but model of {size}; both see the same "
            "input_ids: expected one vocabulary"
        )


def nan_told(name: str, team: Sequence[str], dataset: Any) -> str:
    """Where the NaN is that the teacher of this name gave: of one that was drawn, in which of the team."""
    there = set() if dataset is None or not hasattr(dataset, "__len__") else columns_of(dataset)
    columns = [one + LOGITS for one in (team if name == DRAWN else [name]) if one + LOGITS in there]
    if not columns:
        return f"{argument_of(name)} gave NaN; expected numbers"
    if hasattr(dataset, "select_columns"):  # what is not looked at need not be decoded
        dataset = dataset.with_format(None).select_columns(columns)
    found = (
        (row, column)
        for row in range(len(dataset))
        for column in columns
        if torch.as_tensor(dataset[row][column]).isnan().any()
    )
    row, column = next(found, ("?", columns[0]))
    return f"train_dataset has NaN in row {row} of {column!r}; expected numbers"
