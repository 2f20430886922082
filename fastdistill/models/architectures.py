"""Where the encoders of transformers keep their layers, attention heads and feed-forward neurons."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Architecture:
    """Names of modules: of the layers in the base model, and of the others in a layer."""

    layers: str
    attention: str
    """Gives the heads' contexts side by side, or what `head_out` makes of them where that is within it."""
    head_in: tuple[str, ...]
    """Query, key and value: their rows are the heads'."""
    head_out: str
    """The output projection of attention: its columns are the heads'."""
    neuron_in: str
    neuron_out: str
    alone: str
    """From here on in a layer no token sees another."""


_BERT = Architecture(
    layers="encoder.layer",
    attention="attention.self",
    head_in=("attention.self.query", "attention.self.key", "attention.self.value"),
    head_out="attention.output.dense",
    neuron_in="intermediate.dense",
    neuron_out="output.dense",
    alone="attention.output",
)
ARCHITECTURES = {
    "bert": _BERT,
    "camembert": _BERT,
    "distilbert": Architecture(
        layers="transformer.layer",
        attention="attention",
        head_in=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        head_out="attention.out_lin",
        neuron_in="ffn.lin1",
        neuron_out="ffn.lin2",
        alone="sa_layer_norm",
    ),
    "electra": _BERT,
    "mpnet": Architecture(
        layers="encoder.layer",
        attention="attention.attn",
        head_in=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        head_out="attention.attn.o",
        neuron_in="intermediate.dense",
        neuron_out="output.dense",
        alone="attention.LayerNorm",
    ),
    "roberta": _BERT,
    "vit": Architecture(
        layers="layers",
        attention="attention",
        head_in=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        head_out="attention.o_proj",
        neuron_in="mlp.fc1",
        neuron_out="mlp.fc2",
        alone="layernorm_after",
    ),
    "xlm-roberta": _BERT,
}
"""By model_type."""


@dataclass(frozen=True)
class Block:
    """One encoder layer, seen as heads and neurons; what is replaced in the layer is replaced here."""

    layer: nn.Module
    names: Architecture
    head_size: int

    @property
    def attention(self) -> nn.Module:
        return self.layer.get_submodule(self.names.attention)

    @property
    def head_out(self) -> Any:
        return self.layer.get_submodule(self.names.head_out)

    @property
    def neuron_out(self) -> Any:
        return self.layer.get_submodule(self.names.neuron_out)

    @property
    def heads(self) -> int:
        return int(self.head_out.in_features) // self.head_size

    @property
    def neurons(self) -> int:
        return int(self.neuron_out.in_features)

    def replace(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.layer.get_submodule(parent), child, module)


def architecture(model: PreTrainedModel) -> Architecture:
    """Raises ValueError for one that is not known."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in ARCHITECTURES:
        raise ValueError(f"model is a {kind}; its layers are known for {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[kind]


def encoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    names = architecture(model)
    stack = model.base_model.get_submodule(names.layers)
    assert isinstance(stack, nn.ModuleList)
    return stack


def number_layers(model: PreTrainedModel) -> None:
    """Tell each of a changed model's layers its place."""
    for place, layer in enumerate(encoder_layers(model)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place  # type: ignore[assignment]


def blocks(model: PreTrainedModel) -> list[Block]:
    """The model's encoder layers. Raises ValueError for an unknown architecture."""
    names, config = architecture(model), model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [Block(layer, names, size) for layer in encoder_layers(model)]


def encoder_weights(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """The matrices of the encoder's layers, by their names in the model."""
    prefix = next(name for name, module in model.named_modules() if module is encoder_layers(model))
    for name, parameter in model.named_parameters():
        if name.startswith(prefix + ".") and parameter.dim() == 2:
            yield name, parameter
