"""Builds the C++ kernels once per instruction set, and the CUDA kernels where torch has CUDA.

Environment: FASTDISTILL_ISA=all (default) | native (what this machine runs); FASTDISTILL_REQUIRE_NATIVE=1 makes a
failed build an error instead of a package that computes with plain PyTorch.
"""

from __future__ import annotations

import json
import os
import platform
import warnings
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
ISA_FLAGS = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
CUDA_ARCHITECTURES = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_90,code=compute_90",  # for what comes after
]


def wanted_isas() -> list[str]:
    choice = os.environ.get("FASTDISTILL_ISA", "all")
    if choice not in ("all", "native"):
        raise ValueError(f"FASTDISTILL_ISA={choice!r}: expected 'all' or 'native'")
    import torch

    if choice == "native":
        capability = torch.backends.cpu.get_cpu_capability()
        return [capability if capability in ISA_FLAGS else "DEFAULT"]
    return list(ISA_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["DEFAULT"]


def sources(pattern: str, *folders: str) -> list[str]:
    return [str(p.relative_to(ROOT)) for f in folders for p in sorted((ROOT / "csrc" / f).glob(pattern))]


def extensions() -> list:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CppExtension, CUDAExtension

    cpu_sources = sources("*.cpp", "", "autograd", "cpu", "triton")
    modules = [
        CppExtension(
            f"fastdistill._C_{isa.lower()}",
            cpu_sources,
            extra_compile_args=[
                "-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fopenmp", "-DAT_PARALLEL_OPENMP=1",
                "-Wno-attributes", "-Wno-maybe-uninitialized", "-Wno-unknown-pragmas",
                f"-DCPU_CAPABILITY={isa}", f"-DCPU_CAPABILITY_{isa}", *flags,
            ],
        )
        for isa, flags in ISA_FLAGS.items()
        if isa in wanted_isas()
    ]  # fmt: skip
    cuda_sources = sources("*.cu", "cuda")
    if torch.version.cuda and CUDA_HOME and cuda_sources:
        # by default for what can be bought, not for the GPU that happens to be here, if any
        architectures = [] if os.environ.get("TORCH_CUDA_ARCH_LIST") else CUDA_ARCHITECTURES
        stable = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]  # one binary for torch >= 2.11
        modules.append(
            CUDAExtension(
                "fastdistill._cuda",
                cuda_sources,
                extra_compile_args={
                    "cxx": ["-O3", "-std=c++20", *stable],
                    "nvcc": ["-O3", "-std=c++20", "--threads=2", *architectures, *stable],
                },
            )
        )
    return modules


def commands() -> dict[str, type]:
    import torch
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """One folder of objects per module, so that a rebuild compiles only what changed; records what was built."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if os.environ.get("FASTDISTILL_REQUIRE_NATIVE") == "1":
                    raise
                warnings.warn(f"fastdistill: built without compiled kernels: {error}", stacklevel=1)
                return
            modules = [extension.name for extension in self.extensions]
            built = {"torch": torch.__version__, "cuda": torch.version.cuda, "modules": modules}
            package = ROOT / "fastdistill" if self.inplace else Path(self.build_lib) / "fastdistill"
            package.mkdir(parents=True, exist_ok=True)
            (package / "_build.json").write_text(json.dumps(built))

        def build_extensions(self) -> None:
            all_extensions, base = self.extensions, self.build_temp
            for extension in all_extensions:
                self.extensions, self.build_temp = [extension], os.path.join(base, extension.name)
                super().build_extensions()
            self.extensions, self.build_temp = all_extensions, base

    return {"build_ext": Build}


try:
    native = {"ext_modules": extensions(), "cmdclass": commands()}
except ImportError as error:
    if os.environ.get("FASTDISTILL_REQUIRE_NATIVE") == "1":
        raise
    hint = "with torch installed, use pip install --no-build-isolation"
    warnings.warn(f"fastdistill: no compiled kernels: {error}; {hint}", stacklevel=1)
    native = {}

setup(
    packages=[*find_packages(include=["fastdistill*"]), "fastdistill.kernels"],
    package_dir={"fastdistill": "fastdistill", "fastdistill.kernels": "kernels"},
    package_data={"fastdistill": ["py.typed"]},
    **native,
)
