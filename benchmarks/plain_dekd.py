"""DeKD as it is written without this package: eager PyTorch, an assistant, and a student that asks both about half of
each batch; in the forms of `plain_stark.Form`."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.plain_stark import Form, distil, fit, loader

TAU, WEIGHTS = 5.0, (0.5, 0.3, 0.2)


def inputs(batch: Any, rows: Tensor | slice = slice(None)) -> dict[str, Tensor]:
    """What a model takes, of these rows."""
    return {name: batch[name][rows] for name in ("input_ids", "token_type_ids", "attention_mask") if name in batch}


@torch.no_grad()
def first_tokens(output: Any) -> Tensor:
    """The [CLS] states, [B, layers, D]."""
    return torch.stack([state[:, 0] for state in output.hidden_states[1:]], 1)


@torch.no_grad()
def stored(data: Any, tokenizer: Any, teacher: Any, assistant: Any) -> tuple[Any, list[Tensor]]:
    """The data with a column "row", and of each row the teacher's logits and states and the assistant's logits."""
    data = data.sort("length")
    found: tuple[list[Tensor], ...] = [], [], []
    for batch in loader(data, tokenizer, False, Form.STORED):
        output = teacher(**inputs(batch), output_hidden_states=True)
        said = output.logits, first_tokens(output), assistant(**inputs(batch)).logits
        for parts, part in zip(found, said, strict=True):
            parts.append(part)
    return data.add_column("row", list(range(len(data)))), [torch.cat(parts) for parts in found]


@torch.no_grad()
def asked(
    teacher: Any, assistant: Any, tables: list[Tensor], batch: Any, kept: Tensor, uncertain: Tensor
) -> list[Tensor]:
    """The teacher's logits and states of the examples that are kept, and the assistant's logits of the uncertain."""
    if tables:
        return [table[batch["row"][rows]] for table, rows in zip(tables, (kept, kept, uncertain), strict=True)]
    output = teacher(**inputs(batch, kept), output_hidden_states=True)
    return [output.logits, first_tokens(output), assistant(**inputs(batch, uncertain)).logits]


def kl(ours: Tensor, theirs: Tensor) -> Tensor:
    return TAU**2 * F.kl_div((ours / TAU).log_softmax(-1), (theirs / TAU).softmax(-1), reduction="batchmean")


def aligned(ours: Tensor, theirs: Tensor) -> Tensor:
    """The student's layers with those of the teacher's whose states have the highest entropy, [B, layers, D] each."""
    spread = theirs.softmax(-1)
    entropy = -(spread * spread.log()).sum(-1).mean(0)
    layers = entropy.topk(ours.shape[1]).indices.sort().values
    apart = F.normalize(ours, dim=-1) - F.normalize(theirs[:, layers], dim=-1)
    return apart.square().sum(-1).mean(0).sum()


def loss(student: Any, teacher: Any, assistant: Any, tables: list[Tensor], batch: Any) -> Tensor:
    output, labels = student(**inputs(batch), output_hidden_states=True), batch["labels"]
    logits = output.logits
    with torch.no_grad():
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        kept = entropy.topk(round(len(labels) / 2)).indices
        uncertain, certain = kept[: len(kept) // 2], kept[len(kept) // 2 :]
    theirs, states, assistants = asked(teacher, assistant, tables, batch, kept, uncertain)
    ta = kl(logits[certain], theirs[len(uncertain) :]) + kl(logits[uncertain], assistants)
    ours = torch.stack([state[kept, 0] for state in output.hidden_states[1:]], 1)
    terms = F.cross_entropy(logits, labels), ta, aligned(ours, states)
    return sum((weight * term for weight, term in zip(WEIGHTS, terms, strict=True)), torch.zeros(()))


def dekd(
    teacher: Any, assistant: Any, student: Any, data: Any, validation: Any, tokenizer: Any, form: Form, **training: Any
) -> float:
    """The student's accuracy; the assistant, like the student, is given as it begins."""
    teacher = copy.deepcopy(teacher).requires_grad_(False).eval()
    evaluated = loader(validation, tokenizer, False, form)
    assistant, _ = distil(assistant, teacher, data, evaluated, tokenizer, form, **training)
    assistant.requires_grad_(False)
    tables: list[Tensor] = []
    if form is Form.STORED:
        data, tables = stored(data, tokenizer, teacher, assistant)

    def of_batch(student: Any, batch: Any) -> Tensor:
        return loss(student, teacher, assistant, tables, batch)

    return fit(student, loader(data, tokenizer, True, form), of_batch, evaluated, **training)[1]
