"""Which implementation serves each op on this machine, and why the others do not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass

import torch

from fastdistill.ops.gate_rules import gates_run_on
from fastdistill.ops.library import OPS, TRITON, has_kernel
from fastdistill.ops.linear import linear_runs_on
from fastdistill.ops.native import NATIVE


@dataclass(frozen=True)
class OpReport:
    """``cpu`` and ``cuda`` name what serves the op there: ``"C++ (AVX512)"``, ``"Triton"``, ``"CUDA C++"``,
    ``"PyTorch (reference)"``, or ``"-"`` where there is no such device."""

    name: str
    cpu: str
    cuda: str


@dataclass(frozen=True)
class Report:
    """``str(report)`` is what ``fastdistill doctor`` prints."""

    versions: dict[str, str]
    facts: tuple[str, ...]
    ops: tuple[OpReport, ...]

    def __str__(self) -> str:
        lines = ["  ".join(f"{name} {version}" for name, version in self.versions.items())]
        lines += [f"- {fact}" for fact in self.facts]
        width = max(len(op.name) for op in self.ops)
        lines.append(f"{'op':{width}}  {'CPU':20}  CUDA")
        lines += [f"{op.name:{width}}  {op.cpu:20}  {op.cuda}" for op in self.ops]
        return "\n".join(lines)


def doctor() -> Report:
    """Look at what was built, what is installed and what PyTorch's dispatcher will choose for each op."""
    packages = ("torch", "triton", "transformers", "datasets", "accelerate")
    versions = {"fastdistill": importlib.metadata.version("fastdistill"), "python": platform.python_version()}
    versions |= {name: _version(name) for name in packages}
    return Report(versions, tuple(_facts()), tuple(OpReport(name, _cpu(name), _cuda(name)) for name in OPS))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _facts() -> list[str]:
    if NATIVE.cpu is not None:
        build = NATIVE.cpu
        cpu = f"C++ kernels: {build.isa}, compiler {build.compiler}, built for torch {NATIVE.build['torch']}"
    else:
        cpu = f"C++ kernels: none; {NATIVE.why_no_cpu}"
    if not torch.version.cuda:
        triton = "this torch has no CUDA"
    elif importlib.util.find_spec("triton") is None:
        triton = "triton is not installed"
    else:
        triton = "serve CUDA tensors"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    graphs = (
        "capture training and scoring steps, where asked for" if torch.cuda.is_available() else "none; no CUDA device"
    )
    return [
        cpu,
        f"CUDA C++ kernels: {'loaded' if NATIVE.cuda else 'none; ' + NATIVE.why_no_cuda}",
        f"Triton kernels: {triton}",
        f"CPU: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads; CUDA device: {device}",
        gates_run_on(),
        linear_runs_on(),
        f"CUDA graphs: {graphs}",
    ]


def _cpu(op: str) -> str:
    return f"C++ ({NATIVE.cpu.isa})" if NATIVE.cpu is not None and has_kernel(op, "CPU") else "PyTorch (reference)"


def _cuda(op: str) -> str:
    if not torch.version.cuda:
        return "-"
    if op in TRITON:
        return "Triton"
    return "CUDA C++" if has_kernel(op, "CUDA") else "PyTorch (reference)"
