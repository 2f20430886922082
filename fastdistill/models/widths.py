"""What a pruned model's config says of its layers' widths, in fastdistill's form and in that of transformers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastdistill.models.architectures import architecture, blocks, configs
from fastdistill.models.sharing import unmark_activation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_KEY = "fastdistill_pruned"
"""In a pruned model's config: for each layer the indices of the heads that are left, of those that the dense model
had, and the number of neurons."""


def declare_widths(model: PreTrainedModel, heads: Sequence[Sequence[int]], neurons: Sequence[int]) -> None:
    """Say in the model's config which heads, and how many neurons, its layers have.

    Beside `CONFIG_KEY`, which `fastdistill.from_pretrained` reads, as transformers' ``per_layer_config``, where the
    installed version has it and the config has words for it. Its config then raises an error where one number is
    asked of all layers."""
    setattr(model.config, CONFIG_KEY, {"heads": [list(own) for own in heads], "neurons": list(neurons)})
    own_configs = configs(model)
    for config in own_configs:
        forget_layers(config)
    for config in own_configs:
        if hasattr(config, "is_heterogeneous"):
            _set_layers(config, _by_layer(model), architecture(model).width)


def _set_layers(config: Any, by_layer: Sequence[dict[str, int]], width: str) -> None:
    """As much as the config's own checks go along with: many ask one number of heads of all layers."""
    for names in ({name for layer in by_layer for name in layer}, {width}, set()):
        own = [{name: value for name, value in layer.items() if name in names} for layer in by_layer]
        config.per_layer_config = {place: layer for place, layer in enumerate(own) if layer} or None
        try:
            config.validate()
        except Exception:
            continue
        return


def plain_config(config: Any) -> Any:
    """A copy from which transformers' own constructors make a model, of layers that are alike."""
    config = copy.deepcopy(config)
    forget_layers(config)
    unmark_activation(config)
    return config


def forget_layers(config: Any) -> None:
    """Of a config whose layers differ take what it says of all."""
    if getattr(config, "is_heterogeneous", False):
        config.per_layer_config = None


def _by_layer(model: PreTrainedModel) -> list[dict[str, int]]:
    """What transformers calls the widths of each layer. Without a size of heads, it takes that from their number."""
    config, names = model.config, architecture(model)
    if names.inner:
        return []
    found: list[dict[str, int]] = []
    for block in blocks(model):
        found.append({names.width: block.neurons} if names.width else {})
        if names.head_size and getattr(config, names.head_size, None):
            found[-1]["num_attention_heads"] = block.heads
            if hasattr(config, "num_key_value_heads"):
                found[-1]["num_key_value_heads"] = block.groups
    return found
