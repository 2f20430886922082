"""Pretraining with teacher's predictions (PTP): labels that say how a teacher does on each example."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from fastdistill.models.drawing import drawn_anew, mark_drawn
from fastdistill.models.widths import plain_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Model = TypeVar("Model", bound=PreTrainedModel)

PTP_LABELS = ("confidently correct", "unconfidently correct", "confidently wrong", "unconfidently wrong")
"""The classes, by their numbers."""

THRESHOLDS = {"mrpc": (0.95, 0.75), "qnli": (0.98, 0.7), "rte": (0.8, 0.6), "sst2": (0.98, 0.8)}
"""By task, of the published code: for examples that the teacher has right, and for those that it has wrong."""


def ptp_labels(logits: Tensor, labels: Tensor, threshold: float | Sequence[float] = 0.8) -> Tensor:
    r"""PTP labels (Pea-KD, 2021, table 1): numbers of `PTP_LABELS`, int64 ``[N]``.

    A teacher is correct where :math:`\arg\max_c z_c = y`, and confident where
    :math:`\max_c \mathrm{softmax}(z)_c > t`.

    Args:
        logits: the teacher's z, ``[N, C]``, C at least 2.
        labels: y, integers ``[N]``.
        threshold: t, above 0.5 and at most 1: one, or two of which the first is for examples where the teacher is
            correct and the second for those where it is wrong, as in the published code.

    Not every class need occur: with t = 1 none is confident. Raises ValueError or TypeError for other shapes, types
    and thresholds, and for logits that are NaN.
    """
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; expected [N, C], C at least 2")
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels has shape {tuple(labels.shape)}; expected {tuple(logits.shape[:1])}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels has dtype {labels.dtype}; expected integers")
    if logits.isnan().any():
        raise ValueError("logits has NaN; expected numbers")
    thresholds = tuple(threshold) if isinstance(threshold, Sequence) else (threshold,)
    if len(thresholds) not in (1, 2) or not all(0.5 < t <= 1 for t in thresholds):
        raise ValueError(f"threshold is {threshold!r}; expected one or two numbers above 0.5 and at most 1")
    confidence, predicted = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).max(-1)
    wrong = predicted != labels
    confident = torch.where(wrong, confidence > thresholds[-1], confidence > thresholds[0])
    return wrong * 2 + (~confident).long()


def count_ptp_labels(labels: Tensor) -> dict[str, int]:
    """How many examples each of `PTP_LABELS` has; 0 is said too."""
    return dict(zip(PTP_LABELS, torch.bincount(labels, minlength=len(PTP_LABELS)).tolist(), strict=True))


def ptp_student(student: Model, *, seed: int = 0) -> Model:
    """A copy of a student, in its mode, whose output layer is a new one, drawn from `seed`, for `PTP_LABELS`."""
    config = copy.deepcopy(student.config)
    config.id2label = dict(enumerate(PTP_LABELS))
    config.label2id = {name: label for label, name in enumerate(PTP_LABELS)}
    config.problem_type = "single_label_classification"
    model = copy.deepcopy(student, {id(student.config): config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        other = type(student)(plain_config(config))
    for name in {parameter.rpartition(".")[0] for parameter in output_parameters(student)}:
        head = other.get_submodule(name).to(student.device, student.dtype).train(student.training)
        model.set_submodule(name, head)
    model.num_labels = config.num_labels  # type: ignore[assignment]
    return model


def with_body_of(student: Model, pretrained: Model) -> Model:
    """A copy of a student, with its own output layer, that has all else of another one of the same shape: the encoder
    and, in an architecture whose head has more layers (RoBERTa, ELECTRA, MPNet, DistilBERT), those."""
    model, own = copy.deepcopy(student), output_parameters(student)
    state = {name: value for name, value in pretrained.state_dict().items() if name not in own}
    model.load_state_dict(state, strict=False)
    mark_drawn(model, own & {*drawn_anew(student)})
    return model


def output_parameters(model: PreTrainedModel) -> set[str]:
    """The names of those whose shape depends on the number of classes."""
    shapes = []
    for more in (0, 1):
        config = plain_config(model.config)
        config.num_labels = len(model.config.id2label or ()) + more
        with torch.device("meta"):
            made = type(model)(config)
        shapes.append({name: parameter.shape for name, parameter in made.named_parameters()})
    return {name for name, shape in shapes[0].items() if shapes[1][name] != shape}
