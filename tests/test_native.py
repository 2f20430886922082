"""Every instruction set that was built, and plain PyTorch, give the answers that the op tests ask for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastdistill
from fastdistill.ops import native

ISAS = [m.rpartition("_C_")[2] for m in native.NATIVE.build.get("modules", []) if "_C_" in m]
ROOT = Path(__file__).parent.parent


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, cwd=ROOT
    )


def run_op_tests(*options: str, **env: str) -> str:
    """Once more; that shapes are any, Hypothesis has shown."""
    command = [sys.executable, "-m", "pytest", "tests/ops", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-m", "not hypothesis", *options]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def lower_isas() -> list[str]:
    """Those built for less than this machine runs: what it lacks it cannot try."""
    isas = ["default", "avx2", "avx512"]
    own = torch.backends.cpu.get_cpu_capability().lower()
    return [isa for isa in isas[: isas.index(own)] if isa in ISAS] if own in isas else []


@pytest.mark.slow
@pytest.mark.parametrize("isa", lower_isas())
def test_ops_on_every_instruction_set_built(isa: str) -> None:
    chosen = {"ATEN_CPU_CAPABILITY": isa}
    seen = run_python("import fastdistill.ops.native as n; print(n.NATIVE.cpu.isa)", **chosen)
    assert seen.stdout.strip() == isa.upper(), seen.stderr
    of_any = ("compile", "opcheck", "bad_arguments", "gradcheck", "reference", "autocast")  # instruction set
    numbers = ("--ignore=tests/ops/test_contracts.py", "-k", " and ".join(f"not {name}" for name in of_any))
    assert " passed" in run_op_tests(*numbers, **chosen)


@pytest.mark.slow
def test_ops_in_plain_pytorch() -> None:
    one = "contracts and opcheck and False-contiguous"  # that outputs are no views of inputs, which are not written to
    shared = ("compile", "opcheck", "bad_arguments", "gradcheck", "vmap", "every_place")  # autograd, and oracles
    chosen = f"{one} or " + " and ".join(f"not {name}" for name in shared)
    assert " passed" in run_op_tests("-k", chosen, FASTDISTILL_NATIVE="0")
    report = run_python("import fastdistill; print(fastdistill.doctor())", FASTDISTILL_NATIVE="0").stdout
    assert "C++ kernels: none; FASTDISTILL_NATIVE=0" in report
    assert "C++ (" not in report


def test_this_machine_is_served_by_what_was_built() -> None:
    if not ISAS:
        pytest.skip("built without a compiler")
    assert native.NATIVE.cpu is not None, native.NATIVE.why_no_cpu
    assert native.NATIVE.cpu.torch_version == torch.__version__.split("+")[0]


@pytest.fixture
def build_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    return tmp_path / "_build.json"


def test_built_for_another_torch(build_json: Path) -> None:
    build_json.write_text(json.dumps({"torch": "1.13.1", "cuda": None, "modules": ["fastdistill._C_avx2"]}))
    with pytest.warns(UserWarning, match="built for torch 1.13.1 but torch .* is running; rebuild with") as caught:
        found = native.load()
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert found.cpu is None and not found.cuda and "1.13.1" in found.why_no_cpu


def test_never_built(build_json: Path) -> None:
    found = native.load()
    assert found.cpu is None and "--no-build-isolation" in found.why_no_cpu


def test_no_module_for_this_machine(build_json: Path) -> None:
    build_json.write_text(json.dumps({"torch": torch.__version__, "cuda": None, "modules": ["fastdistill._C_vsx"]}))
    found = native.load()
    assert found.cpu is None and found.why_no_cpu.endswith("built for vsx")


def test_a_module_that_does_not_load(build_json: Path) -> None:
    isa = torch.backends.cpu.get_cpu_capability().lower()
    build_json.write_text(json.dumps({"torch": torch.__version__, "cuda": None, "modules": [f"fastdistill._C_{isa}"]}))
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="does not load: no such thing"):

        def broken(name: str) -> None:
            raise ImportError("no such thing\nsecond line")

        patch.setattr(native.importlib, "import_module", broken)
        assert native.load().cpu is None


def test_doctor_names_every_op() -> None:
    report = fastdistill.doctor()
    assert {op.name for op in report.ops} >= {"kd_ce_loss", "scale_rows"}
    for op in report.ops:
        assert op.name in str(report) and op.cpu in str(report)
    assert torch.__version__ in str(report)
    neurons = "the activation's sweep" if native.NATIVE.cpu else "multiplications"
    assert f"gate and score: on CPU neurons by {neurons}" in str(report)


def test_import_is_light() -> None:
    heavy = {"transformers", "datasets", "triton", "sklearn", "matplotlib", "scipy"}
    code = "import sys, torch; before = set(sys.modules); import fastdistill; print(*set(sys.modules) - before)"
    assert not heavy & set(run_python(code).stdout.split())
