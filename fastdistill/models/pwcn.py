"""Aspect-level sentiment: the proximity-weighted convolution network, its variants and the LSTMs beside it."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from fastdistill.data.tasks import Task
from fastdistill.models.proximity_conv import proximity_conv

Form = Literal["paper", "released"]
Variant = Literal[
    "lstm",
    "att-lstm",
    "pwcn-pos",
    "att-pwcn-pos",
    "point-pwcn-pos",
    "pwcn-dep",
    "att-pwcn-dep",
    "point-pwcn-dep",
]


class PWCNConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Of a `PWCNForSequenceClassification`.

    Args:
        variant: its name, as "att-pwcn-pos".
        vocab_size, embedding_size: of the word vectors.
        hidden_size: of the LSTM in each direction.
        form: of `proximity`.
        dropout: of the word vectors.
        trains_vectors: whether they learn.
    """

    model_type = "pwcn"
    variant: Variant = "pwcn-pos"
    vocab_size: int = 2
    embedding_size: int = 300
    hidden_size: int = 300
    form: Form = "paper"
    dropout: float = 0.3
    trains_vectors: bool = False


class PWCNForSequenceClassification(PreTrainedModel):
    r"""PWCN (Zhang, Li and Song 2019, "Syntax-Aware Aspect-Level Sentiment Classification with Proximity-Weighted
    Convolution Network") and what it is compared with.

    With :math:`h_i` the states of a bidirectional LSTM over the word vectors, :math:`p_i` the `proximity` by
    position ("-pos") or dependency tree ("-dep"), :math:`\bar a` the mean of the aspect's states,
    :math:`\alpha = \mathrm{softmax}_i(h_i^\top U \bar a)`, and a linear layer to the logits behind all:

    * ``pwcn``: :math:`\mathrm{relu}(\max_i (W * r)_i + b)`, :math:`r_i = p_i h_i`, W over three words;
    * ``att-pwcn``: the same with :math:`r_i = p_i \alpha_i h_i`; ``point-pwcn``: W over one word;
    * ``att-lstm``: :math:`\sum_i \alpha_i h_i`;
    * ``lstm``: the last state of an LSTM in one direction, which knows nothing of the aspect.

    ``model(input_ids, attention_mask, position_distance, dependency_distance=None, labels=None)``, each ``[B, S]``,
    padded on the right; with labels ``[B]`` the loss is cross-entropy. Padding changes nothing.
    """

    config_class = PWCNConfig
    config: PWCNConfig

    def __init__(self, config: PWCNConfig) -> None:
        super().__init__(config)
        if config.variant not in get_args(Variant):
            raise ValueError(f"variant is {config.variant!r}; expected one of {', '.join(get_args(Variant))}")
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        self.embeddings.weight.requires_grad_(config.trains_vectors)
        self.dropout = nn.Dropout(config.dropout)
        self.forwards = nn.LSTM(config.embedding_size, config.hidden_size, batch_first=True)
        size = config.hidden_size
        if config.variant != "lstm":
            self.backwards = nn.LSTM(config.embedding_size, config.hidden_size, batch_first=True)
            size *= 2
        if config.variant.startswith("att-"):
            self.attention = nn.Linear(size, size, bias=False)
        if "pwcn" in config.variant:
            width = 1 if config.variant.startswith("point-") else 3
            self.convolution = nn.Conv1d(size, size, width)  # its weights: the operator pads
        self.classifier = nn.Linear(size, len(config.id2label or ()))
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own."""
        if isinstance(module, nn.LSTM | nn.Linear | nn.Conv1d | nn.Embedding):
            module.reset_parameters()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_distance: Tensor | None = None,
        dependency_distance: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        features = self._features(input_ids, mask != 0, position_distance, dependency_distance)
        logits = self.classifier(features)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _features(
        self, input_ids: Tensor, mask: Tensor, position_distance: Tensor | None, dependency_distance: Tensor | None
    ) -> Tensor:
        variant = self.config.variant
        vectors = self.embeddings(input_ids)
        if not self.config.trains_vectors:
            vectors = vectors.detach()  # from_pretrained forgets that they need no gradient
        vectors = self.dropout(vectors)
        if variant == "lstm":
            last = mask.sum(1) - 1
            states: Tensor = self.forwards(vectors)[0]
            return states[torch.arange(len(states), device=states.device), last]
        states = self._states(vectors, mask)
        by_tree = variant.endswith("-dep")
        distance = dependency_distance if by_tree else position_distance
        if distance is None or position_distance is None:
            missing = "position_distance" if position_distance is None else "dependency_distance"
            raise ValueError(f"{missing} is None; expected the words' distances from the aspect, for {variant}")
        aspect = position_distance == 0
        if variant == "att-lstm":
            return (states * self._attention(states, mask, aspect).unsqueeze(2)).sum(1)
        weights = proximity(distance, mask, aspect, self.config.form).to(states.dtype)
        if variant.startswith("att-"):
            weights = weights * self._attention(states, mask, aspect)
        weight, bias = self.convolution.weight, self.convolution.bias
        return F.relu(proximity_conv(states, weights, weight, bias, attention_mask=mask))

    def _states(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """``[B, S, 2 H]``, 0 at padding. The words are turned round in their places, and not packed, for which lengths
        would have to be known outside the device."""
        places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        turned = torch.where(mask, mask.sum(1, keepdim=True) - 1 - places, places)

        def turn(values: Tensor) -> Tensor:
            return values.gather(1, turned.unsqueeze(2).expand_as(values))

        both = torch.cat([self.forwards(vectors)[0], turn(self.backwards(turn(vectors))[0])], 2)
        return both * mask.unsqueeze(2)

    def _attention(self, states: Tensor, mask: Tensor, aspect: Tensor) -> Tensor:
        """``[B, S]``, the sum 1, 0 at padding."""
        inside = (aspect & mask).to(states.dtype)
        mean = (states * inside.unsqueeze(2)).sum(1) / inside.sum(1, keepdim=True)
        scores: Tensor = (states @ self.attention(mean).unsqueeze(2)).squeeze(2)
        return scores.masked_fill(~mask, -torch.inf).softmax(1)


def proximity(distance: Tensor, mask: Tensor, aspect: Tensor, form: Form = "paper") -> Tensor:
    """How near each word is to the aspect, from 1 to 0; 0 at padding.

    Args:
        distance: d ``[B, S]``, 0 for the aspect's words.
        mask, aspect: ``[B, S]``, true for words, and for those of the aspect.
        form: "paper" for 1 - d / n, n the number of words; "released", as in the published code, where n is that of the
            words outside the aspect, and the aspect's own have 0.
    """
    counted = mask if form == "paper" else mask & ~aspect
    near: Tensor = 1 - distance / counted.sum(1, keepdim=True).clamp(min=1)
    return near.clamp(min=0) * counted


def aspect_classifier(task: Task, vectors: Tensor, *, seed: int = 0, **config: Any) -> PWCNForSequenceClassification:
    """A classifier of the task's labels with these word vectors ``[V, E]``, other weights drawn from `seed`, and the
    rest of its config."""
    assert task.label_names is not None
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(task.label_names)),
        "label2id": {label: place for place, label in enumerate(task.label_names)},
    }
    size, width = vectors.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PWCNForSequenceClassification(PWCNConfig(vocab_size=size, embedding_size=width, **labels, **config))
    with torch.no_grad():
        model.embeddings.weight.copy_(vectors)
    return model


AutoConfig.register(PWCNConfig.model_type, PWCNConfig, exist_ok=True)
AutoModelForSequenceClassification.register(PWCNConfig, PWCNForSequenceClassification, exist_ok=True)
