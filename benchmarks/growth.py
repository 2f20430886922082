"""How the time of a STARK search grows with the examples, the sparsities and the teacher's size, beside that of one
distillation, its trial.

    python -m benchmarks.growth --task FOLDER [--figure docs/growth.svg] [--output runs/growth]

A search from a teacher that is given, into a third of its layers, for one epoch. What is in the output folder already
is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HEIGHT, WIDTH = 2.6, 9.0  # inches


@dataclass(frozen=True)
class Search:
    examples: int = 1000
    sparsities: int = 3
    layers: int = 6
    width: int = 384

    @property
    def name(self) -> str:
        return f"{self.examples}-{self.sparsities}-{self.layers}x{self.width}"

    @property
    def size(self) -> str:
        return f"{self.layers}×{self.width}"


BASE = Search()
PANELS: dict[str, tuple[str, list[Search]]] = {
    "training examples": ("examples", [replace(BASE, examples=n) for n in (1000, 4000, 16000)]),
    "sparsities": ("sparsities", [replace(BASE, sparsities=n) for n in (1, 3, 9)]),
    "teacher, layers × width": ("size", [replace(BASE, layers=3), BASE, replace(BASE, layers=12, width=768)]),
}


def save_teacher(search: Search, folder: Path) -> None:
    """MiniLM, or its first layers; of another width, a BERT of random weights, which take as long."""
    from transformers import BertConfig, BertForSequenceClassification

    from fastdistill import first_layers
    from fastdistill.data.tasks import TASKS
    from fastdistill.models.loading import load_classifier, load_tokenizer

    model: Any = load_classifier("minilm", TASKS["sst2"])
    if search.width != model.config.hidden_size:
        sizes = {"hidden_size": search.width, "intermediate_size": 4 * search.width}
        own = {"num_hidden_layers": search.layers, "num_attention_heads": search.width // 64}
        model = BertForSequenceClassification(BertConfig.from_dict({**model.config.to_dict(), **sizes, **own}))
    first_layers(model, search.layers).save_pretrained(folder)
    load_tokenizer("minilm").save_pretrained(folder)


def measure(search: Search, task: str, output: Path) -> dict[str, float]:
    """Seconds of the whole and of its trial."""
    results = output / search.name / "results.json"
    if not results.exists():
        teacher = output / search.size
        if not teacher.exists():
            save_teacher(search, teacher)
        sparsities = ",".join(f"{(i + 1) / (search.sparsities + 1):g}" for i in range(search.sparsities))
        subprocess.run(
            [
                sys.executable, "-m", "fastdistill", "stark", "--task", task, "--teacher", str(teacher),
                "--teacher-epochs", "0", "--student-layers", str(search.layers // 3), "--epochs", "1", "--no-plots",
                "--max-train-examples", str(search.examples), "--max-eval-examples", "500",
                "--sparsity", sparsities, "--output", str(results.parent),
            ],
            check=True, stdout=sys.stderr, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    found = json.loads(results.read_text())
    return {"search": found["seconds"], "one distillation": found["results"]["trial"]["seconds"]}


def plot(measured: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": "fastdistill", "font.size": 8, "svg.fonttype": "none"}):
        figure, panels = plt.subplots(1, len(measured), figsize=(WIDTH, HEIGHT), sharey=True, layout="constrained")
        for axes, (title, points) in zip(panels, measured.items(), strict=True):
            for name in next(iter(points.values())):
                seconds = [point[name] for point in points.values()]
                axes.plot(range(len(points)), seconds, marker="o", markersize=4, label=name)
                for x, y in enumerate(seconds):
                    axes.annotate(f"{y:,.0f}", (x, y), textcoords="offset points", xytext=(0, 5), ha="center")
            axes.set_xticks(range(len(points)), list(points))
            axes.set_xlabel(title)
            axes.set_yscale("log")
            axes.margins(x=0.12, y=0.15)
            axes.grid(axis="y", linewidth=0.4, alpha=0.6)
        panels[0].set_ylabel("seconds")
        panels[0].legend(frameon=False, loc="upper left")
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, help="a folder of sentences with two labels, 16,000 or more")
    parser.add_argument("--figure", type=Path, default=Path("docs/growth.svg"))
    parser.add_argument("--output", type=Path, default=Path("runs/growth"), help="folder of the searches")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    measured = {
        title: {f"{getattr(search, by):,}" if by != "size" else search.size:
                measure(search, options.task, options.output) for search in searches}
        for title, (by, searches) in PANELS.items()
    }  # fmt: skip
    plot(measured, options.figure)
    for title, points in measured.items():
        for value, point in points.items():
            print(f"{title} {value}: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in point.items()))


if __name__ == "__main__":
    main()
