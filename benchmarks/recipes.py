"""One small run of every recipe, side by side, on the device that is found: whether each ends, and after how long.

python -m benchmarks.recipes [FOLDER]
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

COMMON = [
    "--task", "docstrings", "--student-layers", "2", "--epochs", "1", "--teacher-epochs", "1",
    "--max-train-examples", "512", "--max-eval-examples", "256",
]  # fmt: skip
RECIPES = {
    "kd": "kd",
    "kd --bf16": "kd --bf16",
    "stark": "stark --sparsity 0.3,0.6 --selection knowledge,random,auto --baselines",
    "stark --objective pkd": "stark --sparsity 0.5 --objective pkd",
    "stark --unstructured": "stark --sparsity 0.5 --unstructured",
    "dekd": "dekd --assistant-layers 3 --baselines --without doa",
    "autoskd": "autoskd --team 1,2,4 --candidates 2 --random-candidates 2 --baselines --search-epochs 1",
    "peakd": "peakd --baselines",
}


def save_teacher(folder: Path) -> None:
    """A BERT of four narrow layers, and a tokenizer of the words that the embedded task's sentences are made of."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    from fastdistill import load_task

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    sentences = load_task("docstrings").train["sentence1"]
    backend.train_from_iterator(sentences, trainers.WordLevelTrainer(vocab_size=2000, special_tokens=special))
    ends = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    tokens = dict(zip(names, special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=128, **tokens).save_pretrained(folder)
    config = BertConfig(
        vocab_size=backend.get_vocab_size(), hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=512, max_position_embeddings=128,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)


def run(folder: Path, seconds: float, recipes: dict[str, str] = RECIPES) -> dict[str, dict[str, Any]]:
    """Name -> exit status, seconds, and of one that failed the last that it said."""
    teacher = folder / "teacher"
    save_teacher(teacher)
    start, running = time.monotonic(), {}
    for number, (name, arguments) in enumerate(recipes.items()):
        log = folder / f"{number}.log"
        with log.open("w") as file:
            command = [sys.executable, "-m", "fastdistill", *arguments.split(), *COMMON, "--teacher", str(teacher)]
            running[name] = log, subprocess.Popen(
                [*command, "--output", str(folder / str(number))], stdout=file, stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ},
            )  # fmt: skip
    results: dict[str, dict[str, Any]] = {}
    while len(results) < len(running):
        for name, (log, process) in running.items():
            took = time.monotonic() - start
            if name not in results and process.poll() is None and took > seconds:
                process.kill()
                process.wait()
            if name not in results and process.poll() is not None:
                results[name] = {"status": process.returncode, "seconds": round(took, 1)}
                if process.returncode:
                    said = re.split(r"[\r\n]+", log.read_text().strip())
                    results[name]["said"] = " | ".join(said[-3:])[-600:]
        time.sleep(0.2)
    return {name: results[name] for name in recipes}


def show(results: dict[str, dict[str, Any]]) -> str:
    return "\n".join(
        f"recipe {name}: {'done' if not one['status'] else 'FAILED (' + str(one['status']) + ')'}, "
        f"{one['seconds']:.0f} s{': ' + one['said'] if one['status'] else ''}"
        for name, one in results.items()
    )


if __name__ == "__main__":
    found = run(Path(sys.argv[1] if sys.argv[1:] else tempfile.mkdtemp()), 600)
    print(show(found))
    sys.exit(any(one["status"] for one in found.values()))
