"""Layers that are applied again, higher up, with the same weights: how the config and transformers know of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdistill.models.architectures import architecture, configs, layer_stack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_KEY = "fastdistill_shared"
"""In the config of a model with shared layers: of how many "layers", the last ones, the weights are those of as many
before them; and whether these "swap" query and key."""


ACTIVATIONS = "hidden_act", "hidden_activation", "activation_function", "activation"
"""What configs call the function between a layer's two linear maps."""

NOT_PLAIN = ", in layers that share weights: fastdistill.from_pretrained loads them"
"""Follows the activation in the config of a model with shared layers: transformers would draw new weights for those
above, but has no activation of that name, and so raises an error. Only constructors read it."""


def mark_activation(model: PreTrainedModel) -> None:
    for config in configs(model):
        for name in ACTIVATIONS:
            if isinstance(activation := getattr(config, name, None), str):
                setattr(config, name, activation.removesuffix(NOT_PLAIN) + NOT_PLAIN)


def unmark_activation(config: Any) -> None:
    """For the constructors."""
    for name in ACTIVATIONS:
        if isinstance(activation := getattr(config, name, None), str):
            setattr(config, name, activation.removesuffix(NOT_PLAIN))


def refuse_shared(model: PreTrainedModel) -> None:
    """Raises ValueError for a model with shared layers."""
    if getattr(getattr(model, "config", None), CONFIG_KEY, None) is not None:
        raise ValueError("model has shared layers (fastdistill.shuffled_sharing); expected one without")


def declare_shared(model: PreTrainedModel) -> None:
    """Make known what the model's config says: which weights its ``tie_weights`` ties, its ``save_pretrained`` leaves
    out, and its ``from_pretrained`` does not miss. Raises ValueError where layers are not of the same shape."""
    mark_activation(model)
    shared, stack = getattr(model.config, CONFIG_KEY), layer_stack(model)
    prefix = next(name for name, module in model.named_modules() if module is stack)
    swapped = {}
    if shared["swap"]:
        query, key, _ = architecture(model).head_in
        swapped = {query: key, key: query}
    for place in range(len(stack) - shared["layers"], len(stack)):
        source = place - shared["layers"]
        above, below = (dict(stack[at].named_parameters()) for at in (place, source))
        tied = {}
        for name in above:
            module, _, kind = name.rpartition(".")
            tied[name] = f"{swapped.get(module, module)}.{kind}"
        if any(other not in below or below[other].shape != above[name].shape for name, other in tied.items()):
            raise ValueError(f"layer {place} shares the weights of layer {source}, which is of another shape")
        stack[place]._tied_weights_keys = tied  # type: ignore[assignment]
        model.all_tied_weights_keys.update(
            {f"{prefix}.{place}.{name}": f"{prefix}.{source}.{other}" for name, other in tied.items()}
        )


def check_tied(folder: Path, model: PreTrainedModel) -> None:
    """Raises ValueError where a folder had weights of the last layers that are not those of the layers before."""
    number = getattr(model.config, CONFIG_KEY)["layers"]
    rest = {id(weight) for layer in layer_stack(model)[:-number] for weight in layer.parameters()}
    for weight in layer_stack(model)[-number:].parameters():
        if id(weight) not in rest:
            raise ValueError(
                f"{folder} has weights and a config that do not go together: the last {number} layers have their own"
            )


def check_shared(folder: Path, shared: Any, layers: int) -> None:
    """Raises ValueError where a config says what cannot be of a model of so many layers."""
    fits = isinstance(shared, Mapping) and set(shared) == {"layers", "swap"}
    number, swap = (shared["layers"], shared["swap"]) if fits else (None, None)
    if type(number) is not int or not 1 <= number <= layers // 2 or not isinstance(swap, bool):
        raise ValueError(
            f"{folder / 'config.json'}: {CONFIG_KEY} is {shared!r}; expected layers, from 1 to {layers // 2}, and swap"
        )
