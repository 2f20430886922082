"""What is asked of pwcn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from fastdistill.recipes.settings.fields import Choice, Integer, Listed, Number, Text, flag, option
from fastdistill.recipes.settings.shared import POSITIVE, TEACHER, PlotSettings, RecipeSettings

Form = Literal["paper", "released"]
Variant = Literal[
    "lstm",
    "att-lstm",
    "pwcn-pos",
    "att-pwcn-pos",
    "point-pwcn-pos",
    "pwcn-dep",
    "att-pwcn-dep",
    "point-pwcn-dep",
]

BY_POSITION: tuple[Variant, ...] = ("lstm", "att-lstm", "pwcn-pos", "att-pwcn-pos", "point-pwcn-pos")


@dataclass(frozen=True, kw_only=True)
class PWCNSettings(RecipeSettings, PlotSettings):
    """Settings of proximity-weighted convolution networks, `fastdistill.recipes.pwcn`."""

    command: ClassVar[str] = "pwcn"
    does: ClassVar[str] = (
        "classify the sentiment of aspects by proximity-weighted convolution, beside LSTMs (PWCN); no teacher"
    )
    title: ClassVar[str] = "PWCN"
    unused: ClassVar[tuple[str, ...]] = (
        "teacher",
        "student_layers",
        "max_length",
        "teacher_epochs",
        "teacher_learning_rate",
        "student_from",
        "baselines",
        "baseline_runs",
        "chain",
        "kd_temperature",
        "bf16",  # which oneDNN's LSTM does not take everywhere
    )

    task: str = option(
        kind=Text(),
        help="a folder or file of jsonl[.gz], csv, tsv or parquet with columns sentence1, sentence2 (an aspect term in "
        "it), start (the character where that begins, from 0) and label",
    )
    teacher: str | None = option(None, kind=Text(), help=TEACHER)
    epochs: float = option(20.0, kind=POSITIVE, metavar="N", help="epochs of a model (default: %(default)g)")
    batch_size: int = option(
        64,
        kind=Integer(1),
        metavar="N",
        help="examples in a training batch, all processes' together (default: %(default)s)",
    )
    learning_rate: float | None = option(
        None, kind=POSITIVE, metavar="X", help="peak learning rate of a model (default: 0.001)"
    )
    models: tuple[Variant, ...] | None = option(
        None,
        kind=Listed(Choice(get_args(Variant))),
        metavar="M[,M...]",
        help=f"which to train, of {', '.join(get_args(Variant))} (default: those by position and, with --parser, "
        "pwcn-dep)",
    )
    vectors: str = option(
        "minilm",
        kind=Text(),
        metavar="SOURCE",
        help="of words: a file of plain text as GloVe's; the folder or hub name of a transformers encoder in "
        "safetensors, or minilm, which the extra 'demo' brings, for the mean of a word's input embeddings; or random "
        "(default: %(default)s)",
    )
    train_vectors: bool = flag("train the word vectors, too; random ones always are")
    parser: str | None = option(
        None,
        kind=Text(),
        metavar="NAME",
        help="an installed pipeline of spaCy with a dependency parser, or its folder, for proximity by dependency tree",
    )
    form: Form = option(
        "paper",
        kind=Choice(get_args(Form)),
        help="proximity as the paper prints it, 1 - d / n for all n words, or as in its published code, where n counts "
        "the words outside the aspect and those of the aspect have 0 (default: %(default)s)",
    )
    hidden_size: int = option(300, kind=Integer(1), metavar="N", help="of the LSTM, each way (default: %(default)s)")
    dropout: float = option(
        0.3, kind=Number(low=0, below=1), metavar="X", help="of the word vectors (default: %(default)g)"
    )

    @property
    def variants(self) -> tuple[Variant, ...]:
        return self.models or (*BY_POSITION, *(("pwcn-dep",) if self.parser is not None else ()))

    @property
    def by_tree(self) -> bool:
        return any(name.endswith("-dep") for name in self.variants)

    def record(self) -> dict[str, Any]:
        kept = {name: value for name, value in super().record().items() if name not in self.unused}
        return kept | {"models": self.variants}

    def check(self) -> None:
        super().check()
        if self.by_tree and self.parser is None:
            raise ValueError(f"--models has {', '.join(self.variants)}; expected --parser for those by dependency tree")
        if self.parser is not None and not self.by_tree:
            raise ValueError(
                "--parser would have no effect: none of --models is by dependency tree; leave it out, or add pwcn-dep"
            )
        if self.train_vectors and self.vectors == "random":
            raise ValueError("--train-vectors would have no effect: random vectors always learn; leave it out")
        if self.form != "paper" and not any("pwcn" in name for name in self.variants):
            raise ValueError("--form would have no effect: none of --models has a proximity; leave it out")
