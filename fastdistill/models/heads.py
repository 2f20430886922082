"""What a model's head is for: the one place that knows what its labels mean, and of which of its logits they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto

from fastdistill.models.hooks import unwrapped

Kind = Literal[
    "classification",
    "regression",
    "multi_label",
    "token_classification",
    "question_answering",
    "masked_lm",
    "causal_lm",
    "seq2seq_lm",
]
Problem = Literal["classification", "regression", "multi_label"]

IGNORED = -100
"""The label of what does not count."""

LABELS = ("labels", "start_positions", "end_positions", "shift_labels")
"""Inputs that are labels, which no model is given: losses are computed of its logits."""

_ONE_PER_EXAMPLE = ("SequenceClassification", "ImageClassification", "AudioClassification", "VideoClassification")
_OTHER_CLASSES = ("MultipleChoice", "NextSentencePrediction")
_NOT_SHIFTED = ("XLNetLMHeadModel", "ReformerModelWithLMHead")


@dataclass(frozen=True)
class Head:
    """What a head's labels mean.

    * ``classification``: ``logits [B, C]``, ``labels [B]``; ``regression``: ``[B, 1]`` and ``[B]``, NaN for none;
      ``multi_label``: ``[B, C]`` and ``[B, C]``, from 0 to 1, NaN or -100 for none.
    * ``token_classification`` and ``masked_lm``: ``logits [B, S, C]``, ``labels [B, S]``, of the same place.
    * ``causal_lm``: the same shapes, but the logits at t are of the label at t + 1, as in transformers' own loss.
    * ``seq2seq_lm``: ``logits [B, T, C]``, ``labels [B, T]``, of the decoder's places, whose inputs the model makes of
      the labels.
    * ``question_answering``: ``start_logits`` and ``end_logits [B, S]``, ``start_positions`` and ``end_positions [B]``;
      objectives see them as logits ``[B, 2, S]`` and labels ``[B, 2]``. A position beyond S does not count.

    What has no attention (``attention_mask`` 0: padding on either side) counts nowhere, whatever its label: neither a
    token to be predicted, nor one to predict from, nor one where an answer may begin.

    Attributes:
        kind: None for a head that is not known, whose logits and labels are left as they are.
        classes: labels lie in [0, classes); None where that is not known beforehand.
    """

    kind: Kind | None
    classes: int | None = None

    @property
    def problem(self) -> Problem | None:
        """The kind of loss that fits."""
        if self.kind in ("regression", "multi_label", None):
            return self.kind
        return "classification"

    @property
    def per_token(self) -> bool:
        return self.kind in ("token_classification", "masked_lm", "causal_lm", "seq2seq_lm")

    def labels(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """A batch's labels, for each row of logits its own, and -100 (of numbers NaN) where none counts; or None."""
        if self.kind == "question_answering":
            return self._positions(inputs)
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor):
            return labels
        if self.kind == "multi_label":
            return labels.masked_fill(labels == IGNORED, torch.nan) if labels.is_floating_point() else labels
        if not self.per_token:
            return labels
        if self.kind == "causal_lm":
            shifted = inputs.get("shift_labels")
            labels = shifted if isinstance(shifted, Tensor) else _next(labels, IGNORED)
        counts = self._attended(inputs, labels)
        return labels if counts is None else labels.masked_fill(~counts, IGNORED)

    def counted(self, labels: Tensor | None, inputs: Mapping[str, Any]) -> Tensor | None:
        """For each row of a batch's logits an integer, -100 where it does not count: its class where there is one, else
        0. None where nothing is known that does not: there are no labels and no padding. `labels` are the batch's."""
        if labels is not None:
            return torch.where(labels == labels, 0, IGNORED) if labels.is_floating_point() else labels
        if not self.per_token:
            return None
        places = inputs.get("decoder_input_ids" if self.kind == "seq2seq_lm" else "input_ids")
        counts = self._attended(inputs, places)
        if counts is None and self.kind == "causal_lm" and isinstance(places, Tensor):  # the last predicts nothing
            counts = _next(torch.ones_like(places, dtype=torch.bool), False)
        return None if counts is None else torch.where(counts, 0, IGNORED)

    def aligned(self, outputs: Any, inputs: Mapping[str, Any]) -> Any:
        """A model's outputs, whose ``logits`` are rows of the `labels`."""
        if self.kind != "question_answering":
            return outputs
        logits = torch.stack([outputs.start_logits, outputs.end_logits], 1)
        mask = _mask(inputs)
        if mask is not None and mask.shape[-1] == logits.shape[-1]:
            logits = logits.masked_fill(~mask[:, None], -torch.inf)
        found = copy.copy(outputs)
        found.logits = logits
        return found

    def told(self, outputs: Any, logits: Tensor) -> Any:
        """What a prediction is made of: the outputs, or of an answer start and end `aligned`, none at padding."""
        if self.kind != "question_answering":
            return outputs
        return {"start_logits": logits[:, 0], "end_logits": logits[:, 1]}

    def _attended(self, inputs: Mapping[str, Any], like: Any) -> Tensor | None:
        """Which rows of logits, shaped as `like`, are of tokens alone; None where all are, for all that is known."""
        mask = _mask(inputs, "decoder_attention_mask" if self.kind == "seq2seq_lm" else "attention_mask")
        if mask is None or not isinstance(like, Tensor) or mask.shape != like.shape:
            return None
        return mask & _next(mask, False) if self.kind == "causal_lm" else mask

    def _positions(self, inputs: Mapping[str, Any]) -> Tensor | None:
        sides = [inputs.get(name) for name in ("start_positions", "end_positions")]
        if not all(isinstance(side, Tensor) for side in sides):
            return None
        positions = torch.stack([side.reshape(-1) for side in sides], 1)  # type: ignore[union-attr]
        tokens = next((inputs[name].shape[1] for name in ("input_ids", "inputs_embeds") if name in inputs), None)
        if tokens is None:
            return positions
        positions = positions.masked_fill(positions >= tokens, IGNORED)
        mask = _mask(inputs)
        if mask is None or mask.shape[-1] != tokens:
            return positions
        return positions.masked_fill(~mask.gather(1, positions.clamp(min=0).long()), IGNORED)


def _mask(inputs: Mapping[str, Any], name: str = "attention_mask") -> Tensor | None:
    """``[B, S]``, true for tokens; None where there is no such mask."""
    mask = inputs.get(name)
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _next(values: Tensor, last: int | bool) -> Tensor:
    """At each place the value of the next."""
    return nn.functional.pad(values[..., 1:], (0, 1), value=last)


def named_task(model: nn.Module) -> str:
    """What the name of the model's class has after its last "For": RoFormerForMaskedLM has one before; or nothing."""
    _, found, task = type(model).__name__.rpartition("For")
    return task if found else ""


def head_of(model: nn.Module) -> Head:
    """By the model's class and config. A model that is none of transformers' is taken for a classifier, or with one
    label for a regression, of examples."""
    model = unwrapped(model)
    name, config = type(model).__name__, getattr(model, "config", None)
    labels = getattr(config, "num_labels", None)
    own = type(model).__module__.startswith("transformers.")
    task = named_task(model).removesuffix("Simple")
    if name in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values() or (
        task == "ConditionalGeneration" and getattr(config, "is_encoder_decoder", False)
    ):
        return Head("seq2seq_lm", _vocabulary(model))
    if task == "MaskedLM" or name in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return Head("masked_lm", _vocabulary(model))
    if (task == "CausalLM" or name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) and name not in _NOT_SHIFTED:
        return Head("causal_lm", _vocabulary(model))
    if task == "TokenClassification":
        return Head("token_classification", labels)
    if task == "QuestionAnswering" and name in auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES.values():
        return Head("question_answering")
    if task in _OTHER_CLASSES:
        return Head("classification")
    if own and not task.startswith(_ONE_PER_EXAMPLE):
        return Head(None)
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification":
        return Head("multi_label", labels)
    if problem == "regression" or (problem is None and labels == 1):
        return Head("regression", labels)
    return Head("classification", labels)


def _vocabulary(model: Any) -> int | None:
    """How many tokens its logits are of."""
    embeddings = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    size = getattr(embeddings, "out_features", None) or getattr(model.config, "vocab_size", None)
    return None if size is None else int(size)


# The token that a head looks at


def is_causal(model: nn.Module) -> bool:
    """Whether a token sees none of those after it: its first token then says nothing of the others."""
    return any(getattr(module, "is_causal", False) is True for module in unwrapped(model).modules())


def used_states(model: nn.Module, outputs: Any, inputs: Mapping[str, Any]) -> Any:
    """The outputs, whose hidden states, of a decoder's, have the token alone that its classifier takes: the last that
    is no padding. Others keep all tokens, of which a classifier takes the first."""
    states = getattr(outputs, "hidden_states", None)
    if states is None or not is_causal(model):
        return outputs
    padding, tokens = unwrapped(model).config.get_text_config().pad_token_id, inputs.get("input_ids")
    if padding is None or tokens is None:
        last: Any = -1
    else:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        last = (places * (tokens != padding)).argmax(-1)
    rows = torch.arange(len(states[0]), device=states[0].device)
    found = copy.copy(outputs)
    found.hidden_states = tuple(layer[rows, last].unsqueeze(1) for layer in states)
    return found


def label_faults(head: Head, inputs: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a batch's labels. It reads them: they should not be on a device that computes."""
    for name in ("start_positions", "end_positions") if head.kind == "question_answering" else ("labels",):
        labels = inputs.get(name)
        if not isinstance(labels, Tensor) or not labels.numel() or head.problem is None:
            continue
        if head.problem == "classification":
            if labels.is_floating_point():
                yield f"{name} are {labels.dtype}; expected integers"
                continue
            outside = (labels != IGNORED) & ((labels < 0) | (labels >= (head.classes or 2**62)))
            wanted = "0 <= label" + (f" < {head.classes}" if head.classes else "") + f", or {IGNORED}"
        elif head.problem == "multi_label":
            if not labels.is_floating_point() or labels.dim() != 2 or labels.shape[1] != head.classes:
                yield (
                    f"{name} are {labels.dtype} of shape {tuple(labels.shape)}; expected floating-point numbers of "
                    f"shape {(len(labels), head.classes)}, 0 or 1 for each class"
                )
                continue
            outside = (labels != IGNORED) & ((labels < 0) | (labels > 1))
            wanted = f"0 to 1, or {IGNORED} or NaN where it is not known"
        else:
            outside, wanted = labels.isinf(), "finite numbers, or NaN where it is not known"
        if outside.any():
            yield f"{name} holds {labels[outside][0].item()}; expected {wanted}"
