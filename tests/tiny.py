"""Models, tokenizers and data small enough to train within a test."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from fastdistill.data.tasks import Task
from fastdistill.training.config import DistillationConfig

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"{sound}{end}" for sound in "bdfgklmnprst" for end in ("a", "e", "i", "o", "u")]
LABELS = ("low", "high")
TASK = Task("tiny", ("sentence1",), LABELS, "accuracy", 16)


def tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=32, **dict(zip(names, SPECIAL, strict=True))
    )


def bert(seed: int = 0, *, layers: int = 2, dropout: float = 0.1, **config: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "initializer_range": 0.5,  # far enough from zero that every weight matters to the output
    }
    labels = {} if {"id2label", "num_labels"} & config.keys() else {"num_labels": 2}
    return BertForSequenceClassification(BertConfig(**settings | labels | config))


def rows(number: int, seed: int = 0, *, regression: bool = False) -> list[dict[str, Any]]:
    """Sentences of 1 to 12 words; their label is whether more of the words are of the second half of the list."""
    draw = random.Random(seed)
    half, made = len(WORDS) // 2, []
    for _ in range(number):
        words = draw.choices(range(len(WORDS)), k=draw.randint(1, 12))
        share = sum(word >= half for word in words) / len(words)
        label = share + 0.001 * draw.random() if regression else int(share > 0.5)
        made.append({"sentence1": " ".join(WORDS[word] for word in words), "label": label})
    return made


def dataset(number: int, seed: int = 0, *, regression: bool = False) -> datasets.Dataset:
    """As `fastdistill.tokenize` would give it."""
    made = rows(number, seed, regression=regression)
    encoded = tokenizer()([row["sentence1"] for row in made])
    columns = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    return datasets.Dataset.from_dict(
        columns | {"labels": [row["label"] for row in made], "length": [len(ids) for ids in encoded["input_ids"]]}
    )


def task_folder(path: Path, train: int = 64, validation: int = 24, **options: Any) -> Path:
    path.mkdir(parents=True)
    for split, number, seed in (("train", train, 1), ("validation", validation, 2)):
        lines = (json.dumps(row) + "\n" for row in rows(number, seed, **options))
        (path / f"{split}.jsonl").write_text("".join(lines))
    return path


def model_folder(path: Path, model: Any = None) -> Path:
    (model if model is not None else bert(layers=3)).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def config(folder: Path, **options: Any) -> DistillationConfig:
    """Quiet and on the CPU."""
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "disable_tqdm": True,
        "log_level": "error",
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
    }
    return DistillationConfig(**settings | options)


def image_folder(path: Path, train: int = 24, validation: int = 12, size: int = 8) -> Path:
    """Noisy squares, of which one class is brighter above and the other below."""
    draw = np.random.RandomState(0)
    for split, number in (("train", train), ("validation", validation)):
        for place in range(number):
            label = place % 2
            values = draw.randint(0, 128, (size, size, 3))
            half = slice(size // 2) if label else slice(size // 2, None)
            values[half] += 96
            file = path / split / LABELS[label] / f"{place}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.astype(np.uint8)).save(file)
    return path


def batches(sizes: tuple[int, ...] = (4, 3), classes: int = 2, length: int = 7) -> list[dict[str, torch.Tensor]]:
    """Padded on the right, with labels; of one class, numbers."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for size in sizes:
        ids = torch.randint(5, 65, (size, length), generator=generator)
        mask = (torch.arange(length) < torch.randint(2, length + 1, (size, 1), generator=generator)).long()
        labels = (
            torch.rand(size, generator=generator).double()
            if classes == 1
            else torch.randint(classes, (size,), generator=generator)
        )
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def pair(classes: int = 2) -> tuple[Any, Any]:
    """A teacher and a student, in double precision."""
    teacher = bert(0, layers=2, num_labels=classes).double()
    return teacher, bert(1, layers=1, num_labels=classes).double()
