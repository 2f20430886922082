from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithPadding

import fastdistill
from fastdistill.cli import main
from fastdistill.files import damage, digests, load_tensors, replacing, save_tensors
from fastdistill.training.trainer import DistillationTrainer
from tests import tiny

SHAPE: dict[str, Any] = {"layers": 1, "hidden_size": 64}
"""Weights of 160 kB; an optimizer's state is twice that."""


@contextmanager
def full(limit: int) -> Iterator[None]:
    """A disk that takes no file of more bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(file) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "old"
    with replacing(file) as temporary:
        temporary.write_text("new")
    assert file.read_text() == "new"


def test_digests_tell_what_is_damaged(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    found = digests(tmp_path, ["a", "b"])
    assert damage(tmp_path, found) == ""
    (tmp_path / "b").write_text("c")
    assert damage(tmp_path, found) == "b is not as it was written"
    (tmp_path / "b").unlink()
    assert damage(tmp_path, found) == "b is missing"


def test_tensors_that_changed_on_disk_are_not_loaded(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_tensors({"x": torch.arange(9.0), "none": torch.empty(0)}, file, {"fact": "1"})
    tensors, facts = load_tensors(file)
    assert torch.equal(tensors["x"], torch.arange(9.0))
    assert facts == {"fact": "1"}
    for place in (-1, file.read_bytes().index(b"fact") + 7):  # a number, and metadata
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        (tmp_path / "flipped.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="flipped.safetensors is damaged"):
            load_tensors(tmp_path / "flipped.safetensors")


def test_tensors_on_a_full_disk(tmp_path: Path) -> None:
    save_tensors({"x": torch.zeros(9)}, tmp_path / "x.safetensors", {})
    with (
        full(100_000),
        pytest.raises(OSError, match=r"x.safetensors could not be written, with .*B free on its disk: "),
    ):
        save_tensors({"x": torch.ones(99_999)}, tmp_path / "x.safetensors", {})
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert not load_tensors(tmp_path / "x.safetensors")[0]["x"].any()


@pytest.mark.parametrize("limit", [50_000, 250_000])
def test_a_checkpoint_on_a_full_disk(tmp_path: Path, limit: int) -> None:
    """Full before the weights or the optimizer's state are written; once there is room it goes on, to the same end."""

    def trainer(folder: Path) -> DistillationTrainer:
        return DistillationTrainer(
            model=tiny.bert(1, **SHAPE),
            teacher_model=tiny.bert(2),
            args=tiny.config(folder, save_strategy="steps", save_steps=2, num_train_epochs=2),
            train_dataset=tiny.dataset(24),
            processing_class=tiny.tokenizer(),
        )

    whole = trainer(tmp_path / "whole")
    whole.train()
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", run / "checkpoint-2")
    with (
        full(limit),
        pytest.raises(OSError, match=f"{run}/checkpoint-4 could not be written, with .*B free on its disk"),
    ):
        trainer(run).train(resume_from_checkpoint=True)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
    again = trainer(run)
    again.train(resume_from_checkpoint=True)
    torch.testing.assert_close(again.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_stored_outputs_on_a_full_disk(tmp_path: Path) -> None:
    data, model = tiny.dataset(400), tiny.bert()
    options: dict[str, Any] = {
        "collate": DataCollatorWithPadding(tiny.tokenizer()), "hidden_states": True, "cache_file": tmp_path / "x.arrow"
    }  # fmt: skip
    with full(20_000), pytest.raises(OSError, match=r"x-\w+-0.arrow could not be written"):
        fastdistill.store(data, model, **options)
    assert not any(tmp_path.iterdir())
    assert len(fastdistill.store(data, model, **options)) == 400


def test_a_run_on_a_full_disk_says_so_in_a_line_and_goes_on_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, teacher = tiny.task_folder(tmp_path / "task"), tiny.model_folder(tmp_path / "teacher", tiny.bert(**SHAPE))
    arguments = ["kd", "--task", str(task), "--teacher", str(teacher), "--output", str(tmp_path / "run")]
    arguments += ["--student-layers", "1", "--epochs", "1", "--teacher-epochs", "1", "--checkpoints", "3"]
    with full(50_000):
        assert main(arguments) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "error" in line or "Traceback" in line]
    assert len(said) == 1
    assert "/run/teacher/checkpoint-" in said[0]
    assert "could not be written, with " in said[0]
    assert main(arguments) == 0
