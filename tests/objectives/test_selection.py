from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding

from fastdistill import DeKD, uncertainty
from fastdistill.objectives.selection import STRATEGIES, Chosen, Strategy, select
from fastdistill.training.each_epoch import SelectEachEpoch, predict
from tests import tiny

# From certain to uncertain: 2, 0, 3, 1
LOGITS = torch.tensor([[3.0, 0.0, 0.0], [0.1, 0.0, 0.2], [9.0, 0.0, 0.0], [1.0, 0.5, 0.0]])


@pytest.mark.parametrize("strategy", ["entropy", "least_confidence", "margin"])
def test_the_least_certain_come_first(strategy: Strategy) -> None:
    assert select(LOGITS, 1.0, strategy).tolist() == [1, 3, 0, 2]
    assert select(LOGITS, 0.5, strategy).tolist() == [1, 3]


def test_strategies_measure_different_things() -> None:
    two_of_many = torch.tensor([0.45, 0.45, 0.05, 0.05]).log()  # no margin, but most classes are ruled out
    one_of_many = torch.tensor([0.4, 0.2, 0.2, 0.2]).log()  # a margin, and no class is
    logits = torch.stack([two_of_many, one_of_many])
    firsts = {
        strategy: select(logits, 0.5, strategy).tolist() for strategy in ("entropy", "margin", "least_confidence")
    }
    assert firsts == {"entropy": [1], "margin": [0], "least_confidence": [1]}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "number, ratio, kept", [(8, 0.5, 4), (8, 0.3, 2), (7, 0.5, 4), (5, 0.5, 2), (8, 1.0, 8), (8, 0.01, 1), (1, 0.5, 1)]
)
def test_how_many_are_kept(strategy: Strategy, number: int, ratio: float, kept: int) -> None:
    indices = select(torch.randn(number, 3), ratio, strategy)
    assert indices.dtype == torch.int64
    assert len(set(indices.tolist())) == len(indices) == kept


def test_random_is_of_all_examples_and_repeats_by_its_generator() -> None:
    def draw(seed: int) -> list[int]:
        return select(torch.zeros(50, 2), 0.2, "random", generator=torch.Generator().manual_seed(seed)).tolist()

    assert draw(1) == draw(1) != draw(2)
    assert set().union(*(draw(seed) for seed in range(60))) == set(range(50))
    torch.manual_seed(0)
    first = select(torch.zeros(50, 2), 0.2, "random").tolist()
    assert select(torch.zeros(50, 2), 0.2, "random").tolist() != first  # the global generator goes on


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ratio": 0.0}, "ratio is 0.0; expected a finite number > 0"),
        ({"ratio": 1.5}, "ratio is 1.5; expected a number > 0 and <= 1"),
        ({"ratio": 1.5, "strategy": "random"}, "ratio is 1.5; expected a number > 0 and <= 1"),
        ({"ratio": 0.5, "strategy": "energy"}, "strategy is 'energy'; expected one of 'entropy', 'least_confidence'"),
    ],
)
def test_a_wrong_selection_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(LOGITS, **options)


# Over the whole data


def test_a_choice_is_looked_up_and_kept() -> None:
    chosen = Chosen()
    with pytest.raises(ValueError, match=r"no examples are chosen yet; give the trainer callbacks"):
        chosen.among(torch.tensor([0]))
    chosen.choose(6, torch.tensor([5, 2]))
    assert chosen.among(torch.tensor([2, 3, 5, 0])).tolist() == [0, 2]
    assert chosen.among(torch.tensor([1])).tolist() == []
    chosen.choose(6, torch.tensor([1]))
    assert chosen.among(torch.tensor([2, 1])).tolist() == [1]
    for number in (6, -1):
        with pytest.raises(ValueError, match=f"example holds {number}; expected numbers from 0 to 5"):
            chosen.among(torch.tensor([2, number]))
    another = Chosen()
    another.load_state_dict(chosen.state_dict())  # whatever its size
    assert another.among(torch.arange(6)).tolist() == [1]


def numbered(number: int, examples: list[int] | None = None) -> Any:
    data = tiny.dataset(number).remove_columns("length")
    return data.add_column("example", list(range(number)) if examples is None else examples)


def collate(rows: list[dict[str, Any]]) -> Any:
    return DataCollatorWithPadding(tiny.tokenizer())(rows)


def test_predictions_are_the_models_in_the_order_of_the_numbers() -> None:
    data, model = numbered(21), tiny.bert(1).train()
    shuffled = data.shuffle(seed=0)
    state = torch.get_rng_state()
    logits = predict(model, shuffled, collate, 4)
    assert torch.equal(torch.get_rng_state(), state)  # whether it was done changes nothing that follows
    assert model.training
    model.eval()
    for i in (0, 7, 20):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([data[i]["input_ids"]])).logits[0]
        torch.testing.assert_close(logits[i], alone)


class Strict(nn.Module):
    """Takes what it names and nothing else, and notes how long its batches are."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.padded = tiny.bert(1), []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        self.padded.append(input_ids.shape[1])
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("known", ["length", "tokens"])
def test_a_model_sees_its_own_columns_in_batches_of_similar_length(known: str) -> None:
    data = tiny.dataset(40).add_column("example", list(range(40)))
    lengths = sorted(data["length"][:], reverse=True)
    if known == "tokens":
        data = data.remove_columns("length")
    stored = data.add_column("teacher_logits", [[0.0, 1.0]] * 40).add_column("teacher_hidden_states", [[[0.0]]] * 40)
    expected = predict(tiny.bert(1), data, collate, 8)
    seen = set()

    def noted(rows: list[dict[str, Any]]) -> Any:
        seen.update(*rows)
        return collate(rows)

    model = Strict()
    torch.testing.assert_close(predict(model, stored, noted, 8, ("teacher_logits", "teacher_hidden_states")), expected)
    assert not [name for name in seen if "teacher" in name]  # nor are they read
    assert model.padded == lengths[::8]
    as_list = [dict(row) for row in stored]
    torch.testing.assert_close(
        predict(Strict(), as_list, collate, 8, ("teacher_logits", "teacher_hidden_states")), expected
    )


@pytest.mark.parametrize("examples", [[0, 1, 2, 2], [1, 2, 3, 4], [0, 1, 2, -1]])
def test_numbers_that_do_not_number_the_examples(examples: list[int]) -> None:
    with pytest.raises(ValueError, match="'example' does not number the examples; expected 0 to 3, once each"):
        predict(tiny.bert(1), numbered(4, examples), collate, 2)


def begin_epoch(objective: DeKD, model: Any, data: Any, epoch: float) -> Tensor:
    """The flags that the callback leaves."""
    loader = SimpleNamespace(dataset=data, collate_fn=collate)
    args = SimpleNamespace(device=torch.device("cpu"), seed=3, per_device_eval_batch_size=8)
    state = SimpleNamespace(epoch=epoch)
    SelectEachEpoch(objective).on_epoch_begin(args, state, None, model=model, train_dataloader=loader)
    return objective.module["chosen"].flags.clone()


def test_each_epoch_has_its_own_choice() -> None:
    data, objective = numbered(20), DeKD(select_per="epoch", ratio=0.3)
    models = tiny.bert(1), tiny.bert(2)
    choices = [begin_epoch(objective, model, data, epoch) for epoch, model in enumerate(models)]
    for model, chosen in zip(models, choices, strict=True):
        expected = uncertainty(predict(model, data, collate, 8)).topk(6).indices
        assert sorted(expected.tolist()) == chosen.nonzero().squeeze(1).tolist()
    assert not torch.equal(*choices)
    assert torch.equal(begin_epoch(objective, models[0], data, 1.5), choices[1])  # resumed within the second


def test_what_teachers_said_is_not_for_the_student() -> None:
    data = numbered(20)
    objective = DeKD(select_per="epoch", assistant=False)
    stored = data.add_column("teacher_logits", [[0.0, 1.0]] * 20)
    chosen = begin_epoch(objective, Strict(), stored, 0)
    assert torch.equal(chosen, begin_epoch(objective, tiny.bert(1), data, 0))


def test_a_random_choice_depends_on_seed_and_epoch_alone() -> None:
    data, objective = numbered(20), DeKD(select_per="epoch", strategy="random")
    first, second = (begin_epoch(objective, None, data, epoch) for epoch in (0, 1))  # no model is asked
    assert first.sum() == second.sum() == 10
    assert not torch.equal(first, second)
    torch.rand(1)
    assert torch.equal(begin_epoch(objective, None, data, 0), first)


def test_only_an_objective_that_selects_per_epoch_does() -> None:
    with pytest.raises(ValueError, match="objective selects per 'batch'; expected select_per='epoch'"):
        SelectEachEpoch(DeKD())
    with pytest.raises(ValueError, match="select_per is 'batch'"):
        DeKD().choose(LOGITS)
