"""Which tokens two tokenizers share, and where each has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class SharedTokens:
    """Tokens that are spelt alike, in the order of our places; its text says how many.

    Attributes:
        ours, theirs: their places in each vocabulary, int64 ``[n]``: ``logits[..., shared.theirs]`` are in the order of
            ``logits[..., shared.ours]``.
        sizes: of both vocabularies.
    """

    ours: Tensor
    theirs: Tensor
    sizes: tuple[int, int]

    def __len__(self) -> int:
        return len(self.ours)

    def __str__(self) -> str:
        return f"{len(self)} tokens of {self.sizes[0]} and {self.sizes[1]}"


def shared_tokens(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> SharedTokens:
    """The tokens that both tokenizers have: the same text, wherever each has it, added ones too."""
    first, second = ours.get_vocab(), theirs.get_vocab()
    places = sorted((place, second[token]) for token, place in first.items() if token in second)
    pairs = torch.tensor(places, dtype=torch.int64).reshape(-1, 2)
    return SharedTokens(pairs[:, 0], pairs[:, 1], (len(first), len(second)))
