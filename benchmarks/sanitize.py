"""What `make gpu-sanitize` runs: tests/cuda under compute-sanitizer's memcheck and racecheck, a process a file.

    python -m benchmarks.sanitize [--only OP] [--seconds 600]

Tests that need most of the card's memory are left out: they take hours there.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu import ALIASES, CORES, MUCH_MEMORY, ROOT, run

TOOLS = ("memcheck", "racecheck")
FOUND = 86  # exit status that the tool is told to end with where it found something
NO_TESTS = 5  # pytest's, where all were left out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one op")
    parser.add_argument("--seconds", type=float, default=600, help="for each file and tool, at most")
    options = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer: not installed")
        return 0
    only = options.only and ALIASES.get(options.only, options.only.rstrip("_"))
    files = sorted((ROOT / "tests" / "cuda").glob(f"test_{only or '*'}.py"))
    folder = Path(tempfile.mkdtemp())

    def check(tool: str, file: Path) -> tuple[str, int]:
        leave_out, more = f"not {MUCH_MEMORY}", {}
        if tool == "memcheck":  # with each allocation by itself, so that what lies beyond it is seen; not so in graphs
            leave_out, more = f"{leave_out} and not graph", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        log = folder / f"{tool}-{file.stem}.log"
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
        command += ["--target-processes", "all", sys.executable, "-m", "pytest", "-q", "--tb=short"]
        with log.open("w") as said:
            status = run([*command, "-k", leave_out, str(file.relative_to(ROOT))], options.seconds, said, **more)
        status = 0 if status == NO_TESTS else status
        return log.read_text()[-3000:] if status else "", status

    jobs = [(tool, file) for tool in TOOLS for file in files]
    with ThreadPoolExecutor(min(8, CORES)) as pool:
        results = list(pool.map(lambda job: check(*job), jobs))
    for (tool, file), (said, status) in zip(jobs, results, strict=True):
        outcome = {0: "nothing found", FOUND: "ERRORS", 124: "not done in time"}.get(status, f"ended with {status}")
        print(f"{tool} {file.name}: {outcome}\n{said}".rstrip())
    return int(any(status for _, status in results))


if __name__ == "__main__":
    sys.exit(main())
