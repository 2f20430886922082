"""Metrics of tokens, of answers in a text, and of generated texts, in the form that `compute_metrics` takes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdistill.models.heads import IGNORED

if TYPE_CHECKING:
    from transformers import EvalPrediction, PreTrainedTokenizerBase

Compute = Callable[["EvalPrediction"], dict[str, float]]


def entity_metrics(label_names: Sequence[str]) -> Compute:
    """Precision, recall and F1 of whole entities, as seqeval's default (that of conlleval): an entity is right where
    its kind, first and last token are. And the accuracy of tokens.

    Args:
        label_names: of the classes in their order: "O", "B-PER", "I-PER", ...; also with E- and S-.

    Predictions are logits ``[N, S, C]``, labels ``[N, S]``; tokens whose label is -100 are left out before all else.
    """
    names = list(label_names)
    for name in names:
        if name != "O" and not re.fullmatch(r"[BIES]-.+", name):
            raise ValueError(f"label_names has {name!r}; expected 'O', or a kind after 'B-', 'I-', 'E-' or 'S-'")

    def compute(evaluated: EvalPrediction) -> dict[str, float]:
        labels, logits = np.asarray(evaluated.label_ids), _first(evaluated.predictions)
        if logits.ndim != 3 or logits.shape[:2] != labels.shape or logits.shape[2] != len(names):
            shape = [*labels.shape, len(names)]
            raise ValueError(f"predictions has shape {list(logits.shape)}; expected {shape}, as labels has")
        right = said = there = 0
        for truth, guess in zip(labels, logits.argmax(-1), strict=True):
            kept = truth != IGNORED
            found = set(_entities([names[place] for place in guess[kept]]))
            wanted = set(_entities([names[place] for place in truth[kept]]))
            right, said, there = right + len(found & wanted), said + len(found), there + len(wanted)
        kept = labels != IGNORED
        return {
            "precision": right / said if said else 0.0,
            "recall": right / there if there else 0.0,
            "f1": 2 * right / (said + there) if said + there else 0.0,
            "accuracy": float((logits.argmax(-1) == labels)[kept].mean()) if kept.any() else 0.0,
        }

    return compute


def _entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Kind, first and last place of each."""
    before, kind, start = "O", "", 0
    for place, tag in enumerate([*tags, "O"]):
        now, _, its = tag.partition("-")
        changed = its != kind
        if before != "O" and (before in "ES" or now in "BSO" or changed):
            yield kind, start, place - 1
        if now != "O" and (now in "BS" or before in "ESO" or changed):
            start = place
        before, kind = now, its


def answer_metrics(max_tokens: int = 30) -> Compute:
    """Of extractive question answering: how often the answer's tokens are exactly right, and the F1 of the tokens.

    Predictions are start and end logits ``[N, S]``, of which the best span is taken that does not end before it
    begins and has at most `max_tokens`; labels are start and end positions ``[N]``. Those beyond S do not count.
    """

    def compute(evaluated: EvalPrediction) -> dict[str, float]:
        start_logits, end_logits = (np.asarray(one) for one in evaluated.predictions[:2])
        starts, ends = (np.asarray(one).reshape(-1) for one in evaluated.label_ids)
        tokens = start_logits.shape[1]
        distance = np.arange(tokens)[None, :] - np.arange(tokens)[:, None]
        allowed = (distance >= 0) & (distance < max_tokens)
        exact, f1 = [], []
        for first, last, start, end in zip(start_logits, end_logits, starts, ends, strict=True):
            if not 0 <= start < tokens or not 0 <= end < tokens:
                continue
            scores = np.where(allowed, first[:, None] + last[None, :], -np.inf)
            s, e = np.unravel_index(int(scores.argmax()), scores.shape)
            common = max(0, min(e, end) - max(s, start) + 1)
            exact.append(s == start and e == end)
            f1.append(2 * common / ((e - s + 1) + max(end - start + 1, 0)))
        return {"exact_match": float(np.mean(exact or [0.0])), "f1": float(np.mean(f1 or [0.0]))}

    return compute


def text_metrics(tokenizer: PreTrainedTokenizerBase) -> Compute:
    """Of generated texts (``predict_with_generate``): how often they are exactly right, the F1 of their words (as
    SQuAD's), and ROUGE-L's F1 (Lin 2004: the longest common subsequence of words).

    Predictions and labels are token ids ``[N, T]``, -100 for padding; words are lower-case letters and digits.
    """

    def texts(ids: Any) -> list[str]:
        rows = np.asarray(ids)
        if rows.ndim != 2:
            raise ValueError(
                f"predictions has shape {list(rows.shape)}; expected token ids [N, T]: predict_with_generate"
            )
        padding = tokenizer.pad_token_id
        kept = [[int(one) for one in row if one not in (IGNORED, padding)] for row in rows]
        return [str(text).strip() for text in tokenizer.batch_decode(kept, skip_special_tokens=True)]

    def compute(evaluated: EvalPrediction) -> dict[str, float]:
        pairs = list(zip(texts(_first(evaluated.predictions)), texts(evaluated.label_ids), strict=True))
        words = [tuple(re.findall(r"\w+", text.lower()) for text in pair) for pair in pairs]
        return {
            "exact_match": float(np.mean([a == b for a, b in pairs])),
            "f1": float(np.mean([_f1(sum((Counter(a) & Counter(b)).values()), a, b) for a, b in words])),
            "rouge_l": float(np.mean([_f1(_common_subsequence(a, b), a, b) for a, b in words])),
        }

    return compute


def _f1(common: int, ours: Sequence[str], theirs: Sequence[str]) -> float:
    """Of two texts without words it is 1."""
    return 2 * common / (len(ours) + len(theirs)) if ours or theirs else 1.0


def _common_subsequence(ours: Sequence[str], theirs: Sequence[str]) -> int:
    lengths = [0] * (len(theirs) + 1)
    for word in ours:
        diagonal = 0
        for place, other in enumerate(theirs, 1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if word == other else max(above, lengths[place - 1])
            diagonal = above
    return lengths[-1]


def _first(predictions: Any) -> np.ndarray[Any, np.dtype[Any]]:
    return np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)
