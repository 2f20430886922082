from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill.files import load_tensors, save_tensors
from fastdistill.recipes.folder import UNFINISHED, Folder
from fastdistill.training.checkpoints import seal
from tests import tiny

CAME_FROM = {"seed": 0, "versions": {"torch": "2"}}


def done(path: Path, model: Any = None) -> Folder:
    folder = Folder(path)
    folder.open(CAME_FROM)
    made = model if model is not None else tiny.bert()
    folder.close(CAME_FROM, {"accuracy": 0.1 + 0.2}, [{"loss": 0.5}], lambda: made.save_pretrained(path))
    return folder


def flip(file: Path, place: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_a_stage_that_is_done_is_as_it_was(tmp_path: Path) -> None:
    model = tiny.bert()
    folder = done(tmp_path, model)
    assert folder.open(CAME_FROM)["result"] == {"accuracy": 0.1 + 0.2}
    torch.testing.assert_close(folder.load().state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: flip(path / "model.safetensors"), r"model.safetensors is not as it was written"),
        (lambda path: flip(path / "config.json"), r"config.json is not as it was written"),
        (lambda path: (path / "model.safetensors").unlink(), r"model.safetensors is missing"),
        (lambda path: (path / "stage.json").write_text("[1]"), r"stage.json is damaged"),
        (lambda path: (path / "stage.json").write_text("{}"), r"stage.json is damaged"),
        (
            lambda path: (path / "stage.json").write_text((path / "stage.json").read_text().replace("0.3", "0.4")),
            r"stage.json is damaged \(it is not as it was written\)",
        ),
    ],
)
def test_a_flipped_byte_is_not_taken_as_done(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    """Nor is a result that somebody changed."""
    folder = done(tmp_path)
    damage(tmp_path)
    for ask in (lambda: folder.open(CAME_FROM), folder.load):
        with pytest.raises(ValueError, match=rf"{tmp_path}.*{message}.*; remove it(s folder)? to do the stage again"):
            ask()


def test_files_that_came_later_do_no_harm(tmp_path: Path) -> None:
    folder = done(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    assert "result" in folder.open(CAME_FROM)


def test_a_kept_file_is_checked_too(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.open(CAME_FROM)
    scores = tmp_path / "scores.safetensors"
    folder.close(CAME_FROM, {}, [], lambda: None if scores.write_bytes(bytes(100)) else None)
    flip(scores, 50)
    with pytest.raises(ValueError, match="scores.safetensors is not as it was written"):
        folder.open(CAME_FROM)


def test_what_is_damaged_and_of_another_run_is_removed(tmp_path: Path) -> None:
    folder = done(tmp_path / "stage")
    flip(tmp_path / "stage" / "model.safetensors")
    assert folder.open({**CAME_FROM, "seed": 1}) == {"changed": ["seed"]}
    assert not (tmp_path / "stage" / "model.safetensors").exists()


def test_unfinished_work_that_is_damaged_begins_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flipped byte, too, which safetensors does not notice."""
    folder, unfinished = Folder(tmp_path), tmp_path / UNFINISHED
    folder.open(CAME_FROM)
    save_tensors({"totals": torch.ones(9)}, unfinished, {"done": "64"})
    folder.open(CAME_FROM)
    assert load_tensors(unfinished)[1] == {"done": "64"}
    flip(unfinished)
    folder.open(CAME_FROM)
    assert not unfinished.exists()
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path.name}: begun anew: {unfinished} is damaged")
    assert said.count("\n") == 1


def test_a_checkpoint_that_is_damaged_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, checkpoints = Folder(tmp_path), [tmp_path / f"checkpoint-{step}" for step in (2, 10)]
    for checkpoint in checkpoints:
        checkpoint.mkdir()
        (checkpoint / "optimizer.pt").write_bytes(bytes(9))
        assert folder.last_checkpoint() == (str(checkpoints[0]) if checkpoint is checkpoints[1] else None)
        seal(checkpoint)
        assert folder.last_checkpoint() == str(checkpoint)
    for checkpoint in reversed(checkpoints):
        flip(checkpoint / "optimizer.pt")
    assert folder.last_checkpoint() is None
    assert capsys.readouterr().err.count("is damaged (optimizer.pt is not as it was written)") == 2
