"""Students made from teachers, and the models they start from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from fastdistill.models.architectures import encoder_layers, number_layers
from fastdistill.models.hooks import refuse_hooked
from fastdistill.models.pruning import CONFIG_KEY, prune
from fastdistill.models.scores import Scores
from fastdistill.models.sharing import CONFIG_KEY as SHARED_KEY
from fastdistill.models.sharing import declare_shared, refuse_shared

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Model = TypeVar("Model", bound=PreTrainedModel)


def first_layers(model: Model, k: int, *, layers: Sequence[int] | None = None) -> Model:
    """A new model of the same class with the first `k` of the model's layers, and all that is not a layer.

    Args:
        model: a BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, MPNet, DistilBERT or ViT, with any head.
        k: from 1 to the model's number of layers.
        layers: the `k` layers to take instead, by their place in the model, in the order given.

    Every weight is copied; all of them train, whether or not the model's do.
    Raises ValueError for an unknown architecture, for a `k` or `layers` that the model does not have, and for a model
    with shared layers.
    """
    refuse_hooked(model)
    stack = encoder_layers(model)
    refuse_shared(model)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(stack):
        raise ValueError(f"k is {k!r}; expected from 1 to {len(stack)}, the model's number of layers")
    chosen = list(range(k)) if layers is None else list(layers)
    if len(set(chosen)) != k or len(chosen) != k or not set(chosen) <= set(range(len(stack))):
        raise ValueError(f"layers is {layers!r}; expected k = {k} different numbers from 0 to {len(stack) - 1}")

    copies: dict[int, object] = {}  # deepcopy takes what is here for the copy, and so leaves the other layers out
    copies[id(stack)] = nn.ModuleList([copy.deepcopy(stack[layer], copies) for layer in chosen])
    student = copy.deepcopy(model, copies)
    student.config.num_hidden_layers = k  # DistilBERT's n_layers follows
    if widths := getattr(student.config, CONFIG_KEY, None):
        setattr(student.config, CONFIG_KEY, {units: [of[layer] for layer in chosen] for units, of in widths.items()})
    number_layers(student)
    return student.requires_grad_(True)


def shuffled_sharing(model: Model, layers: int | None = None, *, swap: bool = True) -> Model:
    """A new model whose top layers are applied once more, above, with query and key swapped: SPS (Pea-KD, section 3.2).

    n layers become n + `layers`, by default 2n, with the parameters of n: a layer's weights are the very tensors of
    the one that is applied again, and their gradients the sum over both; but its query has the other's key's weight
    and bias, and its key the other's query's.

    Args:
        model: a BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, MPNet, DistilBERT or ViT, with any head.
        layers: how many are applied again, from 1 to all. By default all or, as in the paper, three of six.
        swap: False leaves query and key as they are (SPS-1).

    A layer that is applied again has modules of its own, and so hidden states and gates (`fastdistill.gate`) of its
    own. The new model is saved by its own ``save_pretrained``, each weight once, and loaded by
    `fastdistill.from_pretrained`; transformers' own would draw new weights for the layers above, and reports them as
    missing. All its weights train. Raises TypeError or ValueError for wrong arguments, and ValueError for an unknown
    architecture, for a model that has shared layers already and for one within `fastdistill.gate`.
    """
    refuse_hooked(model)
    depth = len(encoder_layers(model))
    refuse_shared(model)
    if layers is None:
        layers = 3 if depth == 6 else depth
    if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= depth:
        raise ValueError(f"layers is {layers!r}; expected from 1 to {depth}, the model's number of layers")
    if not isinstance(swap, bool):
        raise TypeError(f"swap is {swap!r}; expected True or False")
    student = copy.deepcopy(model)
    stack = encoder_layers(student)
    stack.extend([copy.deepcopy(layer) for layer in stack[-layers:]])
    student.config.num_hidden_layers = len(stack)  # DistilBERT's n_layers follows
    if widths := getattr(student.config, CONFIG_KEY, None):
        setattr(student.config, CONFIG_KEY, {units: [*of, *of[-layers:]] for units, of in widths.items()})
    setattr(student.config, SHARED_KEY, {"layers": layers, "swap": swap})
    number_layers(student)
    declare_shared(student)
    student.tie_weights(recompute_mapping=False)
    return student.requires_grad_(True)


def parameter_pruned(model: Model, expressiveness: Scores, sparsity: float = 0.7) -> Model:
    """A student that is the model without the heads and neurons that are the least expressive, in each layer's norm.

    The second of STARK's students (Yang et al. 2022, section 4.1): 70 % of the heads and of the neurons are removed.

    Args:
        model, sparsity: as of `fastdistill.prune`.
        expressiveness: ``fastdistill.score(model, loader).expressiveness``.
    """
    return prune(model, expressiveness.normalized(), sparsity)
