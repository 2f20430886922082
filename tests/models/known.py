"""Tiny models of every known architecture, and what they are given."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

import fastdistill

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {
    **SHAPE,
    "vocab_size": 60,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
    "pad_token_id": 1,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id"), 2),
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
OWN: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 8},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": False},
    "distilbert": {"hidden_dim": 24},
    "gpt2": {"n_inner": 24},
    "layoutlm": {"max_2d_position_embeddings": 16},
    "modernbert": {"layer_types": ["full_attention", "sliding_attention"], "local_attention": 4},
    "nomic_bert": {"head_dim": 8},
    "rembert": {"input_embedding_size": 8},
    "roc_bert": {
        "pronunciation_vocab_size": 60,
        "shape_vocab_size": 60,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "markuplm": {
        **dict.fromkeys(("max_xpath_tag_unit_embeddings", "max_xpath_subs_unit_embeddings"), 9),
        **dict.fromkeys(("tag_pad_id", "subs_pad_id"), 1),
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "deit": {"architectures": ["DeiTForImageClassification"]},
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "granite", "smollm3", "starcoder2"), GROUPED),
    "eurobert": {**GROUPED, "num_key_value_heads": 4},
    "gemma2": {**GROUPED, "query_pre_attn_scalar": 8, "sliding_window": 4},
    "gemma3_text": {**GROUPED, "query_pre_attn_scalar": 8, "sliding_window": 4},
}
IMAGES = "deit", "vit"
NO_CLASSIFIER = "bert-generation", "granite"
"""transformers has no classifier of it: the others of its kind say what `DistillationTrainer` and `store` do."""


def model_of(kind: str, head: str = "", **changes: Any) -> Any:
    torch.manual_seed(0)
    settings = {**SHAPE, "image_size": 8, "patch_size": 4} if kind in IMAGES else TEXT
    config = transformers.CONFIG_MAPPING[kind](**settings | OWN.get(kind, {}) | {"num_labels": 3} | changes)
    if head or kind in NO_CLASSIFIER:
        auto = getattr(transformers, head or "AutoModelForCausalLM")
    else:
        auto = AutoModelForImageClassification if kind in IMAGES else AutoModelForSequenceClassification
    model = auto.from_config(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.1)
    return model


def batch_of(kind: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    if kind in IMAGES:
        return {"pixel_values": torch.rand(3, 3, 8, 8)}
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 8 + [0]])
    return {"input_ids": torch.randint(5, 60, (3, 9)) * mask + (1 - mask), "attention_mask": mask}


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Of tokens that are there."""
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits[batch["attention_mask"].bool()] if logits.dim() == 3 else logits


def with_gates(model: Any, heads: list[Tensor], neurons: list[Tensor], batch: dict[str, Tensor]) -> Tensor:
    with fastdistill.gate(model) as gates:
        gates.heads[:], gates.neurons[:] = heads, neurons
        return logits_of(model, batch)
