from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill.training import resumable
from fastdistill.training.checkpoints import SEAL, last_whole
from fastdistill.training.trainer import DistillationTrainer
from tests import tiny


def trainer(folder: Path, **options: Any) -> DistillationTrainer:
    """Six steps, with a checkpoint after 2, 4 and 6."""
    settings = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2, **options}
    return DistillationTrainer(
        model=tiny.bert(1, layers=1),
        teacher_model=tiny.bert(2),
        args=tiny.config(folder, **settings),
        train_dataset=tiny.dataset(24),
        processing_class=tiny.tokenizer(),
    )


def test_none_too_soon_after_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After steps 2, 4 and 6 a clock of a step a second says 2, 4 and 6, from the beginning."""
    made = trainer(tmp_path, min_save_seconds=4.0, save_total_limit=None)
    monkeypatch.setattr(resumable.time, "monotonic", lambda: float(made.state.global_step))
    made.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4"]
    with pytest.raises(ValueError, match="min_save_seconds is -1.0; expected"):
        trainer(tmp_path, min_save_seconds=-1.0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    trainer(folder).train()
    return folder


def end(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    made = trainer(folder, **options)
    made.train(resume_from_checkpoint=True)
    return made.model.state_dict()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "optimizer.pt": cut,
    "rng_state.pth": cut,
    "model.safetensors": flip,
    "scheduler.pt": flip,
    "trainer_state.json": lambda file: file.write_text("[]"),
    "config.json": lambda file: file.unlink(),
    "scaler.pt": lambda file: file.write_bytes(b"planted"),
    SEAL: lambda file: file.write_text("[1]"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_left_for_the_one_before(
    finished: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    expected = trainer(folder)
    expected.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    DAMAGES[name](folder / "checkpoint-6" / name)
    capsys.readouterr()
    assert last_whole(folder) == str(folder / "checkpoint-4")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"run: checkpoint-6 is damaged ({name} ")
    torch.testing.assert_close(end(folder), expected.model.state_dict(), rtol=0, atol=0)
    assert last_whole(folder) == str(folder / "checkpoint-6")  # written again, without what was planted
    assert not (folder / "checkpoint-6" / "scaler.pt").exists()


def test_one_that_was_cut_off_is_none_yet(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Cut(BaseException):
        pass

    def interrupt(checkpoint: Path) -> None:
        if checkpoint.name == "checkpoint-4":
            raise Cut
        seal(checkpoint)

    seal = resumable.seal
    with monkeypatch.context() as patch:
        patch.setattr(resumable, "seal", interrupt)
        with pytest.raises(Cut):
            trainer(tmp_path).train()
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").exists()
    assert last_whole(tmp_path) == str(tmp_path / "checkpoint-2")
    whole = trainer(tmp_path / "other")
    whole.train()
    torch.testing.assert_close(end(tmp_path), whole.model.state_dict(), rtol=0, atol=0)
    assert "damaged" not in capsys.readouterr().err


def test_a_damaged_checkpoint_that_is_named_is_an_error(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for checkpoint in folder.glob("checkpoint-*"):
        cut(checkpoint / "optimizer.pt")
    with pytest.raises(ValueError, match=r"resume_from_checkpoint is .*checkpoint-4, .*: optimizer.pt is not as"):
        trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    with pytest.raises(ValueError, match=f"all checkpoints in {folder} are damaged"):
        trainer(folder).train(resume_from_checkpoint=True)
