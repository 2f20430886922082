"""Encoders of MiniLM's shape, and batches of real padding, for benchmarks."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.harness import DEVICE


@functools.cache
def encoder(layers: int = 6, classes: int = 2) -> Any:
    """MiniLM's 384 wide layers with 12 heads and 1536 neurons, weights at random."""
    torch.manual_seed(layers)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=1536, num_labels=classes
    )
    return BertForSequenceClassification(config).to(DEVICE).eval()


@functools.cache
def batch(size: int, tokens: int, classes: int = 2) -> dict[str, torch.Tensor]:
    """Sentences of which the longest has so many tokens and the others from half of them."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(tokens // 2, tokens + 1, (size, 1), generator=generator)
    lengths[0] = tokens
    made = {
        "input_ids": torch.randint(1000, 30000, (size, tokens), generator=generator),
        "attention_mask": (torch.arange(tokens) < lengths).long(),
        "labels": torch.randint(classes, (size,), generator=generator),
    }
    return {name: tensor.to(DEVICE) for name, tensor in made.items()}
