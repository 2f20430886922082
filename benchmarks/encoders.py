"""Encoders of MiniLM's or BERT-base's shape, and batches of real padding, for benchmarks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from transformers import BertConfig, BertForSequenceClassification

import fastdistill.models  # noqa: F401 (registers its attention)
from benchmarks.harness import DEVICE, TINY
from fastdistill.ops import gate_rules

WIDTHS = {"MiniLM": 24 if TINY else 384, "BERT-base": 24 if TINY else 768}


@functools.cache
def encoder(
    layers: int = 6,
    classes: int = 2,
    *,
    like: str = "MiniLM",
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
) -> Any:
    """MiniLM's 384 or BERT-base's 768 wide layers with 12 heads and four times as many neurons, weights at random."""
    torch.manual_seed(layers)
    width = WIDTHS[like]
    config = BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=4 * width,
        num_labels=classes, attn_implementation=attention,
    )  # fmt: skip
    return BertForSequenceClassification(config).to(DEVICE, dtype).eval()


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


@functools.cache
def ragged(size: int, number: int, tokens: int, grouped: bool) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """So many batches of sentences of up to so many tokens, of which short ones are the most frequent, as in SST-2; in
    any order, or grouped by length. Each with its mask on the CPU, where a collator makes it."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.rand(size * number, generator=generator) ** 2 * (tokens - 3)).int() + 3
    if grouped:
        lengths = lengths.sort().values
    found = []
    for own in lengths.split(size):
        mask = (torch.arange(int(own.max())) < own[:, None]).long()
        ids = torch.randint(1000, 30000, mask.shape, generator=generator) * mask
        found.append(({"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}, mask))
    return found


@contextmanager
def multiplications() -> Iterator[None]:
    """Within it gates are multiplications in front of the output projections, whatever is closed."""
    with (
        patch.object(gate_rules, "neurons_by_kernel", lambda h: False),
        patch.object(gate_rules, "heads_by_kernel", lambda query: False),
        patch.object(gate_rules, "worth_leaving_out", lambda *sizes: False),
    ):
        yield
