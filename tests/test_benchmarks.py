"""`make gpu` without a GPU: its table, its goals, what it leaves out, and that nothing that fails ends it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import goals, gpu, recipes, report, sanitize
from benchmarks.harness import OURS

FAKE = """
import os, signal, time
import pytest
from benchmarks.harness import LARGE, OURS, measure


@pytest.mark.parametrize("case", ["good", "wrong", "killed", "large"])
@pytest.mark.parametrize("implementation", ["eager", OURS])
def test_fake(benchmark, implementation, case):
    if implementation == OURS and case == "wrong":
        raise ValueError("this one fails")
    if implementation == OURS and case == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    moved = LARGE if case == "large" else 0
    measure(
        benchmark, lambda: time.sleep(1e-4), op="fake", case=case, implementation=implementation, bytes_moved=moved
    )
"""


def row(implementation: str, seconds: float, *, op: str = "op", case: str = "1×2", **more: Any) -> dict[str, Any]:
    named = {"op": op, "case": case, "implementation": implementation, "device": "cuda", "dtype": "bfloat16"}
    return {**named, "median_s": seconds, "peak_extra_bytes": None, **more}


def kept(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    what = {"date": "2026-11-26", "machine": {"gpu": "NVIDIA H100"}, "versions": {"torch": "2.13"}}
    return {**what, "left_out": [], "errors": {}, "seconds": {}, "rows": list(rows), **more}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with benchmarks of which one fails and one ends its process."""
    monkeypatch.setenv("PYTHONPATH", str(gpu.ROOT))
    monkeypatch.setenv("FASTDISTILL_BENCHMARK_SIZES", "tiny")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "test_fake.py").write_text(FAKE)
    return tmp_path


@pytest.mark.slow
def test_what_fails_ends_nothing_else(fake: Path) -> None:
    (fake / "test_broken.py").write_text("import no_such_module")
    errors = gpu.benchmarks(["test_broken.py", "test_fake.py"], fake, 2, lambda _: 200)
    assert "no_such_module" in errors.pop("test_broken.py")
    measured = sorted((one["case"], one["implementation"]) for one in gpu.measured(fake))
    expected = [(case, name) for case in ("good", "killed", "large", "wrong") for name in ("eager", OURS)]
    assert measured == [one for one in expected if one not in (("wrong", OURS), ("killed", OURS))]
    (wrong, why), (killed, end) = sorted(errors.items(), reverse=True)
    assert "wrong" in wrong and why == "ValueError: this one fails"
    assert "killed" in killed and end == "the process ended with -9"


@pytest.mark.slow
def test_what_takes_too_long_is_named(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE", 2)
    (fake / "test_fake.py").write_text("import time\n\n\ndef test_long(benchmark):\n    time.sleep(300)\n")
    errors = gpu.benchmarks(["test_fake.py"], fake, 1, lambda _: 4)
    assert gpu.measured(fake) == [] and errors  # the file's where not even pytest was up in time
    assert all(name.startswith("test_fake.py") for name in errors)


def test_a_command_is_stopped_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE", 1)
    assert gpu.run(["sleep", "60"], 0.2) == 124
    assert gpu.run(["false"], 10) == 1


@pytest.mark.parametrize(
    "what, status",
    [
        ({}, 0),
        ({"tests": {"passed": 1, "skipped": 0, "failed": {"test_x": "AssertionError"}, "seconds": 1}}, 1),
        ({"errors": {"test_y": "ValueError"}}, 1),
        ({"recipes": {"kd": {"status": 2, "seconds": 3, "said": "no"}}}, 1),
    ],
)
def test_status_and_results(
    what: dict[str, Any], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    passed = {"passed": 3, "skipped": 1, "failed": {}, "seconds": 2.0}
    rows = [row(OURS, 1e-3), row("eager", 3e-3)]
    monkeypatch.setattr(gpu, "tests", lambda *_: what.get("tests", passed))
    monkeypatch.setattr(gpu, "benchmarks", lambda *_: what.get("errors", {}))
    monkeypatch.setattr(gpu, "measured", lambda *_: rows)
    monkeypatch.setattr(recipes, "run", lambda *_: what.get("recipes", {"kd": {"status": 0, "seconds": 3}}))
    monkeypatch.setattr(gpu, "WANTED", {"Liger-Kernel": "no_such_package", "torch": "torch"})
    assert gpu.main(["--output", str(tmp_path)]) == status
    said = capsys.readouterr().out
    assert "Liger-Kernel: not installed" in said and "torch: not" not in said
    assert "| op | 1×2 | bfloat16 | 1 ms | eager 3.0× |" in said
    for problem in ("test_x: AssertionError", "test_y: ValueError", "recipe kd: FAILED (2)"):
        assert (problem in said) == (problem.split(":")[0].split()[-1] in json.dumps(what) and status == 1)
    written = json.loads((tmp_path / f"gpu-{gpu.card()}.json").read_text())
    assert written["rows"] == rows and written["left_out"] == ["Liger-Kernel"] and written["versions"]["torch"]


def test_what_was_measured_before_a_stop_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def benchmarks(targets: Any, folder: Path, *more: Any) -> dict[str, str]:
        log, result = folder / "share-0.jsonl", tmp_path / f"gpu-{gpu.card()}.json"
        log.write_text(json.dumps({"row": row(OURS, 1e-3)}) + '\n{"row": {"op": "half wri')
        while not result.exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "SAVED", 0.05)
    monkeypatch.setattr(gpu, "benchmarks", benchmarks)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--output", str(tmp_path), "--stages", "benchmarks"])
    assert json.loads((tmp_path / f"gpu-{gpu.card()}.json").read_text())["rows"] == [row(OURS, 1e-3)]


def test_an_unknown_op_is_refused() -> None:
    with pytest.raises(SystemExit, match="ONLY is 'kd'; expected one of .*kd_ce_loss"):
        gpu.main(["--only", "kd"])


@pytest.mark.parametrize(
    "only", ["kd_ce_loss", "uncertainty", "gated_attention", "gated_ffn", "accumulate_sensitivity", "proximity_conv"]
)
def test_one_op_has_its_tests_and_benchmarks(only: str) -> None:
    names = {path.as_posix() for path in gpu.test_files(only)}
    assert {f"tests/ops/test_{only}.py", f"tests/cuda/test_{only}.py", "tests/cuda/test_graphs.py"} <= names
    assert not any(f"test_{other}" in name for other in ("pruning", "trainer") for name in names)
    assert gpu.benchmark_files(only) == [f"benchmarks/test_{only}.py"]


def test_all_benchmarks_named_are_there() -> None:
    assert len(gpu.benchmark_files(None)) == len(gpu.BENCHMARKS)
    assert set(gpu.test_files("gated_ffn")) < set(gpu.test_files(None))


def test_the_card_is_named_shortly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DEVICE", "cuda")
    for name, short in {
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100-sxm4-80gb",
        "NVIDIA GeForce RTX 4090": "rtx-4090", "NVIDIA H100 PCIe": "h100",
    }.items():  # fmt: skip
        monkeypatch.setattr("torch.cuda.get_device_name", lambda name=name: name)
        assert gpu.card() == short


@pytest.mark.parametrize(
    "op, case, rows, met",
    [
        ("kd_ce_loss", "8192×128256", [(OURS, 2.0, {"copy_share": 0.91})], True),
        ("kd_ce_loss", "8192×128256", [(OURS, 2.0, {"copy_share": 0.61})], False),
        ("kd_ce_loss", "32×2", [(OURS, 2.0, {}), ("eager", 3.0, {}), ("torch.compile", 1.9, {})], False),
        ("kd_ce_loss", "32×2", [(OURS, 2.0, {}), ("eager", 3.0, {}), ("torch.compile", 2.0, {})], True),
        ("gated_attention", "64×12×512×64, 0% closed", [(OURS, 2.0, {}), ("cuDNN", 1.8, {}), ("eager", 9, {})], False),
        ("gated_attention forward", "8×32×4096×128, 0% closed", [(OURS, 2.0, {}), ("cuDNN", 2.0, {})], True),
        ("gated_ffn and gradients", "64×512×1024×4096, 50% off", [(OURS, 1.05, {}), ("compacted", 1.0, {})], True),
        ("gated_ffn and gradients", "64×512×1024×4096, 50% off", [(OURS, 1.06, {}), ("compacted", 1.0, {})], False),
        ("select_uncertain", "10% of 1000000×3", [(OURS, 0.05e-3, {}), ("eager", 0.01e-3, {})], True),
        ("train step", "MiniLM 32x128", [(OURS, 2.0, {}), ("sdpa", 1.9, {}), ("eager", 3.0, {})], False),
        (
            "train step",
            "BERT-base 32x128",
            [(OURS, 0.02, {}), (f"{OURS}, graphs", 0.007, {}), ("sdpa", 0.024, {})],
            True,
        ),
        (
            "train step",
            "BERT-base 32x128",
            [(OURS, 0.02, {}), (f"{OURS}, graphs", 0.009, {}), ("sdpa", 0.024, {})],
            False,
        ),
        ("train step", "BERT-base 32x128", [(OURS, 0.007, {}), ("sdpa", 0.006, {})], False),
        ("score", "BERT-base 32x128 bfloat16", [(OURS, 0.004, {})], True),
    ],
)
def test_goals(op: str, case: str, rows: list[tuple[str, float, dict[str, Any]]], met: bool) -> None:
    cases = report.by_case([row(name, seconds, op=op, case=case, **more) for name, seconds, more in rows])
    verdict = goals.judge(op, case, cases)
    assert verdict is not None and verdict.met is met


def test_goals_that_name_another_case_or_op() -> None:
    open_, half = "8×32×4096×128, 0% closed", "8×32×4096×128, 50% closed"
    rows = [row("cuDNN", 1.0, op="gated_attention", case=open_), row(OURS, 0.56, op="gated_attention", case=half)]
    verdict = goals.judge("gated_attention", half, report.by_case(rows))
    assert verdict is not None and (verdict.says, verdict.value, verdict.met) == ("≤ 0.55× cuDNN", "0.56×", False)
    by_row = 'kd_ce_loss, reduction="none"'
    rows = [row(OURS, 1.0, op="kd_ce_loss"), row(OURS, 1.03, op=by_row), row("eager", 5.0, op=by_row)]
    verdict = goals.judge(by_row, "1×2", report.by_case(rows))
    assert verdict is not None and verdict.met and verdict.says == "≤ 1.03× kd_ce_loss"
    assert goals.judge("new", "1×2", report.by_case([row(OURS, 1.0, op="new")])) is None  # nothing to compare with


def test_table_of_a_gpu() -> None:
    rows = [
        row(OURS, 2e-3, op="kd_ce_loss", case="8192×128256", copy_share=0.61, peak_extra_bytes=2**31),
        row("eager", 20e-3, op="kd_ce_loss", case="8192×128256"),
        row(f"{OURS} (op alone)", 1.9e-3, op="kd_ce_loss", case="8192×128256"),
        row("lonely", 1.0, case="of no interest"),
    ]
    head, _, first, second = report.table(kept(*rows)).splitlines()
    assert head == f"| op | case | dtype | {OURS} | {report.OTHERS} | share of the limit | peak memory | goal |"
    assert first == (
        "| kd_ce_loss | 8192×128256 | bfloat16 | 2 ms | eager 10.0× | 61% of copy | 2048 MiB "
        "| ≥ 90% of copy: **missed, 61%** |"
    )
    assert second.startswith("| kd_ce_loss (op alone) | 8192×128256 | bfloat16 | 1.9 ms | eager 10.5× |")


def test_picture_and_headlines(tmp_path: Path) -> None:
    rows = [row(OURS, 1e-3), row("eager", 3e-3), row(OURS, 1.0, op="train step", case="BERT-base 32x128")]
    rows += [row("sdpa", 2.0, op="train step", case="BERT-base 32x128"), row(OURS, 1.0, case="alone")]
    headline = [row(name, 1.0, op="uncertainty", case="8192×128256", copy_share=0.93) for name in (OURS, "eager")]
    (tmp_path / "gpu-h100.json").write_text(json.dumps(kept(*rows, *headline)))
    report.show(kept(*rows, *headline), "gpu-h100", tmp_path)
    drawn = (tmp_path / "gpu-h100.svg").read_text()
    assert all(text in drawn for text in ("train step", "BERT-base 32x128", "sdpa", "uncertainty", "3×"[-1]))
    text = report.headlines(tmp_path)
    assert "train step" in text and "uncertainty" in text and "| op | 1×2" not in text
    assert "(benchmarks/results/gpu-h100.svg)" in text and "(benchmarks/results/gpu-h100.md)" in text


@pytest.mark.slow
def test_a_recipe_that_fails_is_told(tmp_path: Path) -> None:
    found = recipes.run(tmp_path, 100, {"kd": "kd --no-such-option"})
    assert found["kd"]["status"] == 2 and "--no-such-option" in found["kd"]["said"]
    assert recipes.show(found).startswith("recipe kd: FAILED (2)")


def test_no_sanitizer(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["sanitize"])
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert sanitize.main() == 0 and capsys.readouterr().out == "compute-sanitizer: not installed\n"
