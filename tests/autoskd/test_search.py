"""AutoSKDBERT's search; tests/recipes/test_autoskd.py has the command."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from transformers import (
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    default_data_collator,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from fastdistill import cuda_graphs
from fastdistill.autoskd import search as autoskd
from fastdistill.autoskd.search import Found
from fastdistill.autoskd.settings import METHODS, Settings
from fastdistill.training import padding
from tests import searches, tiny
from tests.rerun import Rerun
from tests.searches import NAMES, SETTINGS, N, data, search

EXACT = {"rtol": 0.0, "atol": 0.0}


@pytest.mark.parametrize("method, order", [*itertools.product(METHODS, (1, 2))])
def test_a_search(method: Any, order: int) -> None:
    student = tiny.bert(layers=1)
    before = torch.get_rng_state()
    found = search(student=student, settings=replace(SETTINGS, method=method, order=order))
    assert torch.equal(torch.get_rng_state(), before)
    assert found.theta.shape == (16, N)  # 20 examples, 3 batches, 5 epochs
    assert found.selected_at == 8
    torch.testing.assert_close(found.theta.sum(1), torch.ones(16, dtype=torch.float64))
    assert (found.theta >= 0).all()
    assert found.theta[0].tolist() == [1 / 3] * 3
    assert (found.theta[:8] > 0).all()
    dropped = found.theta[8] == 0
    assert dropped.sum() == 1
    assert ((found.theta[8:] == 0) == dropped).all()
    torch.testing.assert_close(found.candidates, found.theta[[10, 13, 15]], **EXACT)
    moved = (found.theta[1:8].diff(dim=0).abs() > 0).all(1)
    assert moved.any(0).all()


def test_sswo_moves_the_sampled_weight_alone() -> None:
    """But for the division by the sum, which leaves the others' ratio as it was."""
    found = search(replace(SETTINGS, theta_optimizer="adam", theta_baseline=False))
    for before, after in itertools.pairwise(found.theta[:8]):
        ratio = after / before
        pairs = [torch.isclose(ratio[i], ratio[j], rtol=1e-12) for i, j in itertools.combinations(range(N), 2)]
        assert sum(map(bool, pairs)) == 1


# A team whose quality is known


class Linear(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.out = torch.nn.Linear(16, 2)
        self.post_init()

    def forward(self, features: Any = None) -> Any:
        return SequenceClassifierOutput(logits=self.out(features))


ACCURACY = torch.tensor([1.0, 0.85, 0.7, 0.5])


def known_team(seed: int, number: int = 1280) -> datasets.Dataset:
    """Classes that a linear model can tell, and teachers who are right independently, that often."""
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(number, 16, generator=draw)
    labels = (features[:, :4].sum(1) > 0).long()
    columns: dict[str, Any] = {"features": features.tolist(), "labels": labels.tolist()}
    for name, accuracy in zip("abcd", ACCURACY, strict=True):
        said = torch.where(torch.rand(number, generator=draw) < accuracy, labels, 1 - labels)
        sure = 2 + 0.6 * torch.randn(number, 1, generator=draw).abs()
        columns[f"{name}_logits"] = (sure * (2 * torch.nn.functional.one_hot(said, 2) - 1)).tolist()
    return datasets.Dataset.from_dict(columns)


def correlations(**options: Any) -> Tensor:
    """Of theta after 30 steps with the draws and with the teachers' accuracy, the means of eight seeds."""
    found = []
    for seed in range(8):
        torch.manual_seed(seed)
        student = Linear(PretrainedConfig(num_labels=2))
        asked = Settings(candidates=1, epochs=3, learning_rate=5e-2, seed=seed, **options)
        one = autoskd.search(student, known_team(seed), tuple("abcd"), asked, collate=default_data_collator)
        found.append([one.correlation(one.draw_counts()), one.correlation(ACCURACY)])
    return torch.tensor(found).nanmean(0)


@pytest.mark.slow
def test_theta_follows_the_teachers_and_not_the_draws() -> None:
    """By default; in so few steps the paper's way, which is there by its name, does not tell them apart as well."""
    draws, accuracy = correlations()
    assert accuracy > 0.85
    assert draws < 0.4
    _, as_printed = correlations(theta_optimizer="adam", theta_learning_rate=1e-3, theta_baseline=False)
    assert as_printed < accuracy - 0.15


def test_what_is_subtracted_is_the_teams_mean() -> None:
    """Of what each teacher's gradient was when it was last sampled: step by step, with plain gradient descent."""
    asked = replace(SETTINGS, drop=0, theta_optimizer="sgd", theta_learning_rate=0.1)
    collate = DataCollatorWithPadding(tiny.tokenizer())
    state = autoskd._Search(tiny.bert(layers=1), data(), NAMES, asked, collate, False, [])
    last: dict[int, float] = {}
    for _ in range(8):
        state.step()
        place = state.drawn[-1]
        last[place] = float(state.slopes[place])
        before, after = state.history[-2:]
        moved = before.clone()
        moved[place] -= 0.1 * (last[place] - sum(last.values()) / len(last))
        torch.testing.assert_close(after, moved / moved.sum(), rtol=1e-9, atol=1e-12)


def test_batches_are_those_of_either_half() -> None:
    collate = DataCollatorWithPadding(tiny.tokenizer())
    whole = autoskd._Search(tiny.bert(layers=1), data(), NAMES, SETTINGS, collate, False, [])
    seen = [[half.rows(step) for step in range(3)] for half in whole.halves]
    train, validation = (sorted(itertools.chain(*rows)) for rows in seen)
    assert len(train) == len(validation) == 20
    assert sorted(train + validation) == list(range(40))
    assert whole.halves[0].rows(4) != seen[0][1]  # another order in another epoch
    batch = whole._batch(whole.halves[0])
    rows = whole.halves[0].rows(0)
    expected = torch.tensor([[data()[f"{name}_logits"][row] for name in NAMES] for row in rows])
    torch.testing.assert_close(batch.team, expected)


SGD: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.9, "lr_scheduler_type": "cosine", "warmup": 0.0}


@pytest.mark.parametrize("options", [{}, SGD])
@pytest.mark.parametrize("tokens", [None, torch.arange(65)[1:]], ids=["all tokens", "some"])
def test_a_cut_off_search_goes_on_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], tokens: Tensor | None
) -> None:
    settings = replace(SETTINGS, **options)
    search = functools.partial(searches.search, tokens=tokens)
    whole, file, step = search(settings), tmp_path / "search.safetensors", autoskd._Search.step
    done: list[int] = []
    stops = [5, 14]  # before the selection, and after it

    def cut(self: Any) -> None:
        if stops and self.done == stops[0]:
            raise KeyboardInterrupt(stops.pop(0))
        done.append(self.done)
        step(self)

    monkeypatch.setattr(autoskd._Search, "step", cut)
    while stops:
        with pytest.raises(KeyboardInterrupt):
            search(settings, checkpoint=file, checkpoints=4)
    again = search(settings, checkpoint=file, checkpoints=4)
    torch.testing.assert_close(again.theta, whole.theta, **EXACT)
    torch.testing.assert_close(again.candidates, whole.candidates, **EXACT)
    assert done == [*range(5), *range(3, 14), *range(12, 15)]
    other = search(replace(settings, seed=1), checkpoint=file)
    assert done[-15:] == list(range(15))  # of other settings: begun anew
    assert not torch.equal(other.theta, whole.theta)
    file.write_bytes(b"x")
    with pytest.raises(ValueError, match="damaged"):
        search(settings, checkpoint=file)


@pytest.mark.parametrize("method, order", [*itertools.product(METHODS, (1, 2))])
def test_by_graphs(
    method: Any, order: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same numbers of dropout: batches as long as without graphs. By plain descent, as Adam makes steps of
    gradients that are nothing but rounding."""
    graphs = Rerun()
    monkeypatch.setattr(cuda_graphs, "capturing", lambda device: graphs)
    monkeypatch.setattr(padding, "MULTIPLE", 1)
    settings = replace(SETTINGS, method=method, order=order, epochs=12, optimizer="sgd", learning_rate=0.05)
    whole = search(settings)
    assert not graphs.replayed
    found = search(settings, cuda_graphs=True)
    assert graphs.replayed >= 8
    assert "no CUDA graphs" not in capsys.readouterr().err
    torch.testing.assert_close(found.theta, whole.theta, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method, order", [*itertools.product(METHODS, (1, 2))])
def test_embeddings_of_other_tokens_do_not_matter(method: Any, order: int, tmp_path: Path) -> None:
    """Though a large weight decay moves them, and Adam by as much as those that are learned."""
    settings = replace(SETTINGS, method=method, order=order, weight_decay=0.5)
    student = tiny.bert(layers=1, vocab_size=100)
    whole = search(settings, student, checkpoint=tmp_path / "state")
    tokens = torch.arange(65)
    found = search(settings, student, tokens=tokens, checkpoint=tmp_path / "state")  # which is of another search
    torch.testing.assert_close(found.theta, whole.theta, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="tokens are from 0 to 1000"):
        search(settings, student, tokens=torch.tensor([0, 1000]))


@pytest.mark.parametrize(
    "options, rates",
    [
        ({}, [1.0, 1.0, 8 / 9, 5 / 9, 1 / 9]),
        ({"lr_scheduler_type": "cosine", "warmup": 0.0}, [1.0, 0.97553, 0.90451, 0.5, 0.02447]),
        ({"lr_scheduler_type": "constant", "warmup": 2.0}, [0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_students_rate(options: dict[str, Any], rates: list[float]) -> None:
    """Of ten steps the first three, the sixth and the last; linear, it rises over a tenth of them."""
    settings = Settings(learning_rate=2.0, **options)
    assert [settings.rate(step, 10) / 2 for step in (0, 1, 2, 5, 9)] == pytest.approx(rates, abs=1e-4)


def test_what_was_found_is_kept(tmp_path: Path) -> None:
    found = search()
    found.save(tmp_path / "found.safetensors")
    again = Found.load(tmp_path / "found.safetensors")
    assert (again.names, again.selected_at) == (NAMES, 8)
    torch.testing.assert_close(again.theta, found.theta, **EXACT)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "softmax"}, "method is 'softmax'"),
        ({"order": 3}, "order is 3"),
        ({"order": 1, "look_ahead": 0.1}, "order 1 does not look ahead"),
        ({"drop": 3}, "drop is 3; expected fewer than the 3 teachers"),
        ({"candidates": 8}, "phase 2 has 7 of the 15 steps"),
        ({"epochs": 0}, "epochs is 0"),
        ({"theta_optimizer": "lion"}, "theta_optimizer is 'lion'"),
        ({"optimizer": "lion"}, "optimizer is 'lion'"),
        ({"lr_scheduler_type": "step"}, "lr_scheduler_type is 'step'"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"theta_learning_rate": -1.0}, "theta_learning_rate is -1.0"),
    ],
)
def test_what_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(replace(SETTINGS, **change))
    with pytest.raises(ValueError, match="no column 'd_logits'"):
        autoskd.search(tiny.bert(layers=1), data(), ("a", "d"), SETTINGS, collate=DataCollatorWithPadding(None))


@pytest.mark.parametrize("checkpoints", [-1, 1.5, True])
def test_checkpoints_are_a_number(checkpoints: Any) -> None:
    with pytest.raises(ValueError, match=f"checkpoints is {checkpoints}; expected an integer of at least 0"):
        search(checkpoints=checkpoints)
    search(checkpoints=0)


@pytest.mark.parametrize(
    "logits, message",
    [
        ([[0.0, float("nan")]] * 40, "dataset has NaN or infinity in 'd_logits', row 0; expected finite numbers"),
        ([[0.0, float("-inf")]] * 40, "dataset has NaN or infinity in 'd_logits'"),
        ([[0.0, 1.0, 2.0]] * 40, r"dataset has 'd_logits' of shape \[40, 3\]; expected \[N, 2\], as student's"),
        ([0.0] * 40, r"dataset has 'd_logits' of shape \[40\]"),
    ],
)
def test_logits_that_cannot_be(logits: Any, message: str) -> None:
    dataset, collate = data().add_column("d_logits", logits), DataCollatorWithPadding(tiny.tokenizer())
    with pytest.raises(ValueError, match=message):
        autoskd.search(tiny.bert(layers=1), dataset, ("a", "d"), SETTINGS, collate=collate)


def test_images_and_batch_norm() -> None:
    """Nothing in a search is of text: a ResNet learns from stored logits, with theta's gradient through its step."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    pixels, logits = torch.randn(24, 3, 8, 8), torch.randn(N, 24, 3)
    columns = {f"{name}_logits": said.tolist() for name, said in zip(NAMES, logits, strict=True)}
    images = datasets.Dataset.from_dict({"pixel_values": pixels.tolist(), "labels": [0, 1, 2] * 8} | columns)
    settings = replace(SETTINGS, method="cr", candidates=2, batch_size=4, epochs=2)
    student = ResNetForImageClassification(config)
    found = autoskd.search(student, images, NAMES, settings, collate=default_data_collator)
    torch.testing.assert_close(found.theta.sum(1), torch.ones(7, dtype=torch.float64))
    assert (found.theta[-1] == 0).sum() == 1
