"""A small classifier of the first architectures, and inputs for it; tests/models/test_architectures.py has them all."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

CONFIGS = {
    "bert": "BertConfig",
    "camembert": "CamembertConfig",
    "distilbert": "DistilBertConfig",
    "electra": "ElectraConfig",
    "mpnet": "MPNetConfig",
    "roberta": "RobertaConfig",
    "vit": "ViTConfig",
    "xlm-roberta": "XLMRobertaConfig",
}
SHAPE = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**SHAPE, "vocab_size": 60, "max_position_embeddings": 40, "initializer_range": 0.5}
IMAGE = {**SHAPE, "image_size": 8, "patch_size": 4}


def classifier(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    settings = IMAGE if kind == "vit" else TEXT | ({"hidden_dim": 32} if kind == "distilbert" else {})
    config = getattr(transformers, CONFIGS[kind])(**settings | {"num_labels": 3} | changes)
    auto = AutoModelForImageClassification if kind == "vit" else AutoModelForSequenceClassification
    return auto.from_config(config).eval()


def inputs(kind: str, number: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if kind == "vit":
        return {"pixel_values": torch.rand(number, 3, 8, 8, generator=generator)}
    return {"input_ids": torch.randint(5, 60, (number, 9), generator=generator)}
