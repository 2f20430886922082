"""Many models of one shape, computed side by side as one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdistill.models.sharing import CONFIG_KEY
from fastdistill.models.vocabulary import CompactEmbedding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STACKABLE = (
    "albert",
    "bert",
    "camembert",
    "data2vec-text",
    "distilbert",
    "electra",
    "ernie",
    "megatron-bert",
    "nomic_bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
)
"""Models whose modules all see the examples of a batch as their first dimension, which may be those of several models.
(MPNet's relative positions, for one, are embedded once for all.)"""


class Stack:
    r"""N models of one shape as one, which computes a batch of each in one forward and one backward pass.

    Where the models differ, in their weights, it has one product for all of them,

    .. math:: Y_n = X_n W_n^\top + b_n, \qquad X\,[N, B S, in],\; W\,[N, out, in],\; b\,[N, out]

    and as much for embeddings and layer norms. All else, attention and dropout among it, sees a batch of :math:`N B`
    examples, the first model's first: no example sees another, and each has its own random numbers.

    The models' weights become views of the stack's: what an optimizer makes of a model's weights is the stack's too,
    and each model can be evaluated, saved and given other values as before.

    Args:
        plain: one of that shape without hooks, which is copied, but for its weights. Hooks come onto `model`.
        models: the N, on one device, with the same modules as `plain` but for their input embeddings, which may be
            compact (`fastdistill.compact_vocabulary`); see `obstacle_to_stacking`.

    Attributes:
        model: takes a batch of N·B examples, and gives what each model gives to its own, in training mode.
    """

    def __init__(self, plain: PreTrainedModel, models: Sequence[nn.Module]) -> None:
        self.number = len(models)
        self.model = copy.deepcopy(plain).train()
        shared: dict[int, nn.Parameter] = {}  # by the first model's: where its modules share one, the stack's do
        for modules in zip(*(model.named_modules() for model in models), strict=True):
            [(name, first), *_] = modules
            own = {}
            for key, weight in first.named_parameters(recurse=False):
                if id(weight) not in shared:
                    shared[id(weight)] = _stacked([module.get_parameter(key) for _, module in modules])
                own[key] = shared[id(weight)]
            if own:
                self.model.set_submodule(name, _KINDS[type(first)](self.number, first, own))
        self.model.to(next(iter(shared.values())).device)
        views = [dict(model.named_parameters()) for model in models]
        self._own = {
            name: [view[name] for view in views]
            for name, weight in self.model.named_parameters()
            if weight.requires_grad
        }
        self._embeddings = {
            name: module for name, module in self.model.named_modules() if isinstance(module, _Embedding)
        }

    def __call__(self, **features: Tensor) -> Any:
        """Each model's outputs on its part of the features, ``[N·B, ...]``."""
        rows = len(next(iter(features.values())))
        for embedding in self._embeddings.values():
            embedding.rows = rows // self.number
        return self.model(**features)

    def gradients(self, loss: Tensor, max_norm: float) -> tuple[dict[str, Tensor], Tensor]:
        """Of a loss of all models' outputs, by weights' names, ``[N, ...]``, and the norm of each model's, ``[N]``.

        Those of a model are scaled down together where their norm is above `max_norm`, as by
        `torch.nn.utils.clip_grad_norm_`, unless that is 0; the norms are those before. The device is not waited for."""
        weights = [self.model.get_parameter(name) for name in self._own]
        found = zip(self._own, torch.autograd.grad(loss, weights, allow_unused=True), strict=True)
        gradients = {name: gradient for name, gradient in found if gradient is not None}
        for name, embedding in self._embeddings.items():
            if embedding.padding is not None and f"{name}.weight" in gradients:  # it learns nothing, as in PyTorch's
                gradients[f"{name}.weight"].select(1, embedding.padding).zero_()
        of_each = [gradient.unbind() for gradient in gradients.values()]
        flat = torch._foreach_norm([gradient for own in of_each for gradient in own])
        norms: Tensor = torch.stack(flat).view(-1, self.number).norm(dim=0)
        if max_norm:
            scales = (max_norm / (norms + 1e-6)).clamp(max=1)
            for of_model, scale in zip(zip(*of_each, strict=True), scales, strict=True):
                torch._foreach_mul_(of_model, scale)
        return gradients, norms

    def by_weight(self, gradients: Mapping[str, Tensor]) -> dict[Tensor, Tensor]:
        """The same by the models' own weights."""
        found = {name: gradient.unbind() for name, gradient in gradients.items()}
        return {weight: own for name in found for weight, own in zip(self._own[name], found[name], strict=True)}


def obstacle_to_stacking(model: PreTrainedModel) -> str | None:
    """Why a model cannot be in a `Stack`, or None if it can."""
    if model.config.model_type not in STACKABLE or not type(model).__module__.startswith("transformers."):
        return f"a {type(model).__name__} is not known to be stackable; {', '.join(STACKABLE)} are"
    if getattr(model.config, CONFIG_KEY, None) is not None:
        return "its layers share weights"
    for name, module in model.named_modules():
        if type(module) not in _KINDS and next(module.parameters(recurse=False), None) is not None:
            return f"its {name} is a {type(module).__name__} with weights of its own"
    return None


def _stacked(weights: Sequence[nn.Parameter]) -> nn.Parameter:
    """``[N, ...]``, of which they become views."""
    together = torch.stack([weight.detach() for weight in weights])
    for weight, own in zip(weights, together.unbind(), strict=True):
        weight.data = own
    return nn.Parameter(together, weights[0].requires_grad)


class _OfEach(nn.Module):
    """A module in which each model has its own weights."""

    def __init__(self, number: int, like: Any, weights: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.number, self.like = number, str(like)
        for name, weight in weights.items():
            self.register_parameter(name, weight)

    def extra_repr(self) -> str:
        return f"{self.number} of {self.like}"


class StackedLinear(_OfEach):
    weight: Tensor
    bias: Tensor | None

    def __init__(self, number: int, like: nn.Linear, weights: dict[str, nn.Parameter]) -> None:
        super().__init__(number, like, {})
        self.weight, self.bias = weights["weight"], weights.get("bias")

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        rows = input.reshape(self.number, -1, input.shape[-1]).to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        found: Tensor = _Products.apply(rows, self.weight.to(dtype), bias)  # type: ignore[no-untyped-call]
        return found.view(*input.shape[:-1], -1)


class _Products(torch.autograd.Function):
    """``[N, M, in], [N, out, in], [N, out] -> [N, M, out]``. Autograd's own backward pass of it would transpose each
    weight's gradient, and so copy it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        weight = weight.transpose(1, 2)
        return torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias[:, None], rows, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        return (
            torch.bmm(gradient, weight) if of_rows else None,
            torch.bmm(gradient.transpose(1, 2), rows) if of_weight else None,
            gradient.sum(1) if of_bias else None,
        )


class StackedLayerNorm(_OfEach):
    weight: Tensor
    bias: Tensor

    def __init__(self, number: int, like: nn.LayerNorm, weights: dict[str, nn.Parameter]) -> None:
        super().__init__(number, like, weights)
        self.shape, self.eps = like.normalized_shape, like.eps

    def forward(self, input: Tensor) -> Tensor:
        rows = F.layer_norm(input, self.shape, eps=self.eps).view(self.number, -1, *self.shape)
        return torch.addcmul(self.bias[:, None], rows, self.weight[:, None]).view(input.shape)


class _Embedding(_OfEach):
    weight: Tensor
    offsets: Tensor
    places: Tensor | None
    rows = 1
    """Examples of each model in the batch, for ids that are those of all examples, ``[1, S]``."""

    def __init__(self, number: int, like: nn.Embedding, weights: dict[str, nn.Parameter]) -> None:
        super().__init__(number, like, weights)
        self.padding = like.padding_idx
        size, device = self.weight.shape[1], self.weight.device
        self.register_buffer("offsets", torch.arange(0, number * size, size, device=device)[:, None])
        self.register_buffer("places", like.places if isinstance(like, CompactEmbedding) else None)

    def forward(self, ids: Tensor) -> Tensor:
        if self.places is not None:
            ids = self.places.index_select(0, ids.flatten()).view_as(ids)
        if len(ids) == 1:
            of_each = F.embedding(ids + self.offsets, self.weight.flatten(0, 1))
            return of_each.repeat_interleave(self.rows, 0)
        of_all = ids.reshape(self.number, -1) + self.offsets
        return F.embedding(of_all.view_as(ids), self.weight.flatten(0, 1))


_KINDS: dict[type[nn.Module], type[_OfEach]] = {
    nn.Linear: StackedLinear,
    nn.LayerNorm: StackedLayerNorm,
    nn.Embedding: _Embedding,
    CompactEmbedding: _Embedding,
}
