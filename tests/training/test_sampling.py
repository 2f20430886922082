"""In which order examples come."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerCallback

from fastdistill import LogitsKD
from fastdistill.training.sampling import LengthGroupedSampler, lengths_of
from tests import tiny
from tests.training.trained import batch, bert_trainer, trainer, vit


def test_batches_hold_similar_lengths_and_every_example_once_an_epoch() -> None:
    lengths = torch.randint(1, 100, (1003,)).tolist()
    sampler = LengthGroupedSampler(lengths, 8, seed=3, epoch=lambda: 0)
    order = list(sampler)
    assert len(sampler) == 1003
    assert sorted(order) == list(range(1003))
    leftover = [list(LengthGroupedSampler(lengths[:11], 8, seed, lambda: 0))[8:] for seed in range(50)]
    assert {i for three in leftover for i in three} == set(range(11))  # any may be left over, not the longest alone
    groups = [[lengths[i] for i in order[at : at + 8]] for at in range(0, 1003, 8)]
    spread = [max(group) - min(group) for group in groups]
    assert sum(spread) / len(spread) < 10  # of a random order: about 78
    assert np.corrcoef([np.mean(group) for group in groups], range(len(groups)))[0, 1] < 0.3  # batches are shuffled


def test_batches_of_any_seed_have_about_the_same_lengths() -> None:
    """So that students with several seeds, side by side, hardly pad each other."""
    lengths = torch.randint(1, 100, (4003,)).tolist()
    orders = [list(LengthGroupedSampler(lengths, 8, seed, epoch=lambda: 2)) for seed in range(5)]
    longest = np.array([[max(lengths[i] for i in order[at : at + 8]) for at in range(0, 4000, 8)] for order in orders])
    assert longest.max(0).sum() < 1.1 * longest.mean(0).sum()  # of lengths in an order of each seed's own: about 1.7


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = list(range(100))
    epoch = [0]

    def order(seed: int) -> list[int]:
        torch.rand(1)  # the global generator does not matter
        return list(LengthGroupedSampler(lengths, 8, seed, lambda: epoch[0]))

    first = order(0)
    assert first == order(0)
    assert first != order(1)
    epoch[0] = 1
    assert first != order(0)


def test_every_epoch_has_its_own_order(tmp_path: Path) -> None:
    orders: list[list[int]] = []

    def note(student: Any, teacher: Any, labels: Tensor | None) -> Tensor:
        orders[-1] += labels.tolist()
        return LogitsKD()(student, teacher, torch.zeros_like(labels))

    class Epochs(TrainerCallback):
        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            orders.append([])

    data = tiny.dataset(40).remove_columns("labels").add_column("labels", list(range(40)))
    bert_trainer(tmp_path, objective=note, train_dataset=data, callbacks=[Epochs()], args_num_train_epochs=2).train()
    assert [sorted(order) for order in orders] == [list(range(40))] * 2
    assert orders[0] != orders[1]


def test_lengths_come_from_the_column_or_the_tokens(tmp_path: Path) -> None:
    data = tiny.dataset(40)
    as_list = [data[i] for i in range(40)]
    orders = [
        list(bert_trainer(tmp_path, train_dataset=dataset)._get_train_sampler())
        for dataset in (data, data.remove_columns("length"), as_list)
    ]
    assert orders[0] == orders[1] == orders[2]


def test_examples_without_lengths_come_in_random_order(tmp_path: Path) -> None:
    pixels = [{"pixel_values": torch.rand(3, 8, 8), "labels": i % 2} for i in range(16)]
    student, teacher = (vit(seed) for seed in (1, 2))
    t = bert_trainer(
        tmp_path, student, teacher_model=teacher, train_dataset=pixels, processing_class=None, args_max_steps=2
    )
    assert math.isfinite(t.train().training_loss)


def test_evaluation_runs_no_teacher_and_keeps_the_order(tmp_path: Path) -> None:
    data = tiny.dataset(30, seed=5)

    def accuracy(evaluated: Any) -> dict[str, float]:
        return {"accuracy": float((evaluated.predictions.argmax(-1) == evaluated.label_ids).mean())}

    t = bert_trainer(tmp_path, eval_dataset=data, compute_metrics=accuracy, args_max_steps=2)
    t.train()
    t.teacher_model.forward = None
    inputs = batch(t, data)
    with torch.no_grad():
        logits = t.model.eval()(**inputs).logits
    found = t.predict(data)
    torch.testing.assert_close(torch.tensor(found.predictions), logits)
    assert found.label_ids.tolist() == data["labels"][:]
    metrics = t.evaluate()
    assert metrics["eval_accuracy"] == pytest.approx((logits.argmax(-1) == inputs["labels"]).float().mean().item())
    # Trainer weighs its batches alike, so compare with a single batch
    t.args.per_device_eval_batch_size = 30
    assert t.evaluate()["eval_loss"] == pytest.approx(F.cross_entropy(logits, inputs["labels"]).item(), rel=1e-5)


class Endless(torch.utils.data.Dataset[dict[str, Any]]):
    """Never raises IndexError, as datasets that make their examples do not."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 8

    def __getitem__(self, place: int) -> dict[str, Any]:
        self.asked.append(place)
        assert len(self.asked) < 100
        return {"input_ids": [5] * (place % 8 + 2), "labels": place % 3}


@pytest.mark.parametrize("read", [False, True])
def test_a_dataset_that_makes_its_examples_is_read_when_asked_only(tmp_path: Path, read: bool) -> None:
    data = Endless()
    args = {"max_steps": 1, "read_lengths": read}
    t = trainer(tmp_path, "BertForSequenceClassification", train_dataset=data, args=args)
    before = len(data.asked)
    order = list(t._get_train_sampler())
    assert sorted(order) == list(range(8))
    assert len(data.asked) - before == (9 if read else 0)
    t.train()


def test_a_transform_is_not_run_for_lengths(tmp_path: Path) -> None:
    asked = []

    def transform(batch: dict[str, Any]) -> dict[str, Any]:
        asked.append(len(batch["length"]))
        return batch

    data = tiny.dataset(8)
    known, unknown = (d.with_transform(transform) for d in (data, data.remove_columns("labels")))
    orders = [lengths_of(d, c) for d, c in ((known, "length"), (unknown, "size"))]
    assert orders == [data["length"][:], None]
    assert asked == []
