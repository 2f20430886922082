from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DataCollatorWithPadding

from fastdistill import PKD, DistillationTrainer, LogitsKD, WeightedSum
from fastdistill.models import packed
from fastdistill.teachers import store as stored
from tests import encoders, tiny
from tests.parallel import launched
from tests.processes import start
from tests.teachers.storing import COLLATE, ROWS, keep


@pytest.fixture(autouse=True)
def two_batches_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of batches of 4 examples, ROWS then have 6, in 3 files."""
    monkeypatch.setattr(stored, "POOL", 2)


@pytest.fixture
def calls() -> Iterator[Callable[[Any], list[int]]]:
    """Gives a list of how many examples each call of a model has had from now on."""
    hooks = []

    def watch(model: Any) -> list[int]:
        seen: list[int] = []
        hooks.append(
            model.register_forward_pre_hook(
                lambda module, args, inputs: seen.append(len(inputs[module.main_input_name])), with_kwargs=True
            )
        )
        return seen

    yield watch
    for hook in hooks:
        hook.remove()


def said(model: Any, row: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = (torch.tensor([row[name]]) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        outputs = model.eval()(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    return outputs.logits[0], torch.stack([layer[0, 0] for layer in outputs.hidden_states])


# What is stored


def test_each_example_has_what_the_teacher_says_to_it(tmp_path: Path) -> None:
    data, model = tiny.dataset(ROWS), tiny.bert(2, layers=3)
    found = keep(tmp_path, data, model, hidden_states=True)
    assert found.column_names == [*data.column_names, "teacher_logits", "teacher_hidden_states"]
    fixed = datasets.List(datasets.Value("float32"), length=16)
    assert found.features["teacher_logits"] == datasets.List(datasets.Value("float32"), length=2)
    assert found.features["teacher_hidden_states"] == datasets.List(fixed, length=4)
    assert found.remove_columns(["teacher_logits", "teacher_hidden_states"])[:] == data[:]
    shuffled = found.shuffle(seed=3).select(range(3, 15))
    for rows in (found, shuffled):
        for row in rows:
            logits, states = said(model, row)
            torch.testing.assert_close(torch.tensor(row["teacher_logits"]), logits)
            torch.testing.assert_close(torch.tensor(row["teacher_hidden_states"]), states, rtol=1e-4, atol=1e-5)


def test_much_padding_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = tiny.dataset(ROWS), tiny.bert(2, layers=3)
    times, inner = [], packed.packed
    monkeypatch.setattr(packed, "packed", lambda *given: times.append(given) or inner(*given))
    found = keep(tmp_path, data, model, batch_size=ROWS)
    assert times
    for row in found:
        torch.testing.assert_close(torch.tensor(row["teacher_logits"]), said(model, row)[0])


def test_batches_hold_examples_of_similar_length_the_longest_first(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    def collate(examples: list[dict[str, Any]]) -> Any:
        assert all(example.keys() == {"input_ids", "attention_mask"} for example in examples)
        seen.append([len(example["input_ids"]) for example in examples])
        return COLLATE(examples)

    keep(tmp_path, collate=collate)
    first_file = sum(seen[2:4], [])  # before it the batch that the collator is known by, and one example
    assert first_file == sorted(tiny.dataset(ROWS)["length"][:8], reverse=True)
    assert [len(batch) for batch in seen] == [4, 1, 4, 4, 4, 4, 4, 2]


def test_a_selection_of_a_formatted_dataset_from_disk(tmp_path: Path) -> None:
    tiny.dataset(2 * ROWS).save_to_disk(tmp_path / "data")
    whole = datasets.load_from_disk(tmp_path / "data").with_format("torch", columns=["labels"])
    found = keep(tmp_path, whole.shuffle(seed=1).select(range(ROWS)))
    assert found.format["type"] == "torch"
    assert found[0].keys() == {"labels", "teacher_logits"}
    assert found[:]["teacher_logits"].dtype == torch.float32
    for row in found.with_format(None):
        torch.testing.assert_close(torch.tensor(row["teacher_logits"]), said(tiny.bert(2), row)[0])


def test_precision(tmp_path: Path) -> None:
    exact = keep(tmp_path, model=tiny.bert(2).double())
    assert exact.features["teacher_logits"].feature.dtype == "float64"
    half = keep(tmp_path, bf16=True)
    assert half.features["teacher_logits"].feature.dtype == "float32"
    found, expected = (torch.tensor(data["teacher_logits"][:]) for data in (half, exact))
    assert 1e-4 < (found - expected).abs().max() < 0.2


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = tiny.bert(2).train()
    model.bert.eval()
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    keep(tmp_path, model=model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not datasets.are_progress_bars_disabled()


# Once


def test_a_second_call_runs_no_model(tmp_path: Path, calls: Any) -> None:
    model = tiny.bert(2)
    seen = calls(model)
    first = keep(tmp_path, model=model)
    assert seen == [1, 4, 4, 4, 4, 4, 2]
    again = keep(tmp_path, model=model)
    assert len(seen) == 7
    assert again[:] == first[:]
    assert again._fingerprint == first._fingerprint
    assert len(again.cache_files) == 3  # memory-mapped


def test_what_makes_a_difference_runs_it_again(tmp_path: Path, calls: Any) -> None:
    model, data = tiny.bert(2), tiny.dataset(ROWS)
    before = keep(tmp_path, data, model)
    with torch.no_grad():
        model.classifier.bias[0] += 1
    seen = calls(model)
    after = keep(tmp_path, data, model)
    difference = torch.tensor(after["teacher_logits"][:]) - torch.tensor(before["teacher_logits"][:])
    torch.testing.assert_close(difference, torch.tensor([1.0, 0.0]).expand(ROWS, 2), atol=1e-5, rtol=0)
    assert after._fingerprint != before._fingerprint

    def other_collate(examples: Any) -> Any:
        return COLLATE(examples)

    padded = DataCollatorWithPadding(tiny.tokenizer(), padding="max_length", max_length=20)
    changes = (
        {"batch_size": 5}, {"hidden_states": True}, {"bf16": True}, {"collate": other_collate}, {"collate": padded},
        {"data": data.select(range(ROWS - 1))}, {"data": data.select(range(ROWS - 1, -1, -1))},
    )  # fmt: skip
    for change in changes:
        number = len(seen)
        keep(tmp_path, **{"data": data, "model": model} | change)
        assert len(seen) > number, change


def test_what_makes_none_runs_it_once(tmp_path: Path, calls: Any) -> None:
    """Neither other columns, nor their order, format and place, nor the name, of which the columns are."""
    model, data = tiny.bert(2), tiny.dataset(ROWS)
    expected = keep(tmp_path, data, model)
    seen = calls(model)
    halves = (
        datasets.Dataset.from_list(data.to_list()[part], features=data.features) for part in (slice(9), slice(9, ROWS))
    )
    backwards = data.select(range(ROWS - 1, -1, -1)).flatten_indices().select(range(ROWS - 1, -1, -1))
    data.save_to_disk(tmp_path / "data")
    same = (
        data.remove_columns(["length", "labels"]), data.select_columns([*reversed(data.column_names)]),
        data.with_format("torch", columns=["labels"]), data.add_column("more", range(ROWS)),
        datasets.load_from_disk(tmp_path / "data"), datasets.concatenate_datasets([*halves]), backwards,
        datasets.concatenate_datasets([tiny.dataset(3, seed=1), data]).select(range(3, ROWS + 3)),
    )  # fmt: skip
    for rows in same:
        assert keep(tmp_path, rows, model).with_format(None)["teacher_logits"][:] == expected["teacher_logits"][:]
    assert keep(tmp_path, data, model, name="assistant")["assistant_logits"][:] == expected["teacher_logits"][:]
    assert seen == []
    assert not [*tmp_path.glob("cache-*")]  # of `backwards`, which has no folder of its own


@pytest.mark.parametrize("decode", [True, False])
def test_images_are_known_by_what_is_in_their_files(tmp_path: Path, decode: bool, calls: Any) -> None:
    files = sorted(tiny.image_folder(tmp_path / "squares").rglob("*.png"))
    columns = {"pixel_values": [str(file) for file in files]}

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        found = [one["pixel_values"] for one in examples]
        pixels = [np.asarray(image if decode else Image.open(image["path"])) for image in found]
        return {"pixel_values": torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255}

    def said() -> Any:
        features = datasets.Features({"pixel_values": datasets.Image(decode=decode)})
        data = datasets.Dataset.from_dict(columns, features=features)
        return np.array(keep(tmp_path, data, model, collate=collate)["teacher_logits"][:])

    model = encoders.classifier("vit")
    before = said()
    seen = calls(model)
    np.testing.assert_array_equal(said(), before)
    assert seen == []
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(files[-1])  # no example by which the collator is known
    after = said()
    changed = (after != before).any(1)
    assert changed[-1] and not changed[:16].any()


def test_by_default_it_is_kept_in_datasets_cache(tmp_path: Path, monkeypatch: Any, calls: Any) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    model = tiny.bert(2)
    keep(tmp_path, model=model, cache_file=None)
    seen = calls(model)
    keep(tmp_path, model=model, cache_file=None)
    assert seen == []
    assert len(list((tmp_path / "cache" / "fastdistill").glob("BertForSequenceClassification-*.arrow"))) == 3


def test_an_interrupted_one_goes_on_where_it_stopped(tmp_path: Path, calls: Any) -> None:
    expected = keep(tmp_path / "whole")
    model = tiny.bert(2)
    seen = calls(model)

    def fail(*_: Any) -> None:
        if len(seen) == 5:  # an example, two batches of the first file, and two of the second
            raise KeyboardInterrupt

    failing = model.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        keep(tmp_path / "parts", model=model)
    assert [path.suffix for path in (tmp_path / "parts").iterdir()] == [".arrow"]  # the first, and nothing half
    failing.remove()
    seen.clear()
    found = keep(tmp_path / "parts", model=model)
    assert seen == [1, 4, 4, 4, 2]
    assert found[:] == expected[:]


def keep_until_killed(folder: Path) -> None:
    stored.POOL = 2
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    keep(folder)


@pytest.mark.slow
def test_one_that_is_killed_leaves_nothing_for_long(tmp_path: Path) -> None:
    process = start(keep_until_killed, tmp_path)
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".teacher-")
    keep(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".arrow"] * 3


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        keep(tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("left", [0, 10, 100, 0.5, -1, "values", "end"])
def test_a_damaged_file_is_written_again(tmp_path: Path, left: Any, calls: Any) -> None:
    model = tiny.bert(2)
    expected = keep(tmp_path, model=model, hidden_states=True)[:]
    path = sorted(tmp_path.glob("*.arrow"))[0]
    whole = path.read_bytes()
    if isinstance(left, str):  # readable, with the right number of rows
        place = {"values": len(whole) // 2, "end": len(whole) - 1}[left]
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    else:
        path.write_bytes(whole[: int(left * len(whole)) if isinstance(left, float) else left])
    seen = calls(model)
    assert keep(tmp_path, model=model, hidden_states=True)[:] == expected
    assert seen == [1, 4, 4]
    assert path.read_bytes() == whole


def test_what_it_takes_is_said(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    keep(tmp_path)
    assert "storing logits of" not in capsys.readouterr().err
    monkeypatch.setattr(stored, "POOL", 2000)
    model, data = tiny.bert(2, layers=1, hidden_size=256), tiny.dataset(600)
    keep(tmp_path, data, model, hidden_states=True, batch_size=100)
    assert (
        f"teacher: storing logits and hidden states of 600 examples, 1.2 MB, in {tmp_path}" in capsys.readouterr().err
    )


# In the trainer


def test_training_on_it_is_training_with_the_teacher(tmp_path: Path) -> None:
    teacher = tiny.bert(2, layers=3, dropout=0.0)
    data = tiny.dataset(40)
    columns = keep(tmp_path, data, teacher, hidden_states=True)
    ends = []
    for given, examples in ((teacher, data), (None, columns)):
        trainer = DistillationTrainer(
            tiny.bert(1),
            tiny.config(tmp_path / "run", num_train_epochs=2, optim="sgd", learning_rate=0.1),
            teacher_model=given,
            objective=WeightedSum({"kd": (1.0, LogitsKD()), "pkd": (1.0, PKD([(1, 1), (2, 3)]))}),
            train_dataset=examples,
            processing_class=tiny.tokenizer(),
        )
        trainer.train()
        ends.append(trainer.model.state_dict())
    assert not torch.equal(ends[0]["classifier.weight"], tiny.bert(1).state_dict()["classifier.weight"])
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)


# Several processes


def in_processes(folder: Path) -> None:
    stored.POOL = 2
    model, seen = tiny.bert(2), []
    model.register_forward_hook(lambda *_: seen.append(1))
    found = keep(folder, model=model)
    assert len(found) == ROWS
    rank = os.environ["RANK"]
    (folder / f"calls-{rank}").write_text(str(len(seen)))
    (folder / f"fingerprint-{rank}").write_text(found._fingerprint)


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path: Path, calls: Any) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    with launched("tests.teachers.test_store", str(tmp_path)):
        pass
    assert [int((tmp_path / f"calls-{rank}").read_text()) for rank in (0, 1)] == [1 + 2 + 2, 2]
    model = tiny.bert(2)
    seen = calls(model)
    found = keep(tmp_path, model=model)
    assert seen == []
    assert {(tmp_path / f"fingerprint-{rank}").read_text() for rank in (0, 1)} == {found._fingerprint}
    assert found[:] == keep(tmp_path / "one")[:]


if __name__ == "__main__":
    in_processes(Path(sys.argv[1]))
