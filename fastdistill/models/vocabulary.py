"""Training with the embeddings of those tokens alone that the data has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdistill.models.hooks import hooked
from fastdistill.ops.checks import INTEGER, check_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CompactEmbedding(nn.Embedding):
    """The rows of some tokens of an embedding, looked up by the tokens' ids, and one more, of ones.

    That last row no token has. What an optimizer makes of it, it makes of every row without a gradient: it tells by
    how much weight decay has shrunk those that are not here. Being a row, it is saved and restored with the others.
    """

    tokens: Tensor
    places: Tensor

    def __init__(self, whole: nn.Embedding, tokens: Tensor) -> None:
        weight = whole.weight.detach()
        rows = torch.cat([weight[tokens], torch.ones_like(weight[:1])])
        places = torch.full((whole.num_embeddings,), len(rows), device=weight.device)  # out of range
        places[tokens] = torch.arange(len(tokens), device=weight.device)
        padding = None if whole.padding_idx is None else int(places[whole.padding_idx])
        super().__init__(rows.shape[0], rows.shape[1], padding_idx=padding, _weight=rows)
        self.weight.requires_grad_(whole.weight.requires_grad)
        self.train(whole.training)
        self.register_buffer("tokens", tokens)
        self.register_buffer("places", places, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        places = self.places.index_select(0, input.flatten()).view_as(input)
        return F.embedding(places, self.weight, self.padding_idx)

    def put_back(self, whole: nn.Embedding) -> None:
        """Into the embedding that this one is of."""
        *_, decayed = self.weight.detach()
        with torch.no_grad():
            whole.weight.mul_(decayed)
            whole.weight[self.tokens] = self.weight[:-1]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = state_dict.get(f"{prefix}tokens")
        if found is not None and not torch.equal(found.to(self.tokens.device), self.tokens):
            raise ValueError(f"{prefix}tokens are {len(found)} others than these {len(self.tokens)}; expected the same")
        super()._load_from_state_dict(state_dict, prefix, *args)


@contextmanager
def compact_vocabulary(model: PreTrainedModel, tokens: Tensor) -> Iterator[None]:
    """Within it the model has, and trains, the embeddings of these tokens alone; then it has all again.

    A token that never occurs has no gradient, and no moments: all that a step does to its embedding is weight decay. So
    the others, put back at the end, are what they would have become, bit for bit without weight decay and within
    rounding with it; and optimizer, gradient clipping and checkpoints are spared most of a small encoder's weights.

    Args:
        model: with an input embedding whose weight it has once: not one whose output layer is tied to it.
        tokens: the ids that may occur, of any shape and any integer dtype; in training or in evaluation. Another is an
            IndexError (on CUDA a device-side assertion).

    Make the optimizer within it. Its weight decay must shrink a row without a gradient in proportion, as that of AdamW,
    Adafactor and SGD does; Adam's, which is part of the gradient, does not. What is saved within it is loaded within it
    with the same tokens only, else a ValueError says so.

    Raises TypeError for tokens of another dtype, and ValueError for ids that the model does not have, a tied or unusual
    embedding, and a model within it already.
    """
    check_tensor("tokens", tokens, INTEGER)
    whole: Any = model.get_input_embeddings()
    _check_embedding(model, whole)
    used = tokens.unique().long()
    if used.numel() == 0 or used[0] < 0 or used[-1] >= whole.num_embeddings:
        raise ValueError(
            f"tokens are from {used[0] if used.numel() else None} to {used[-1] if used.numel() else None}; expected "
            f"some, from 0 to {whole.num_embeddings - 1}"
        )
    if whole.padding_idx is not None:
        used = torch.cat([used, used.new_tensor([whole.padding_idx])]).unique()
    compact = CompactEmbedding(whole, used.to(whole.weight.device))
    with hooked(model, "compact_vocabulary"):
        model.set_input_embeddings(compact)
        try:
            yield
        finally:
            compact = model.get_input_embeddings()  # type: ignore[assignment]
            whole = whole.to(compact.weight.device).train(compact.training)
            whole.requires_grad_(compact.weight.requires_grad)
            compact.put_back(whole)
            model.set_input_embeddings(whole)


def can_compact(model: PreTrainedModel) -> bool:
    """Whether `compact_vocabulary` takes the model."""
    try:
        _check_embedding(model, model.get_input_embeddings())
    except (ValueError, NotImplementedError):
        return False
    return True


def _check_embedding(model: PreTrainedModel, embedding: object) -> None:
    if type(embedding) is not nn.Embedding:
        raise ValueError(f"model has a {type(embedding).__name__} as its input embedding; expected an nn.Embedding")
    if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
        raise ValueError(f"model has {embedding} as its input embedding; expected one without further options")
    names = [name for name, weight in model.named_parameters(remove_duplicate=False) if weight is embedding.weight]
    if len(names) > 1:
        raise ValueError(f"model has one weight as {' and '.join(names)}; expected an input embedding that is not tied")
