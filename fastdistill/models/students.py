"""Students made from teachers, and the models they start from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from fastdistill.models.architectures import architecture, blocks, check_places, layer_stack, set_layers
from fastdistill.models.hooks import refuse_hooked, refuse_quantized
from fastdistill.models.pruning import prune
from fastdistill.models.scores import Scores
from fastdistill.models.sharing import CONFIG_KEY as SHARED_KEY
from fastdistill.models.sharing import declare_shared, refuse_shared
from fastdistill.models.widths import CONFIG_KEY, declare_widths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Model = TypeVar("Model", bound=PreTrainedModel)


def first_layers(model: Model, k: int, *, layers: Sequence[int] | None = None) -> Model:
    """A new model of the same class with the first `k` of the model's layers, and all that is not a layer.

    Args:
        model: of a known architecture, with any head.
        k: from 1 to the model's number of layers.
        layers: the `k` layers to take instead, by their place in the model, in the order given.

    Every weight is copied; all of them train, whether or not the model's do. Of a model that applies one layer again
    and again (ALBERT) the student applies it `k` times.
    Raises ValueError for an unknown architecture, for a `k` or `layers` that the model does not have, for layers that
    differ by their place and would get another (ModernBERT's first), and for a model with shared or quantized layers.
    """
    refuse_hooked(model)
    refuse_quantized(model)
    stack = layer_stack(model)
    refuse_shared(model)
    depth = model.config.num_hidden_layers
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= depth:
        raise ValueError(f"k is {k!r}; expected from 1 to {depth}, the model's number of layers")
    chosen = list(range(k)) if layers is None else list(layers)
    if len(set(chosen)) != k or len(chosen) != k or not set(chosen) <= set(range(depth)):
        raise ValueError(f"layers is {layers!r}; expected k = {k} different numbers from 0 to {depth - 1}")
    copies: dict[int, object] = {}  # deepcopy takes what is here for the copy, and so leaves the other layers out
    if not architecture(model).inner:
        check_places(model, chosen)
        copies[id(stack)] = nn.ModuleList([copy.deepcopy(stack[layer], copies) for layer in chosen])
    elif len(stack) > 1 or layers is not None:
        raise ValueError(
            f"model applies {len(stack)} groups of layers again and again, and layers is {layers}; expected one group, "
            "and None"
        )
    student = copy.deepcopy(model, copies)
    _keep(student, chosen)
    return student.requires_grad_(True)


def _keep(student: PreTrainedModel, layers: Sequence[int]) -> None:
    """Say in a student's config which of the model's layers it has."""
    widths = getattr(student.config, CONFIG_KEY, None)
    set_layers(student, layers)
    if widths is not None and not architecture(student).inner:
        declare_widths(student, *([widths[units][layer] for layer in layers] for units in ("heads", "neurons")))


def shuffled_sharing(model: Model, layers: int | None = None, *, swap: bool = True) -> Model:
    """A new model whose top layers are applied once more, above, with query and key swapped: SPS (Pea-KD, section 3.2).

    n layers become n + `layers`, by default 2n, with the parameters of n: a layer's weights are the very tensors of
    the one that is applied again, and their gradients the sum over both; but its query has the other's key's weight
    and bias, and its key the other's query's.

    Args:
        model: of a known architecture, with any head.
        layers: how many are applied again, from 1 to all. By default all or, as in the paper, three of six.
        swap: False leaves query and key as they are (SPS-1).

    A layer that is applied again has modules of its own, and so hidden states and gates (`fastdistill.gate`) of its
    own. The new model is saved by its own ``save_pretrained``, each weight once, and loaded by
    `fastdistill.from_pretrained`. transformers' own would draw new weights for the layers above: the config's
    activation says that layers are shared, so that it raises an error in place of that. `fastdistill.export` writes a
    plain model with all layers. All its weights train. Raises TypeError or ValueError for wrong arguments, and
    ValueError for an unknown architecture, for a model that has quantized layers, or shared layers already, also of its
    own (ALBERT), or linear maps that transformers cannot tie (GPT-2), and for one within `fastdistill.gate`; with
    `swap`, also where query and key are one linear map, or of different sizes.
    """
    refuse_hooked(model)
    refuse_quantized(model)
    if (names := architecture(model)).inner:
        raise ValueError("model applies its layers again and again; expected one with each layer once")
    depth = len(layer_stack(model))
    refuse_shared(model)
    if layers is None:
        layers = 3 if depth == 6 else depth
    if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= depth:
        raise ValueError(f"layers is {layers!r}; expected from 1 to {depth}, the model's number of layers")
    if not isinstance(swap, bool):
        raise TypeError(f"swap is {swap!r}; expected True or False")
    if swap and (len(names.head_in) == 1 or any(block.heads != block.groups for block in blocks(model))):
        raise ValueError("swap is True, but query and key are one linear map, or of different sizes; expected False")
    if any(isinstance(block.neuron_out, Conv1D) for block in blocks(model)):  # transformers cuts their biases then
        raise ValueError(f"model is a {type(model).__name__} of Conv1D, which transformers cannot tie; expected Linear")
    places = [*range(depth), *range(depth - layers, depth)]
    check_places(model, places)
    student = copy.deepcopy(model)
    stack = layer_stack(student)
    stack.extend([copy.deepcopy(layer) for layer in stack[-layers:]])
    _keep(student, places)
    setattr(student.config, SHARED_KEY, {"layers": layers, "swap": swap})
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
