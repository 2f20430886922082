"""Which tokens count, for objectives that look at all of them: those that are no padding."""

from __future__ import annotations

from torch import Tensor


def real_tokens(student: Tensor, teacher: Tensor, attention_mask: Tensor | None, of: str = "hidden_states") -> Tensor:
    """Which of ``[B, S]`` are tokens, and no padding; of ``[B, S, ...]`` of student and teacher."""
    if attention_mask is None:
        raise ValueError("attention_mask is None; expected 1 for tokens and 0 for padding, [B, S]")
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"teacher has {of} of shape {tuple(teacher.shape)}, student {tuple(student.shape)}; expected the "
            "same [B, S, ...]: of all tokens, and not of the first alone, as stored ones are"
        )
    if attention_mask.shape != student.shape[:2]:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected {tuple(student.shape[:2])}, [B, S]"
        )
    return attention_mask != 0


def mean_of(values: Tensor, counted: Tensor) -> Tensor:
    """Over the last dimension, of those that count; of none it is 0."""
    return values.masked_fill(~counted, 0).sum(-1) / counted.sum(-1).clamp(min=1)
