"""`fastdistill stark` end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import DataCollatorWithPadding

import fastdistill
from fastdistill import LogitsKD, recipes
from fastdistill.cli import main
from fastdistill.models.architectures import blocks, encoder_weights
from fastdistill.recipes import StarkSettings, fitting
from fastdistill.recipes.measuring import Scoring
from fastdistill.recipes.methods.kd import logits_objective
from fastdistill.sensitivity import units
from tests import commands, tiny
from tests.processes import kill_when, start
from tests.records import done_since, record, untimed, written

ENCODER = {"layers": 3, "num_attention_heads": 4}


def command(sources: Path, output: Path, *more: str, task: str = "task", student: str = "layers") -> list[str]:
    """One epoch of three steps a stage, unless `more` says otherwise."""
    students = {"layers": ("--student-layers", "1"), "sparsity": ("--student-sparsity", "0.7")}
    return commands.command("stark", sources, output, *students[student], *more, task=task)


def measured(output: Path) -> Any:
    return untimed(output, "results", "sparsities")


EVERYTHING = (
    "--sparsity", "0.25,0.5", "--selection", "knowledge,random,auto", "--baselines", "--chain", "3,2,1",
    "--seeds", "0,7", "--baseline-runs", "1",
)  # fmt: skip


@pytest.mark.slow
def test_a_run_trains_all_that_was_asked_for(finished: Path) -> None:
    found = record(finished)
    names = ["teacher", "finetuned", "assistant-2", "takd", "trial", "kd", "stark", "stark-rand", "stark-auto"]
    assert sorted(found["results"]) == sorted(names)
    assert found["results"]["kd"] == found["results"]["trial"]  # it is the trial itself
    assert list(found["sparsities"]) == ["stark", "stark-rand", "stark-auto"]
    for seed in (0, 7):
        folder = finished / f"seed-{seed}"
        students = {"stark-0.25", "stark-0.5", "stark-rand-0.25", "stark-rand-0.5", "stark-auto"}
        teachers = {f"teacher-{name}" for name in students}
        others = {"trial", "scores", "finetuned", "takd"}
        assert {path.name for path in folder.iterdir()} == students | teachers | others
    for plot in ("sparsities", "heads", "density-heads", "density-neurons"):
        assert "<svg" in (finished / f"{plot}.svg").read_text()


@pytest.mark.slow
def test_the_same_from_python_repeats_nothing(sources: Path, finished: Path) -> None:
    """And the report says where plots are."""
    before, stages = measured(finished), written(finished)
    asked = StarkSettings(
        task=str(sources / "task"),
        teacher=str(sources / "encoder"),
        student_layers=1,
        output=finished,
        epochs=1,
        teacher_epochs=1,
        batch_size=16,
        learning_rate=0.01,
        teacher_learning_rate=0.01,
        sparsity=(0.25, 0.5),
        selection=("knowledge", "random", "auto"),
        baselines=True,
        chain=(3, 2, 1),
        seeds=(0, 7),
        baseline_runs=1,
        select_on="validation",
        checkpoints=0,
    )
    report = recipes.stark(asked)
    assert measured(finished) == before
    assert not done_since(finished, stages)
    names = ("sparsities", "heads", "density-heads", "density-neurons")
    assert report.plots == tuple(finished / f"{name}.svg" for name in names)
    assert report.results["stark"]["values"] == record(finished)["results"]["stark"]["values"]


@pytest.mark.slow
def test_teachers_are_really_smaller(finished: Path) -> None:
    for name in ("stark", "stark-rand"):
        for sparsity in (0.25, 0.5):
            smaller = fastdistill.from_pretrained(finished / "seed-0" / f"teacher-{name}-{sparsity}")
            assert sum(block.heads for block in blocks(smaller)) == 12 - round(12 * sparsity)
            assert sum(block.neurons for block in blocks(smaller)) == 96 - round(96 * sparsity)
            parameters = record(finished)["sparsities"][name][str(sparsity)]["teacher"]["parameters"]
            assert parameters == smaller.num_parameters()


@pytest.mark.slow
def test_teachers_lack_what_has_the_lowest_scores(finished: Path) -> None:
    seed, dense = finished / "seed-7", fastdistill.from_pretrained(finished / "teacher")
    found = [fastdistill.Scores.load(seed / "scores" / f"{k}.safetensors") for k in ("expressiveness", "friendliness")]
    scores = found[0].normalized().lerp(found[1].normalized(), 0.5)
    expected = fastdistill.prune(dense, scores, 0.5)
    sparse = fastdistill.from_pretrained(seed / "teacher-stark-0.5")
    torch.testing.assert_close(sparse.state_dict(), expected.state_dict(), rtol=0, atol=0)
    auto = record(finished)["sparsities"]["stark-auto"]["auto"]["sparsity"][1]
    assert auto == scores.auto_sparsity()


@pytest.mark.slow
def test_the_best_student_counts(finished: Path) -> None:
    """The trial student, of a dense teacher, is beside the method and no candidate of it."""
    found = record(finished)
    for name in ("stark", "stark-rand", "stark-auto"):
        for seed in range(2):
            tried = {
                one["sparsity"][seed]: one["student"]["values"][seed] for one in found["sparsities"][name].values()
            }
            assert found["results"][name]["values"][seed] == max(tried.values())
            assert tried[found["results"][name]["sparsity"][seed]] == max(tried.values())


@pytest.mark.slow
def test_students_begin_alike(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And see the same batches, with logits that their teacher gave once."""
    begun: dict[str, Any] = {}
    seen: dict[str, list[Any]] = {}
    compute = fitting.DistillationTrainer.compute_loss

    def watched(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        name = Path(self.args.output_dir).name
        if model.training:
            begun.setdefault(name, {key: value.clone() for key, value in model.state_dict().items()})
            seen.setdefault(name, []).append(dict(inputs))
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(fitting.DistillationTrainer, "compute_loss", watched)
    assert main(command(sources, tmp_path / "run", "--sparsity", "0.5", "--no-plots")) == 0
    torch.testing.assert_close(begun["trial"], begun["stark-0.5"], rtol=0, atol=0)
    teachers = {"trial": tmp_path / "run" / "teacher", "stark-0.5": tmp_path / "run" / "seed-0" / "teacher-stark-0.5"}
    for name, folder in teachers.items():
        teacher = fastdistill.from_pretrained(folder)
        for batch in seen[name]:
            with torch.no_grad():
                logits = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            torch.testing.assert_close(batch["teacher_logits"], logits, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(seen["trial"], seen["stark-0.5"], strict=True):
        assert torch.equal(ours["input_ids"], theirs["input_ids"])


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["pkd", "ckd"])
def test_other_objectives(sources: Path, tmp_path: Path, objective: str) -> None:
    more = ("--objective", objective, "--sparsity", "0.5", "--student-layers", "2", "--baselines", "--no-plots")
    assert main(command(sources, tmp_path / "run", *more)) == 0
    assert {"kd", "finetuned", "trial", "stark"} < record(tmp_path / "run")["results"].keys()
    assert objective.upper() in record(tmp_path / "run")["settings"]["objective"]


@pytest.mark.slow
def test_the_other_student(sources: Path, tmp_path: Path) -> None:
    assert main(command(sources, tmp_path / "run", "--sparsity", "0.5", "--no-plots", student="sparsity")) == 0
    student = fastdistill.from_pretrained(tmp_path / "run" / "seed-0" / "trial")
    assert sum(block.heads for block in blocks(student)) == 12 - round(12 * 0.7)
    assert len(blocks(student)) == 3


@pytest.mark.slow
def test_unstructured(sources: Path, tmp_path: Path) -> None:
    more = ("--unstructured", "--sparsity", "0.3", "--selection", "knowledge,random", "--no-plots")
    assert main(command(sources, tmp_path / "run", *more)) == 0
    for name in ("stark", "stark-rand"):
        teacher = fastdistill.from_pretrained(tmp_path / "run" / "seed-0" / f"teacher-{name}-0.3")
        weights = [weight for _, weight in encoder_weights(teacher)]
        zeros, total = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
        assert zeros == round(0.3 * total)


@pytest.mark.slow
def test_regression_and_the_published_codes_way(sources: Path, tmp_path: Path) -> None:
    more = ("--sparsity", "0.5", "--reduce", "batch", "--score-on", "validation", "--tradeoff", "1", "--round-to", "8")
    more = (*more, "--baselines", "--chain", "3,2,1", "--no-plots")
    assert main(command(sources, tmp_path / "run", *more, task="scores")) == 0
    assert {"finetuned", "takd", "trial", "stark"} < record(tmp_path / "run")["results"].keys()
    assert not (tmp_path / "run" / "seed-0" / "scores" / "friendliness.safetensors").exists()
    smaller = fastdistill.from_pretrained(tmp_path / "run" / "seed-0" / "teacher-stark-0.5")
    assert {block.neurons % 8 for block in blocks(smaller)} == {0}


@pytest.mark.slow
def test_dynaberts_importance_selects_within_each_layer(sources: Path, tmp_path: Path) -> None:
    """Nothing of a student is scored for it, and all seeds have the same teachers."""
    output = tmp_path / "run"
    more = ("--selection", "dynabert", "--sparsity", "0.5", "--score-on", "validation", "--seeds", "0,7", "--no-plots")
    assert main(command(sources, output, *more)) == 0
    assert {"trial", "stark-dynabert"} < record(output)["results"].keys()
    dense = fastdistill.from_pretrained(output / "teacher")
    scores = fastdistill.Scores.load(output / "importance" / "expressiveness.safetensors")
    expected = fastdistill.prune(dense, scores, 0.5, uniform=True).state_dict()
    for seed in ("seed-0", "seed-7"):
        assert not (output / seed / "scores").exists()
        teacher = fastdistill.from_pretrained(output / seed / "teacher-stark-dynabert-0.5")
        assert {block.neurons for block in blocks(teacher)} == {16}
        for name, value in teacher.state_dict().items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.slow
def test_a_grid_keeps_the_best(sources: Path, tmp_path: Path) -> None:
    more = ["--sparsity", "0.5", "--learning-rate-grid", "0.01,0.00001", "--batch-size-grid", "8,16", "--no-plots"]
    arguments = command(sources, tmp_path / "run")
    place = arguments.index("--learning-rate")
    assert main([*arguments[:place], *arguments[place + 2 :], *more]) == 0
    folders = sorted((tmp_path / "run" / "seed-0").glob("trial-*"))
    assert [path.name for path in folders] == ["trial-0.01-16", "trial-0.01-8", "trial-1e-05-16", "trial-1e-05-8"]
    values = [json.loads((path / "stage.json").read_text())["result"]["accuracy"] for path in folders]
    assert record(tmp_path / "run")["results"]["trial"]["accuracy"] == max(values)


@pytest.mark.slow
def test_baselines_are_the_best_of_as_many(sources: Path, tmp_path: Path) -> None:
    """As many runs as there are sparsities, with other batches; and what differs from them has an interval."""
    output = tmp_path / "run"
    assert main(command(sources, output, "--sparsity", "0.25,0.5", "--baselines", "--no-plots")) == 0
    found = record(output)
    for name in ("finetuned", "kd"):
        stages = [json.loads((output / "seed-0" / one / "stage.json").read_text()) for one in (name, f"{name}-run-2")]
        assert [one["came_from"]["run"] for one in stages] == [0, 1]
        assert stages[0]["log"] != stages[1]["log"]
        assert found["results"][name]["selection"] == max(one["result"]["selection"] for one in stages)
    for reference in ("finetuned", "kd"):
        for name in {"stark", "trial", "finetuned", "kd"} - {reference}:
            against = found["results"][name]["against"][reference]
            expected = found["results"][name]["accuracy"] - found["results"][reference]["accuracy"]
            assert against["difference"] == pytest.approx(expected)
            assert against["low"] <= against["difference"] <= against["high"]
            excludes = against["low"] > 0 or against["high"] < 0
            assert (against["verdict"] in ("better", "worse")) == excludes


@pytest.mark.slow
def test_tradeoffs_and_a_pruned_assistant(sources: Path, tmp_path: Path) -> None:
    output, more = tmp_path / "run", ("--tradeoff", "0,0.5,1", "--selection", "knowledge,random", "--sparsity", "0.5")
    arguments = command(sources, output, *more, "--assistant-sparsity", "0.3", "--no-plots", student="sparsity")
    assert main(arguments) == 0
    found = record(output)
    names = [f"stark-tradeoff-{one}" for one in ("0", "0.5", "1")]
    assert list(found["results"]) == ["teacher", "assistant-0.3", "takd", "trial", *names, "stark-rand"]
    dense = fastdistill.from_pretrained(output / "teacher")
    scores = [fastdistill.Scores.load(output / "seed-0" / "scores" / f"{k}.safetensors").normalized()
              for k in ("expressiveness", "friendliness")]  # fmt: skip
    for tradeoff, name in zip((0.0, 0.5, 1.0), names, strict=True):
        expected = fastdistill.prune(dense, scores[1].lerp(scores[0], tradeoff), 0.5)
        sparse = fastdistill.from_pretrained(output / "seed-0" / f"teacher-{name}-0.5")
        torch.testing.assert_close(sparse.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assistant = fastdistill.from_pretrained(output / "assistant-0.3")
    assert sum(block.heads for block in blocks(assistant)) == 12 - round(12 * 0.3)


def test_forms_of_the_loss() -> None:
    """tau^2 KD + CE; as printed KD + CE; as released (tau^2 KD + CE) / 2."""

    def objective(**asked: Any) -> Any:
        settings = StarkSettings(task="t", teacher="m", student_layers=1, output="o", **asked)
        return logits_objective(settings, tiny.TASK, divergence="soft_ce")

    logits = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    student, teacher = (SimpleNamespace(logits=one) for one in logits)
    labels = torch.tensor([0, 1, 1, 0, 1])
    p = (teacher.logits / 2).softmax(-1)
    kd = -(p * (student.logits / 2).log_softmax(-1)).sum(-1).mean()
    ce = F.cross_entropy(student.logits, labels)
    expected = {None: 4 * kd + ce, "paper": kd + ce, "released": (4 * kd + ce) / 2}
    for form, loss in expected.items():
        torch.testing.assert_close(objective(form=form)(student, teacher, labels), loss)


def test_unstructured_scores_are_by_example(tmp_path: Path) -> None:
    """E |w dL/dw|, an example at a time; or of a batch's mean."""
    teacher, student = tiny.pair()
    objective = LogitsKD(divergence="soft_ce", ce_weight=0.0)
    teacher, student = teacher.float(), student.float()
    collate, data = DataCollatorWithPadding(tiny.tokenizer()), tiny.dataset(6)
    rows = {"example": [[row] for row in range(6)], "batch": [[0, 1, 2, 3], [4, 5]]}
    for reduce, groups in rows.items():
        scoring = Scoring(
            name="s", teacher=teacher, student=student, objective=objective, reduce=reduce, of_weights=True  # type: ignore[arg-type]
        )  # fmt: skip
        found = scoring.find(data, collate, 4, tmp_path / "unfinished")
        name, weight = next(iter(encoder_weights(teacher)))
        expected = torch.zeros_like(weight)
        for group in groups:
            batch = collate(list(data.select(group).select_columns(["input_ids", "attention_mask", "labels"])))
            labels = batch.pop("labels")
            loss = F.cross_entropy(teacher.eval()(**batch).logits, labels)
            expected += (weight * torch.autograd.grad(loss, weight)[0]).abs().detach() / len(groups)
        torch.testing.assert_close(found.expressiveness.matrices[name], expected, rtol=1e-4, atol=1e-8)


def saving_often(arguments: list[str]) -> None:
    units.SAVE_EVERY = 1
    main(arguments)


@pytest.mark.slow
def test_a_killed_run_goes_on(sources: Path, finished: Path, tmp_path: Path) -> None:
    """SIGKILL in the midst of a training, of scores, and of the second seed; the same command ends with the same
    results."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    (output / "results.json").unlink()
    for name in ("seed-0/trial", "seed-0/scores", "seed-7/stark-rand-0.25", "seed-7/stark-rand-0.5"):
        shutil.rmtree(output / name)
    before = written(output)
    arguments = command(sources, output, *EVERYTHING, "--checkpoints", "3")
    middles = ("seed-0/trial/checkpoint-*", "seed-0/scores/unfinished.safetensors", "seed-7/stark-rand-0.25/stage.json")
    for middle in middles:
        kill_when(lambda middle=middle: list(output.glob(middle)), start(saving_often, arguments))
    assert not (output / "results.json").exists()
    assert main(arguments) == 0
    assert measured(output) == measured(finished)
    assert not list(output.rglob("unfinished*"))
    assert done_since(output, before) == {"trial", "scores", "stark-rand-0.25", "stark-rand-0.5"}


def test_a_budget_in_place_of_sparsities(sources: Path, tmp_path: Path) -> None:
    budgets = ("7000", "8000")
    assert main(command(sources, tmp_path / "run", "--budget", ",".join(budgets), "--no-plots")) == 0
    found = record(tmp_path / "run")["sparsities"]["stark"]
    for tried, budget in zip(found.values(), map(float, budgets), strict=True):
        assert 0.97 * budget < tried["teacher"]["parameters"] <= budget


@pytest.mark.parametrize(
    "more, message",
    [
        (("--student-sparsity", "0.5"), "expected either --student-layers or --student-sparsity"),
        (("--sparsity", "1"), "1 is not a finite number above 0 and below 1"),
        (("--selection", "best"), "'best' is not among knowledge, random, auto"),
        (("--hidden-weight", "2"), "--objective kd has no hidden states"),
        (("--unstructured", "--selection", "auto"), "--unstructured does not have"),
        (("--unstructured", "--round-to", "8"), "--round-to would have no effect"),
        (("--selection", "random", "--reduce", "batch"), "--reduce would have no effect"),
        (("--assistant-sparsity", "0.5"), "--assistant-sparsity is 0.5; expected less than --student-sparsity"),
        (("--pkd-over", "sum"), "--pkd-over would have no effect"),
        (("--report-on", "test"), "--report-on is test, but task has no labelled test split"),
        (("--selection", "random", "--tradeoff", "0.2"), "--tradeoff would have no effect"),
        (("--selection", "random", "--score-on", "validation"), "--score-on would have no effect"),
        (("--selection", "auto", "--sparsity", "0.2"), "--sparsity would have no effect"),
        (("--sparsity", "0.2", "--budget", "9e3"), "expected either --sparsity or --budget"),
        (("--unstructured", "--budget", "9e3"), "--budget would have no effect"),
        (("--selection", "auto", "--budget", "9e3"), "--budget would have no effect"),
        (("--budget", "1e3"), "--budget is 1000; expected at least"),
        (("--budget", "1e9"), "--budget is 1e+09; expected less than the teacher's"),
        (("--learning-rate-grid", "0.1"), "--learning-rate would have no effect"),
        (("--kd-temperature", "3"), "--kd-temperature would have no effect"),
        (("--student-layers", "4"), "--student-layers is 4; the teacher has 3"),
        (("--objective", "ckd"), "--student-layers is 1; --objective ckd"),
        (("--chain", "2,3"), "--chain is 2,3; expected falling numbers"),
    ],
)
def test_what_cannot_be(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert message in commands.refused(command(sources, tmp_path / "run", *more), capsys)
    assert not (tmp_path / "run").exists()
