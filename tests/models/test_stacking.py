"""Several models as one: what each says and learns is its own."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.models.first_token import first_token_only
from fastdistill.models.fused_residuals import fused_residuals
from fastdistill.models.sharing import CONFIG_KEY
from fastdistill.models.stacking import STACKABLE, Stack, obstacle_to_stacking
from fastdistill.models.vocabulary import compact_vocabulary
from tests import tiny
from tests.models import known

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def models(kind: str, number: int = 3, **changes: Any) -> list[Any]:
    """In double precision, each with other weights, and without dropout."""
    found = []
    for seed in range(number):
        model = known.model_of(kind, **changes).double().eval()
        torch.manual_seed(seed)
        for weight in model.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
        found.append(model)
    return found


def batches(kind: str, number: int = 3) -> list[dict[str, Tensor]]:
    batch = known.batch_of(kind)
    return [batch | {"input_ids": batch["input_ids"].roll(place, 0)} for place in range(number)]


def side_by_side(some: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in some]) for name in some[0]}


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("as_in_recipes", [False, True])
@pytest.mark.parametrize("kind", STACKABLE)
def test_each_says_and_learns_what_it_does_alone(kind: str, as_in_recipes: bool) -> None:
    """Padding, too, which is in the batches, learns nothing. In recipes embeddings are compact and residuals fused."""
    own, alone, data = models(kind), models(kind), batches(kind)
    weights = torch.tensor([0.01, 1.0, 7.0])  # some are clipped and some are not
    plain = models(kind, 1)[0]
    with ExitStack() as leave:
        if as_in_recipes:
            for model in own + alone:
                leave.enter_context(compact_vocabulary(model, torch.cat([batch["input_ids"] for batch in data])))
        leave.enter_context(first_token_only(*own, *alone))
        stack = Stack(plain, own)
        stack.model.eval()
        if as_in_recipes:
            leave.enter_context(fused_residuals(stack.model))
        leave.enter_context(first_token_only(stack.model))
        logits = stack(**side_by_side(data)).logits.unflatten(0, (3, -1))
        labels = torch.tensor([0, 2, 1])
        losses = torch.stack([F.cross_entropy(one, labels) for one in logits])
        found, norms = stack.gradients((weights * losses).sum(), 1.0)
        of_weights = stack.by_weight(found)
        for place, (model, batch) in enumerate(zip(alone, data, strict=True)):
            expected = model(**batch).logits
            torch.testing.assert_close(logits[place], expected, **EXACT)
            (weights[place] * F.cross_entropy(expected, labels)).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            torch.testing.assert_close(norms[place], norm, **EXACT)
            ours = {name: of_weights.get(weight) for name, weight in own[place].named_parameters()}
            torch.testing.assert_close(ours, gradients(model), **EXACT)
        assert norms.min() < 1 < norms.max()
        assert not any(weight.grad is not None for model in (*own, stack.model) for weight in model.parameters())


def test_what_becomes_of_a_model_is_the_stacks() -> None:
    own, data = models("bert"), batches("bert")
    stack = Stack(models("bert", 1)[0], own)
    stack.model.eval()
    before = stack(**side_by_side(data)).logits
    with torch.no_grad():
        for weight in own[1].parameters():
            weight += 0.5
    after = stack(**side_by_side(data)).logits
    torch.testing.assert_close(after[3:6], own[1](**data[1]).logits, **EXACT)
    assert (before[3:6] - after[3:6]).abs().min() > 1e-3
    assert torch.equal(before[:3], after[:3])


def test_frozen_weights_stay_frozen() -> None:
    own = models("bert")
    for model in own:
        model.get_input_embeddings().requires_grad_(False)
    stack = Stack(models("bert", 1)[0], own)
    found = stack.by_weight(stack.gradients(stack(**side_by_side(batches("bert"))).logits.sum(), 1.0)[0])
    names = [name for name, weight in own[0].named_parameters() if weight not in found]
    assert names == ["bert.embeddings.word_embeddings.weight"]


def test_dropout_draws_for_each() -> None:
    """Of the same models, on the same batch; and from the same generator the same."""
    one = tiny.bert(dropout=0.5)
    batch = tiny.batches((4,))[0]
    del batch["labels"]
    stack = Stack(one, [tiny.bert(dropout=0.5) for _ in range(2)])

    def logits() -> Tensor:
        torch.manual_seed(0)
        found: Tensor = stack(**side_by_side([batch, batch])).logits
        return found

    first, second = logits().chunk(2)
    assert (first - second).abs().max() > 1e-3
    assert torch.equal(torch.cat([first, second]), logits())
    stack.model.eval()
    first, second = logits().chunk(2)
    torch.testing.assert_close(first, second)


def test_what_cannot_be_stacked() -> None:
    assert obstacle_to_stacking(tiny.bert()) is None
    assert "MPNetForSequenceClassification is not known to be stackable" in str(
        obstacle_to_stacking(known.model_of("mpnet"))
    )
    shared = tiny.bert()
    setattr(shared.config, CONFIG_KEY, {"layers": 1, "swap": False})
    assert obstacle_to_stacking(shared) == "its layers share weights"
    other = tiny.bert()
    other.dropout = torch.nn.PReLU()
    assert obstacle_to_stacking(other) == "its dropout is a PReLU with weights of its own"
