"""Where the models of transformers keep their layers, attention heads and feed-forward neurons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Architecture:
    """Names of modules: of the layers in the base model, and of the others in a layer.

    Linear maps are `torch.nn.Linear` or transformers' `Conv1D`.
    """

    layers: str
    """A ModuleList."""
    attention: str
    """Gives the heads' contexts side by side, or what `head_out` makes of them where that is within it."""
    head_in: tuple[str, ...]
    """Query, key and value, whose rows are the heads': of key and value there may be fewer, each for as many heads of
    query, one after the other (grouped queries). Or one linear map that is all three."""
    head_out: str
    """The output projection of attention: its columns are the heads'."""
    neuron_in: tuple[str, ...]
    """Their rows are the neurons': one, or the gate and what it multiplies."""
    neuron_out: str
    alone: str = ""
    """From here on in a layer no token sees another; for a classifier whose head takes the first token."""
    head_parts: int = 1
    """One after the other in each of `head_in`: 3 where it is all queries, then all keys, then all values; 1 where it
    is each head's query, key and value."""
    neuron_parts: int = 1
    """The same in `neuron_in`: 2 where it is all gates, then all that they multiply, or the other way round."""
    relative: tuple[str, ...] = ()
    """Linear maps of relative positions, which some layers do not have: their rows are the heads'."""
    norm: str = ""
    """Within attention, where that adds its input to its output: what then normalises the sum."""
    inner: str = ""
    """Where each of `layers` is a group, applied again and again: the layers in it."""
    width: str = "intermediate_size"
    """What the config calls the number of neurons; "" where it has no name for it."""
    head_size: str = ""
    """What the config calls the number of a head's channels; "" where that is the hidden size by the heads' number."""


_BERT = Architecture(
    layers="encoder.layer",
    attention="attention.self",
    head_in=("attention.self.query", "attention.self.key", "attention.self.value"),
    head_out="attention.output.dense",
    neuron_in=("intermediate.dense",),
    neuron_out="output.dense",
    alone="attention.output",
)
_VIT = Architecture(
    layers="layers",
    attention="attention",
    head_in=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    head_out="attention.o_proj",
    neuron_in=("mlp.fc1",),
    neuron_out="mlp.fc2",
    alone="layernorm_after",
    head_size="head_dim",
)
_LLAMA = Architecture(
    layers="layers",
    attention="self_attn",
    head_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    head_out="self_attn.o_proj",
    neuron_in=("mlp.gate_proj", "mlp.up_proj"),
    neuron_out="mlp.down_proj",
    head_size="head_dim",
)
ARCHITECTURES = {
    "albert": Architecture(
        layers="encoder.albert_layer_groups",
        inner="albert_layers",
        attention="attention",
        head_in=("attention.query", "attention.key", "attention.value"),
        head_out="attention.dense",
        norm="LayerNorm",
        neuron_in=("ffn",),
        neuron_out="ffn_output",
    ),
    "bert": _BERT,
    "bert-generation": _BERT,
    "camembert": _BERT,
    "data2vec-text": _BERT,
    "deberta-v2": replace(
        _BERT,
        head_in=("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
        relative=("attention.self.pos_query_proj", "attention.self.pos_key_proj"),
    ),
    "deit": _VIT,
    "distilbert": Architecture(
        layers="transformer.layer",
        attention="attention",
        head_in=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        head_out="attention.out_lin",
        neuron_in=("ffn.lin1",),
        neuron_out="ffn.lin2",
        alone="sa_layer_norm",
        width="hidden_dim",
    ),
    "electra": _BERT,
    "ernie": _BERT,
    "eurobert": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gpt2": Architecture(
        layers="h",
        attention="attn",
        head_in=("attn.c_attn",),
        head_parts=3,
        head_out="attn.c_proj",
        neuron_in=("mlp.c_fc",),
        neuron_out="mlp.c_proj",
        width="n_inner",
    ),
    "gpt_neox": Architecture(
        layers="layers",
        attention="attention",
        head_in=("attention.query_key_value",),
        head_out="attention.dense",
        neuron_in=("mlp.dense_h_to_4h",),
        neuron_out="mlp.dense_4h_to_h",
    ),
    "granite": _LLAMA,
    "layoutlm": _BERT,
    "llama": _LLAMA,
    "markuplm": _BERT,
    "megatron-bert": _BERT,
    "mistral": _LLAMA,
    "modernbert": Architecture(
        layers="layers",
        attention="attn",
        head_in=("attn.Wqkv",),
        head_parts=3,
        head_out="attn.Wo",
        neuron_in=("mlp.Wi",),
        neuron_parts=2,
        neuron_out="mlp.Wo",
    ),
    "mpnet": Architecture(
        layers="encoder.layer",
        attention="attention.attn",
        head_in=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        head_out="attention.attn.o",
        neuron_in=("intermediate.dense",),
        neuron_out="output.dense",
        alone="attention.LayerNorm",
    ),
    "nomic_bert": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "rembert": _BERT,
    "roberta": _BERT,
    "roberta-prelayernorm": _BERT,
    "roc_bert": _BERT,
    "smollm3": _LLAMA,
    "starcoder2": replace(_LLAMA, neuron_in=("mlp.c_fc",), neuron_out="mlp.c_proj"),
    "vit": _VIT,
    "xlm-roberta": _BERT,
    "xlm-roberta-xl": _BERT,
    "xmod": _BERT,
}
"""By model_type."""

PER_LAYER = "layer_types", "no_rope_layers"
"""Lists in a config, with one thing for each layer."""

HEAD_SIZES = "head_dim", "attention_head_size", "head_size"
"""What attention modules, and configs, call the number of a head's channels."""


@dataclass(frozen=True)
class Block:
    """One layer, seen as heads and neurons; what is replaced in the layer is replaced here."""

    layer: nn.Module
    names: Architecture
    head_size: int

    @property
    def attention(self) -> nn.Module:
        return self.layer.get_submodule(self.names.attention)

    @property
    def head_in(self) -> list[Any]:
        return [self.layer.get_submodule(name) for name in self.names.head_in]

    @property
    def head_out(self) -> Any:
        return self.layer.get_submodule(self.names.head_out)

    @property
    def neuron_in(self) -> list[Any]:
        return [self.layer.get_submodule(name) for name in self.names.neuron_in]

    @property
    def neuron_out(self) -> Any:
        return self.layer.get_submodule(self.names.neuron_out)

    @property
    def relative(self) -> list[Any]:
        modules = dict(self.layer.named_modules())
        return [modules[name] for name in self.names.relative if name in modules]

    @property
    def heads(self) -> int:
        """Those of query."""
        return in_features(self.head_out) // self.head_size

    @property
    def groups(self) -> int:
        """The heads of key and value, each for as many heads of query, one after the other."""
        return out_features(self.head_in[1]) // self.head_size if len(self.names.head_in) == 3 else self.heads

    @property
    def neurons(self) -> int:
        return in_features(self.neuron_out)

    def replace(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.layer.get_submodule(parent), child, module)

    def head_rows(self) -> Iterator[tuple[Any, bool]]:
        """The linear maps whose rows are the heads', each with whether they are those of key or value."""
        yield from zip(self.head_in, (False, True, True), strict=False)
        yield from ((module, False) for module in self.relative)


def in_features(linear: Any) -> int:
    return int(linear.weight.shape[0 if isinstance(linear, Conv1D) else 1])


def out_features(linear: Any) -> int:
    return int(linear.weight.shape[1 if isinstance(linear, Conv1D) else 0])


def architecture(model: PreTrainedModel) -> Architecture:
    """Raises ValueError for one that is not known."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"model is a {kind}; its layers are known for {', '.join(ARCHITECTURES)}. "
            "fastdistill.register_architecture makes another known"
        )
    return ARCHITECTURES[kind]


def layer_stack(model: PreTrainedModel) -> nn.ModuleList:
    """The model's layers, or groups of them."""
    names = architecture(model)
    stack = model.base_model.get_submodule(names.layers)
    assert isinstance(stack, nn.ModuleList)
    return stack


def encoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's layers: of one that applies them again and again, each once."""
    inner, stack = architecture(model).inner, layer_stack(model)
    if not inner:
        return stack
    groups: Any = stack
    return nn.ModuleList([layer for group in groups for layer in group.get_submodule(inner)])


def applications(model: PreTrainedModel) -> int:
    """How often each of the model's layers is applied, of one that applies them again and again."""
    return int(model.config.num_hidden_layers) // len(layer_stack(model)) if architecture(model).inner else 1


def configs(model: PreTrainedModel) -> list[Any]:
    """The model's config, and those that its base model and layers have where these are others."""
    own = {id(m.config): m.config for m in model.modules() if type(getattr(m, "config", None)) is type(model.config)}
    return list(own.values())


def set_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Say in the configs of a changed model which of the layers that there were it has, and tell these their places."""
    for config in configs(model):
        for name in PER_LAYER:
            if isinstance(of := getattr(config, name, None), list):
                setattr(config, name, [of[layer] for layer in layers])
        config.num_hidden_layers = len(layers)  # DistilBERT's n_layers, and its like, follow
    for place, layer in enumerate(encoder_layers(model)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place  # type: ignore[assignment]


def check_places(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Raises ValueError where one of these layers is not as transformers would make one in the place that it gets."""
    stack = encoder_layers(model)
    names = [layer.state_dict().keys() for layer in stack]
    depends = getattr(model.config, "scale_attn_by_inverse_layer_idx", False)
    for place, layer in enumerate(layers):
        if names[layer] != names[min(place, len(stack) - 1)] or (depends and place != layer):
            raise ValueError(f"layers has {layer} at {place}, but {type(stack[layer]).__name__} differs by its place")


def blocks(model: PreTrainedModel) -> list[Block]:
    """The model's layers. Raises ValueError for an unknown architecture."""
    names = architecture(model)
    return [
        Block(layer, names, head_size_of(layer.get_submodule(names.attention), model.config))
        for layer in encoder_layers(model)
    ]


def head_size_of(attention: nn.Module, config: Any) -> int:
    for name in HEAD_SIZES:
        if isinstance(size := getattr(attention, name, None), int):
            return size
    return getattr(config, "head_dim", None) or int(config.hidden_size // config.num_attention_heads)


def encoder_weights(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """The matrices of the layers, by their names in the model."""
    prefix = next(name for name, module in model.named_modules() if module is layer_stack(model))
    for name, parameter in model.named_parameters():
        if name.startswith(prefix + ".") and parameter.dim() == 2:
            yield name, parameter
