from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from fastdistill import DistillationTrainer, compact_vocabulary, first_layers
from fastdistill.models.vocabulary import CompactEmbedding
from tests import tiny

USED = torch.tensor([[2, 9, 11], [2, 30, 9]])


def train(model: Any, make: Callable[[Any], torch.optim.Optimizer], clip: float | None = None) -> None:
    optimizer = make(model.parameters())
    for step in range(8):
        optimizer.zero_grad()
        model(input_ids=USED, labels=torch.tensor([0, step % 2])).loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def trained_both_ways(make: Callable[[Any], torch.optim.Optimizer], clip: float | None = None) -> tuple[Any, Any]:
    whole = tiny.bert(dropout=0.0)
    compact = copy.deepcopy(whole)
    train(whole, make, clip)
    with compact_vocabulary(compact, USED):
        assert compact.get_input_embeddings().weight.shape[0] == 4 + 1 + 1  # what occurs, padding, and the row of ones
        train(compact, make, clip)
    assert type(compact.get_input_embeddings()) is torch.nn.Embedding
    return whole.state_dict(), compact.state_dict()


def test_without_decay_every_bit_is_as_if_trained_whole() -> None:
    whole, compact = trained_both_ways(lambda weights: torch.optim.AdamW(weights, lr=0.01, weight_decay=0.0))
    assert whole.keys() == compact.keys()
    for name, weight in whole.items():
        assert torch.equal(weight, compact[name]), name


@pytest.mark.parametrize(
    "make",
    [
        lambda weights: torch.optim.AdamW(weights, lr=0.01, weight_decay=0.3),
        lambda weights: torch.optim.AdamW(weights, lr=0.01, weight_decay=0.3, foreach=True),
        lambda weights: torch.optim.SGD(weights, lr=0.01, weight_decay=0.3, momentum=0.9),
    ],
    ids=["AdamW", "AdamW, foreach", "SGD"],
)
def test_with_decay_and_clipping_it_is_so_within_rounding(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    whole, compact = trained_both_ways(make, clip=1.0)
    for name, weight in whole.items():
        torch.testing.assert_close(compact[name], weight, rtol=1e-5, atol=1e-6)
    absent = "bert.embeddings.word_embeddings.weight"
    assert not torch.allclose(compact[absent][40], tiny.bert().state_dict()[absent][40], rtol=1e-3), "no decay"


def test_a_frozen_embedding_stays_as_it_was() -> None:
    model = tiny.bert()
    model.get_input_embeddings().requires_grad_(False)
    before = model.get_input_embeddings().weight.clone()
    with compact_vocabulary(model, USED):
        train(model, lambda weights: torch.optim.AdamW(weights, lr=0.01, weight_decay=0.3))
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert not model.get_input_embeddings().weight.requires_grad


def test_with_the_trainer_and_a_checkpoint(tmp_path: Path) -> None:
    """Killed after the first epoch and resumed: the row of ones is in the checkpoint."""
    data = tiny.dataset(24)
    used = torch.tensor([token for ids in data["input_ids"] for token in ids])

    def run(model: Any, **options: Any) -> DistillationTrainer:
        chosen = {"num_train_epochs": 2, "weight_decay": 0.1, "save_strategy": "epoch", "warmup_steps": 0}
        args = tiny.config(tmp_path / options.pop("folder"), **chosen | options)
        return DistillationTrainer(
            model=model, args=args, teacher_model=tiny.bert(1), train_dataset=data, processing_class=tiny.tokenizer()
        )

    whole, compact, resumed = (tiny.bert(dropout=0.0) for _ in range(3))
    run(whole, folder="whole").train()
    with compact_vocabulary(compact, used):
        run(compact, folder="compact").train()
    with compact_vocabulary(resumed, used):
        run(resumed, folder="again").train(resume_from_checkpoint=str(tmp_path / "compact" / "checkpoint-3"))
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(compact.state_dict()[name], weight, rtol=1e-4, atol=1e-5, msg=name)
        assert torch.equal(resumed.state_dict()[name], compact.state_dict()[name]), name


def test_what_other_tokens_were_trained_in_is_not_loaded() -> None:
    model, other = tiny.bert(), tiny.bert()
    with compact_vocabulary(model, USED):
        state = model.state_dict()
    with compact_vocabulary(other, USED + 1), pytest.raises(ValueError, match="tokens are .* expected the same"):
        other.load_state_dict(state)


def test_other_tokens_are_an_error_and_the_embedding_comes_back() -> None:
    model = tiny.bert()
    before = model.get_input_embeddings()
    with pytest.raises(IndexError), compact_vocabulary(model, USED):
        model(input_ids=torch.tensor([[2, 31]]))
    assert model.get_input_embeddings() is before
    with compact_vocabulary(model, USED), pytest.raises(IndexError):
        model(input_ids=torch.tensor([[2, -1]]))


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.tensor([1.0]), TypeError, "tokens has dtype torch.float32"),
        ([1, 2], TypeError, "tokens is a list"),
        (torch.tensor([], dtype=torch.long), ValueError, "tokens are from None"),
        (torch.tensor([65]), ValueError, "tokens are from 65 to 65; expected some, from 0 to 64"),
        (torch.tensor([-1]), ValueError, "tokens are from -1"),
    ],
)
def test_wrong_tokens(tokens: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), compact_vocabulary(tiny.bert(), tokens):
        pass


def test_models_that_it_does_not_take() -> None:
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tied = BertForMaskedLM(BertConfig(**sizes, intermediate_size=16))
    told = r"word_embeddings.weight and .*decoder.weight; expected.* not tied"
    with pytest.raises(ValueError, match=told), compact_vocabulary(tied, USED):
        pass
    model = tiny.bert()
    with compact_vocabulary(model, USED):
        assert isinstance(model.get_input_embeddings(), CompactEmbedding)
        twice = pytest.raises(ValueError, match="CompactEmbedding as its input embedding")
        with twice, compact_vocabulary(model, USED):
            pass
        with pytest.raises(ValueError, match="within fastdistill.compact_vocabulary"):
            first_layers(model, 1)
