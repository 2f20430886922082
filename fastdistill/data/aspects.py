"""Aspect terms in sentences: words, how far each is from the aspect, and batches of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdistill.data.parsing import Parser

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

WORD = r"\w+(?=n't)|n't|'(?:s|m|re|ve|ll|d)\b|\w+|[^\w\s]"
"""A word: letters and digits, or one sign that is neither; "n't", "'s" and their like are apart from what they are
joined to, as in the Penn Treebank, by which GloVe's words are divided, too."""

PADDING, UNKNOWN = "[PAD]", "[UNK]"


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of `WORD`, in lower case, that knows the words of these texts, in sorted order after padding (0) and
    what it does not know (1)."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    lower, split = normalizers.Lowercase(), pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    words = {word for text in texts for word, _ in split.pre_tokenize_str(lower.normalize_str(text))}
    known = [PADDING, UNKNOWN, *sorted(words - {PADDING, UNKNOWN})]
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(known)}, unk_token=UNKNOWN))
    backend.normalizer, backend.pre_tokenizer = lower, split
    names: dict[str, Any] = {"pad_token": PADDING, "unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)  # type: ignore[no-untyped-call]


def measured(dataset: Dataset, tokenizer: PreTrainedTokenizerFast, parser: Parser | None = None) -> Dataset:
    """Of rows of aspects (`load_task`) the words, and how far each is from the aspect.

    The result's columns are `input_ids`, `position_distance`, the words to the aspect's nearest, 0 within it, and with
    a parser `dependency_distance`, the `tree_distances`; `labels`, and `length`, the number of words. An aspect is the
    words that it has a character of.
    """

    from datasets import Dataset

    def measure(row: Mapping[str, Any]) -> dict[str, Any]:
        text, start, end = row["sentence1"], row["start"], row["start"] + len(row["sentence2"])
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        offsets = encoded["offset_mapping"]
        aspect = [place for place, (first, last) in enumerate(offsets) if first < end and last > start]
        found: dict[str, Any] = {
            "input_ids": encoded["input_ids"],
            "position_distance": [float(max(aspect[0] - i, 0, i - aspect[-1])) for i in range(len(offsets))],
            "labels": row["label"],
            "length": len(offsets),
        }
        if parser is not None:
            found["dependency_distance"] = tree_distances(parser(text, offsets), aspect)
        return found

    return Dataset.from_list([measure(row) for row in dataset])  # `map` would hash the parser


def tree_distances(heads: Sequence[int], aspect: Sequence[int]) -> list[float]:
    """How many edges of the dependency tree lie between each word and the aspect's nearest.

    Args:
        heads: of n words, the place of each one's head; a root's is its own.
        aspect: the places of the aspect's words.

    Words of another tree (another sentence) are n / 2 away, as in the published code of PWCN.
    """
    near: list[list[int]] = [[] for _ in heads]
    for word, head in enumerate(heads):
        near[word].append(head)
        near[head].append(word)
    found = dict.fromkeys(aspect, 0.0)
    waiting = deque(aspect)
    while waiting:
        word = waiting.popleft()
        for other in near[word]:
            if other not in found:
                found[other] = found[word] + 1
                waiting.append(other)
    return [found.get(word, len(heads) / 2) for word in range(len(heads))]


class AspectCollator:
    """Makes a batch of `measured` rows: `input_ids` and `attention_mask` ``[B, S]``, the distances ``[B, S]`` in
    float32, padded with 0 on the right, and what else they have."""

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        for name, first in examples[0].items():
            if not isinstance(first, Sequence):
                batch[name] = torch.tensor([one[name] for one in examples])
                continue
            rows = [torch.tensor(one[name]) for one in examples]
            batch[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(one["input_ids"]) for one in examples])
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return batch
