"""A tiny pair of models for every kind of head, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BERT = {**SIZES, "max_position_embeddings": 40, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT |= {"initializer_range": 0.5, "num_labels": 5}
LLAMA = {**SIZES, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0, "num_labels": 3}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "initializer_factor": 3.0}
BART = {"vocab_size": 64, "d_model": 16, "max_position_embeddings": 40, "dropout": 0.0, "attention_dropout": 0.0}
BART |= {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("attention_heads", 2))}
BART |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_start_token_id": 2, "pad_token_id": 0, "init_std": 0.3}
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40, "initializer_range": 0.3}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "pad_token_id": 0, "num_labels": 3}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForTokenClassification": ("BertConfig", BERT),
    "BertForMaskedLM": ("BertConfig", BERT),
    "BertForQuestionAnswering": ("BertConfig", BERT | {"num_labels": 2}),
    "BertForSequenceClassification": ("BertConfig", BERT),
    "LlamaForCausalLM": ("LlamaConfig", LLAMA),
    "LlamaForSequenceClassification": ("LlamaConfig", LLAMA),
    "GPT2LMHeadModel": ("GPT2Config", GPT2),
    "GPT2ForSequenceClassification": ("GPT2Config", GPT2),
    "T5ForConditionalGeneration": ("T5Config", T5),
    "BartForConditionalGeneration": ("BartConfig", BART),
}


def model(name: str, seed: int = 0, **changes: Any) -> Any:
    config, settings = CONFIGS[name]
    torch.manual_seed(seed)
    return getattr(transformers, name)(getattr(transformers, config)(**settings | changes))


def rows(name: str, number: int = 8, seed: int = 0, length: int | None = None) -> list[dict[str, Any]]:
    """Examples, unpadded, of 4 to 10 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Any:
        return torch.randint(low, high, shape, generator=generator)

    made = []
    for _ in range(number):
        size = length or int(draw(4, 11, 1))
        ids = draw(5, 64, size).tolist()
        row: dict[str, Any] = {"input_ids": ids}
        if name.endswith("ForTokenClassification"):
            row["labels"] = draw(0, 5, size).tolist()
        elif name.endswith("ForMaskedLM"):
            row["labels"] = [token if place % 2 else -100 for place, token in enumerate(ids)]
        elif name.endswith("ForQuestionAnswering"):
            row["start_positions"], row["end_positions"] = sorted(draw(0, size, 2).tolist())
        elif name.endswith("ForConditionalGeneration"):
            row["labels"] = draw(5, 64, int(draw(2, 6, 1))).tolist()
        elif name.endswith("ForSequenceClassification"):
            row["labels"] = int(draw(0, 3, 1))
        else:
            row["labels"] = list(ids)
        made.append(row)
    return made


def collate(examples: list[dict[str, Any]], *, more: int = 0, left: bool = False) -> dict[str, torch.Tensor]:
    """Padded to the longest, and with `more` besides; labels too, with -100."""
    rows = [{"attention_mask": [1] * len(e["input_ids"]), **e} for e in examples]
    batch = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if isinstance(values[0], list):
            longest = max(map(len, values)) + more
            fill = -100 if name == "labels" else 0
            padded = [[fill] * (longest - len(v)) for v in values]
            values = [p + v if left else v + p for v, p in zip(values, padded, strict=True)]
        batch[name] = torch.tensor(values)
    return batch
