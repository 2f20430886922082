from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from fastdistill import recipes
from fastdistill.recipes import KDSettings
from fastdistill.recipes.output import claimed
from fastdistill.recipes.report import write_json


def test_two_runs_cannot_have_one_folder(tmp_path: Path) -> None:
    with claimed(tmp_path / "run", "kd"):
        who = rf"\(pid {os.getpid()} on {socket.gethostname()}, since 20\S+ \S+\)"
        in_use = rf"another run uses {tmp_path}/run {who}"
        with pytest.raises(ValueError, match=in_use), claimed(tmp_path / "run", "kd"):
            pass
        with claimed(tmp_path / "other", "kd"):
            pass
        (tmp_path / "run" / "made").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["made"]
    with claimed(tmp_path / "run", "kd"):
        pass
    assert not (tmp_path / "other").exists()  # nothing was written to it


def test_the_lock_of_a_killed_run_is_free(tmp_path: Path) -> None:
    taken, says = os.pipe()
    child = os.fork()
    if not child:
        with claimed(tmp_path, "kd"):
            os.write(says, b"1")
            signal.pause()
    os.read(taken, 1)
    try:
        with pytest.raises(ValueError, match=rf"another run uses {tmp_path} \(pid {child}"), claimed(tmp_path, "kd"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (tmp_path / ".lock").exists()
    with claimed(tmp_path, "kd"):
        pass
    assert not any(tmp_path.iterdir())


def test_an_error_gives_the_folder_back(tmp_path: Path) -> None:
    with pytest.raises(OSError), claimed(tmp_path / "run", "kd"):
        raise OSError
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content, whose",
    [
        ({"settings": {"command": "stark"}}, "of stark"),
        ({"accuracy": 1}, "no results of fastdistill"),
        ([1], "no results of fastdistill"),
    ],
)
def test_results_of_others_are_not_written_over(tmp_path: Path, content: object, whose: str) -> None:
    write_json(tmp_path / "results.json", content)
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ValueError, match=f"{tmp_path}/results.json is {whose}.*--overwrite"), claimed(tmp_path, "kd"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_bytes() == before
    with claimed(tmp_path, "kd", overwrite=True):
        pass


def test_own_results_are_gone_on_from(tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", {"settings": {"command": "kd"}})
    with claimed(tmp_path, "kd"):
        pass


def test_an_output_that_is_no_folder_is_named(tmp_path: Path) -> None:
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to(tmp_path / "nowhere")
    file.touch()
    with pytest.raises(ValueError, match=f"--output is {link}, a link to {tmp_path}/nowhere, which is not there"):  # noqa: SIM117
        with claimed(link, "kd"):
            pass
    with pytest.raises(ValueError, match=f"--output is {file}, a file; expected a folder"), claimed(file, "kd"):
        pass


def test_a_recipe_called_from_python_claims_its_folder(tmp_path: Path) -> None:
    asked = KDSettings(task="docstrings", teacher="minilm", student_layers=1, output=tmp_path)
    with claimed(tmp_path, "kd"), pytest.raises(ValueError, match="another run uses"):
        recipes.kd(asked)
