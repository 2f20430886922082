"""Architectures that users register, and what the table does not carry."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastdistill
from fastdistill.models import architectures, registering
from fastdistill.models.architectures import ARCHITECTURES
from fastdistill.models.narrowing import without
from tests import tiny
from tests.models.known import SHAPE, TEXT, batch_of, logits_of, with_gates

OPT = fastdistill.Architecture(
    layers="decoder.layers",
    attention="self_attn",
    head_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    head_out="self_attn.out_proj",
    neuron_in=("fc1",),
    neuron_out="fc2",
    width="ffn_dim",
)


def test_an_architecture_that_a_user_registers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = {"ffn_dim": 24, "word_embed_proj_dim": 32, **TEXT}
    model = transformers.OPTForSequenceClassification(transformers.OPTConfig(**settings, num_labels=3)).eval()
    with pytest.raises(ValueError, match="model is a opt; .* fastdistill.register_architecture makes another known"):
        fastdistill.first_layers(model, 1)
    table = dict(ARCHITECTURES)
    for module in (architectures, registering):
        monkeypatch.setattr(module, "ARCHITECTURES", table)
    fastdistill.register_architecture("opt", OPT)  # on transformers' default config
    assert table["opt"] == OPT
    fastdistill.register_architecture("opt", OPT, model=model)
    batch = batch_of("opt")
    kept = [torch.tensor([0, 3]), torch.tensor([1])], [torch.arange(3), torch.arange(24)]
    smaller = without(model, *kept)
    masks = [
        [torch.zeros(number).index_fill(0, own, 1) for own in group]
        for number, group in zip((4, 24), kept, strict=True)
    ]
    torch.testing.assert_close(logits_of(smaller, batch), with_gates(model, *masks, batch))
    smaller.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(fastdistill.from_pretrained(tmp_path), batch), logits_of(smaller, batch))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layers": "layers"}, "layers is 'layers', which OPTModel does not have; it has decoder"),
        ({"layers": "decoder.embed_tokens"}, "layers is 'decoder.embed_tokens', a Embedding; expected a ModuleList"),
        ({"attention": "attn"}, "attention is 'attn', which OPTDecoderLayer does not have; it has activation_fn, "),
        ({"attention": ""}, "attention is ''; expected a module's name"),
        ({"head_out": "self_attn.o_proj"}, "head_out is 'self_attn.o_proj', which OPTDecoderLayer does not have; it"),
        ({"head_in": ("self_attn.q_proj",) * 2}, "head_in is .*; expected one name, or query, key and value"),
        ({"head_in": ("self_attn.q_proj",)}, "head_in is .* with 32 rows and head_out is .* with 32 columns"),
        ({"head_parts": 3}, "head_parts is 3; expected 1, or 3 where head_in is one linear map"),
        ({"neuron_in": ()}, "neuron_in is (); expected one name or two"),
        ({"neuron_parts": 2}, "neuron_in is 'fc1' with 24 rows and neuron_out is 'fc2' with 24 columns; expected 2 "),
        ({"neuron_out": "final_layer_norm"}, "neuron_out is 'final_layer_norm', a LayerNorm; expected a Linear or "),
        ({"alone": "norm"}, "alone is 'norm', which OPTDecoderLayer does not have"),
    ],
)
def test_names_that_are_not_the_models(change: dict[str, Any], message: str) -> None:
    settings = {"ffn_dim": 24, "word_embed_proj_dim": 32, **TEXT}
    model = transformers.OPTModel(transformers.OPTConfig(**settings))
    with pytest.raises(ValueError, match=message.replace("()", r"\(\)")):
        fastdistill.register_architecture("opt", dataclasses.replace(OPT, **change), model=model)
    assert "opt" not in ARCHITECTURES


def test_types_that_cannot_be_registered() -> None:
    for arguments, error, message in [
        (("bert", OPT), ValueError, "model_type is 'bert', which is known with other names"),
        (
            ("nowhere", OPT),
            ValueError,
            "model_type is 'nowhere', of which AutoModel makes no model; expected one",
        ),
        (("", OPT), TypeError, "model_type is ''; expected a text"),
        (("opt", {}), TypeError, "architecture is a dict; expected a fastdistill.Architecture"),
    ]:
        with pytest.raises(error, match=message):
            fastdistill.register_architecture(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model is a bert; expected a opt, which is model_type"):
        fastdistill.register_architecture("opt", OPT, model=tiny.bert())
    fastdistill.register_architecture("bert", ARCHITECTURES["bert"], model=tiny.bert())  # as it is known


@pytest.mark.parametrize("kind", ["beit", "swin", "olmo2", "t5"])
def test_what_the_table_does_not_carry(kind: str) -> None:
    """Biases of positions, or norms, that are of all heads; stages of different widths; a decoder beside an encoder."""
    sizes = {"swin": {"embed_dim": 8, "depths": [1], "num_heads": [2]}, "t5": {"d_model": 8, "num_layers": 1}}
    settings = sizes.get(kind, {**SHAPE, "image_size": 8, "patch_size": 4, "vocab_size": 10})
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(transformers.CONFIG_MAPPING[kind](**settings))
    with pytest.raises(ValueError, match=f"model is a {kind}; its layers are known for albert, bert"):
        fastdistill.gate(model).__enter__()
