"""What frozen teachers say to a batch: run when they are asked, and on the rows that they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from fastdistill.models.packed import packed_forward

LOGITS = "_logits"
HIDDEN_STATES = "_hidden_states"
"""Of a teacher named "teacher" the dataset columns "teacher_logits" [C] and "teacher_hidden_states" [L+1, d], the
[CLS] token's states after the embeddings and each layer, hold what it would say."""


DRAWN = "drawn"
"""What an objective that draws a teacher for each step calls it, where its outputs are columns."""


def check_name(told: str, name: object) -> None:
    """Raises ValueError for what cannot be a teacher's name, with which columns begin."""
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{told} {name!r}; expected a text of letters, digits and underscores")


class TeacherOutputs:
    """A teacher's outputs on a batch, found when they are asked for: `run` gives those of the whole batch, and `rows`
    those of some rows, for which the model sees no others.

    Args:
        model: it is called in the mode that it is in, without gradients. None where `stored` says all.
        features: the batch as the model takes it.
        stored: outputs that are known already, for each row of the batch; the model is then not called.
        first_states: of hidden states the first token's alone are looked at.
        autocast: makes the context that the model runs in.
        aligned: makes of the model's outputs, and the features that it had, those that are given.
    """

    def __init__(
        self,
        model: nn.Module | None,
        features: Mapping[str, Any],
        *,
        stored: Any = None,
        first_states: bool = False,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        aligned: Callable[[Any, Mapping[str, Any]], Any] | None = None,
    ) -> None:
        if model is None and stored is None:
            raise ValueError("model and stored are both None; expected one of them")
        self.model, self.features, self.stored, self.autocast = model, features, stored, autocast
        self.first_states, self.aligned = first_states, aligned
        self.is_nan: Tensor | None = None  # whether any logits that were given are: on the device, which is not asked

    def rows(self, indices: Tensor) -> Any:
        """The outputs of these rows of the batch, in their order; int64 ``[K]``, K at least 1.

        Columns in which none of them has a token are cut off at the batch's end, to find which, where there is an
        attention_mask, waits for the device.
        """
        if self.stored is not None:
            return self._given(gather(self.stored, indices))
        return self._forward(_sub_batch(self.features, indices, getattr(self.model, "main_input_name", None)))

    def run(self) -> Any:
        """The outputs of the whole batch; the model runs the first time."""
        return self._whole

    @cached_property
    def _whole(self) -> Any:
        return self._given(self.stored) if self.stored is not None else self._forward(self.features)

    def _forward(self, features: Mapping[str, Any]) -> Any:
        assert self.model is not None
        with torch.no_grad(), self.autocast():
            outputs = packed_forward(self.model, features, first_states=self.first_states)
            return self._given(outputs if self.aligned is None else self.aligned(outputs, features))

    def _given(self, outputs: Any) -> Any:
        if isinstance(logits := getattr(outputs, "logits", None), Tensor):
            is_nan = logits.isnan().any()
            self.is_nan = is_nan if self.is_nan is None else self.is_nan | is_nan
        return outputs


def run(outputs: Any) -> Any:
    """Outputs of the whole batch: of `TeacherOutputs`, or a dictionary of them, by running the teachers; others as they
    are."""
    if type(outputs) is dict:  # transformers' outputs are dictionaries too
        return {name: run(one) for name, one in outputs.items()}
    return outputs.run() if isinstance(outputs, TeacherOutputs) else outputs


def rows_of(outputs: Any, indices: Tensor) -> Any:
    """Some rows of a teacher's outputs: of `TeacherOutputs` by running it on them, of others by taking them."""
    return outputs.rows(indices) if isinstance(outputs, TeacherOutputs) else gather(outputs, indices)


def gather(outputs: Any, indices: Tensor) -> SequenceClassifierOutput:
    """Some rows of outputs that are there: logits and, if there are any, hidden states."""
    states = getattr(outputs, "hidden_states", None)
    return SequenceClassifierOutput(
        logits=outputs.logits[indices],
        hidden_states=None if states is None else tuple(layer[indices] for layer in states),
    )


def stored_outputs(name: str, batch: Mapping[str, Any]) -> SequenceClassifierOutput | None:
    """What a batch's columns hold of a teacher's outputs, or None; of the tokens, hidden states have the first."""
    logits, states = batch.get(name + LOGITS), batch.get(name + HIDDEN_STATES)
    if logits is None:
        return None
    tokens = None if states is None else tuple(layer.unsqueeze(1) for layer in states.unbind(1))
    return SequenceClassifierOutput(logits=logits, hidden_states=tokens)


def _sub_batch(features: Mapping[str, Any], indices: Tensor, main_input: str | None) -> dict[str, Any]:
    tensors = {name: value for name, value in features.items() if isinstance(value, Tensor) and value.dim()}
    batch = len(tensors.get(main_input or "", next(iter(tensors.values()), indices)))
    rows = {name: value[indices] if len(value) == batch else value for name, value in tensors.items()}
    mask = rows.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        padded = mask.shape[1]
        places = torch.arange(1, padded + 1, device=mask.device)
        longest = max(1, int((places * (mask != 0).any(0)).max()))  # on the left nothing is cut: places stay
        rows = {
            name: value[:, :longest] if value.dim() > 1 and value.shape[1] == padded else value
            for name, value in rows.items()
        }
    return {**features, **rows}
