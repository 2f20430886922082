from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fastdistill
from fastdistill.cli import RECIPES, main
from fastdistill.models.scores import random_scores
from tests import tiny
from tests.commands import refused


def command(task: object, teacher: object, output: Path, *more: str) -> list[str]:
    required = {"--task": task, "--teacher": teacher, "--student-layers": 1, "--output": output}
    return ["kd", *(str(part) for pair in required.items() for part in pair), *more]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in (*RECIPES, "doctor", "export"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_explains_every_option(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([recipe, "--help"])
    said = capsys.readouterr().out
    options = re.findall(r"^  (--\S+)((?: \S+)?)(?:\s{2,}|\n\s{20,})(\S.*)$", said, re.MULTILINE)  # with a help
    assert len(options) > 15
    assert len(options) == len(re.findall(r"^  --", said, re.MULTILINE))


def test_doctor_prints_its_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "kd_ce_loss" in capsys.readouterr().out


def test_a_reshaped_model_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.bert()
    scores = random_scores(model, torch.Generator().manual_seed(0))
    source = tiny.model_folder(tmp_path / "pruned", fastdistill.prune(model, scores, 0.5, uniform=True))
    assert main(["export", str(source), str(tmp_path / "plain")]) == 0
    assert capsys.readouterr().out.endswith("plain: a plain model of transformers\n")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    batch = {"input_ids": torch.tensor([[5, 9, 7]])}
    torch.testing.assert_close(plain(**batch).logits, fastdistill.from_pretrained(source)(**batch).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").get_vocab() == tiny.tokenizer().get_vocab()
    assert "plain is there; expected a new folder" in refused(["export", str(source), str(tmp_path / "plain")], capsys)
    uneven = tiny.model_folder(tmp_path / "uneven", fastdistill.prune(model, scores, 0.5))
    assert "expected the same of all" in refused(["export", str(uneven), str(tmp_path / "new")], capsys)
    assert not (tmp_path / "new").exists()


def test_the_module_runs_as_the_command_does() -> None:
    run = subprocess.run([sys.executable, "-m", "fastdistill", "doctor"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "kd_ce_loss" in run.stdout


def test_recipes_are_imported_only_when_run() -> None:
    """So that --help answers at once."""
    code = "import sys, fastdistill.cli\ntry: fastdistill.cli.main(['kd', '--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('transformers', 'datasets', 'sklearn', 'rich') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--epochs", "0"], "argument --epochs: 0 is not a finite number above 0"),
        (["--epochs", "many"], "argument --epochs: invalid number value: 'many'"),
        (["--teacher-epochs", "-1"], "argument --teacher-epochs: -1 is not a finite number of at least 0"),
        (["--batch-size", "0"], "argument --batch-size: 0 is not an integer of at least 1"),
        (["--batch-size", "1.5"], "argument --batch-size: invalid integer value: '1.5'"),
        (["--learning-rate", "nan"], "argument --learning-rate: nan is not a finite number above 0"),
        (["--temperature", "inf"], "argument --temperature: inf is not a finite number above 0"),
        (["--kd-weight", "0"], "argument --kd-weight: 0 is not a finite number above 0"),
        (["--ce-weight", "-1"], "argument --ce-weight: -1 is not a finite number of at least 0"),
        (["--label-smoothing", "1"], "argument --label-smoothing: 1 is not a finite number of at least 0 and below 1"),
        (["--seed", "4294967296"], "argument --seed: 4294967296 is not an integer from 0 to 4294967295"),
        (["--divergence", "js"], "argument --divergence: invalid choice: 'js'"),
        (["--student-layers", "0"], "argument --student-layers: 0 is not an integer of at least 1"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option (see fastdistill kd --help)"),
    ],
)
def test_bad_values_are_refused_in_a_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(command("docstrings", "minilm", tmp_path, *options), capsys)
    assert said.startswith("fastdistill")
    assert message in said


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "required: command" in refused([], capsys)
    assert "invalid choice: 'distil'" in refused(["distil"], capsys)
    assert "required: --task, --teacher, --student-layers, --output" in refused(["kd"], capsys)


def test_what_cannot_be_done_is_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, scores = tiny.task_folder(tmp_path / "task"), tiny.task_folder(tmp_path / "scores", regression=True)
    teacher = tiny.model_folder(tmp_path / "teacher", tiny.bert(layers=3, num_labels=5))
    run = tmp_path / "run"
    for arguments, message in [
        (command("no-such-task", teacher, run), "no-such-task is no"),
        (command(task, tmp_path / "nowhere", run), str(tmp_path / "nowhere")),
        (command(task, teacher, run, "--student-layers", "4"), "k is 4; expected from 1 to 3"),
        (command(task, teacher, run, "--max-length", "33"), "max_length is 33; expected from 1 to the tokenizer's 32"),
        (command(task, teacher, run, "--teacher-epochs", "0"), "--teacher-epochs is 0 but"),
        (command(task, teacher, run, "--label-smoothing", "0.1", "--ce-weight", "0"), "label_smoothing is 0.1 but"),
        (command(scores, teacher, run, "--temperature", "3"), "--temperature is 3.0, but scores is regression"),
        (command(scores, teacher, run, "--divergence", "soft_ce"), "--divergence is soft_ce, but scores is regression"),
        (
            command(scores, teacher, run, "--label-smoothing", "0.1"),
            "--label-smoothing is 0.1, but scores is regression",
        ),
    ]:
        said = refused(arguments, capsys)
        assert said.startswith("fastdistill kd: error: ")
        assert message in said
    assert not run.exists() or not any(run.iterdir())


def test_bad_rows_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = tiny.task_folder(tmp_path / "task")
    with (task / "train.jsonl").open("a") as file:
        file.write('{"sentence1": "ba"}\n')
    said = refused(command(task, tiny.model_folder(tmp_path / "teacher"), tmp_path / "run"), capsys)
    assert "train.jsonl, line 65, column 'label'" in said


def test_traceback_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-task"):
        main(command("no-such-task", "minilm", tmp_path, "--traceback"))


def test_threads_that_wait_for_others_soon_sleep(tmp_path: Path) -> None:
    """Unless another number of turns or another policy is given; said before PyTorch is imported, which reads it."""
    tell = """
import os, sys, fastdistill.cli
print('torch' in sys.modules)
for given in ({}, {'GOMP_SPINCOUNT': '7'}, {'OMP_WAIT_POLICY': 'active'}):
    for name in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY'):
        os.environ.pop(name, None)
    os.environ.update(given)
    fastdistill.cli.main(['export', 'a', 'b'])
    print(os.environ.get('GOMP_SPINCOUNT'))
"""
    told = subprocess.run([sys.executable, "-c", tell], capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert told.split() == ["False", "10000", "7", "None"]
