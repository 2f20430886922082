"""Settings that recipes share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from fastdistill.recipes.settings.fields import Choice, Folder, Integer, Listed, Number, Settings, Text, flag, option
from fastdistill.recipes.settings.optimization import OptimizationSettings

SEED = Integer(0, 2**32 - 1)
POSITIVE = Number(above=0)

TASK = (
    "a task's name (docstrings, which needs no network; sst2, mnli and the rest of GLUE; ag_news, emotion, imdb), or a "
    "folder or file of jsonl[.gz], csv, tsv or parquet with columns sentence1[, sentence2], label"
)
TEACHER = "folder or hub name of a transformers encoder in safetensors, or minilm, which the extra 'demo' brings"
STUDENT_LAYERS = "the teacher's layers that the student has"

Divergence = Literal["forward_kl", "soft_ce", "reverse_kl"]

Baseline = Literal["none", "kd", "dkd", "pkd", "ckd", "distilbert", "tinybert", "metakd", "takd-pruned", "takd"]
"""What a method can be compared with; `fastdistill.recipes.baselines` says how each learns."""

BASELINES_HELP = (
    "students to compare with: without a teacher (none), by plain distillation (kd), of the label's class apart from "
    "the others (dkd), with hidden states beside it, of the first token (pkd) or the relations of all (ckd), by the "
    "losses of DistilBERT (distilbert) or TinyBERT (tinybert), by plain distillation from a teacher that learns from "
    "how its student does on a tenth of the training examples (metakd), or from an assistant midway between student "
    "and teacher, of first layers (takd; as --chain says, if it does) or the teacher without its least expressive "
    "heads and neurons (takd-pruned)"
)


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """What to learn, from whom, and where to keep it; a student of the teacher's first layers."""

    title: ClassVar[str] = "what to run"

    task: str = option(kind=Text(), help=TASK)
    teacher: str | None = option(kind=Text(), help=TEACHER)
    student_layers: int | None = option(None, kind=Integer(1), metavar="K", help=STUDENT_LAYERS)
    output: str | Path = option(
        kind=Folder(),
        metavar="DIR",
        help="where models and results.json go; the same command with the same DIR goes on where it was interrupted",
    )
    overwrite: bool = flag("write over results.json of another recipe or program")
    max_train_examples: int | None = option(
        None, kind=Integer(1), metavar="N", help="train on a random N (default: all)"
    )
    max_eval_examples: int | None = option(
        None, kind=Integer(1), metavar="N", help="evaluate on a random N (default: all)"
    )
    select_on: Literal["train", "validation"] | None = option(
        None,
        kind=Choice(("train", "validation")),
        help="the examples by which the best epoch, candidate or setting is selected: a tenth of the training examples "
        "(2,000 at most), which are then not learned (train), or those of the validation split (default: validation "
        "where another split is reported, else train)",
    )
    report_on: Literal["validation", "test"] | None = option(
        None,
        kind=Choice(("validation", "test")),
        help="the split that results are of (default: test where it has labels, else validation)",
    )
    max_length: int | None = option(
        None, kind=Integer(3), metavar="N", help="tokens that an example is cut to (default: the task's)"
    )

    @property
    def folder(self) -> Path:
        """`output`."""
        return Path(self.output)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Settings):
    """How teachers and students are trained."""

    title: ClassVar[str] = "training"

    epochs: float = option(3.0, kind=POSITIVE, metavar="N", help="epochs of a student (default: %(default)g)")
    teacher_epochs: float | None = option(
        None,
        kind=Number(low=0),
        metavar="N",
        help="epochs of the teacher's fine-tuning, 0 to take it as it is (default: 0 where its config names the task's "
        "labels, else 2)",
    )
    batch_size: int = option(
        32,
        kind=Integer(1),
        metavar="N",
        help="examples in a training batch, all processes' together (default: %(default)s)",
    )
    learning_rate: float | None = option(
        None,
        kind=POSITIVE,
        metavar="X",
        help="peak learning rate of a student (default: 3e-4 for encoders of MiniLM's width, 384; less for wider, by "
        "the square: 7.5e-5 for BERT-base)",
    )
    teacher_learning_rate: float | None = option(
        None,
        kind=POSITIVE,
        metavar="X",
        help="peak learning rate of the teacher's fine-tuning (default: a third of a student's default)",
    )
    early_stopping: int | None = option(
        None,
        kind=Integer(1),
        metavar="N",
        help="end a training after N epochs without a better one; the best epoch counts in any case (default: never)",
    )
    learning_rate_grid: tuple[float, ...] | None = option(
        None,
        kind=Listed(POSITIVE),
        metavar="X[,X...]",
        help="students' peak learning rates to try, of which the best counts; assistants, and a search, take the first "
        "(default: --learning-rate)",
    )
    batch_size_grid: tuple[int, ...] | None = option(
        None,
        kind=Listed(Integer(1)),
        metavar="X[,X...]",
        help="batch sizes of students to try, of which the best counts; assistants take the first; --batch-size is "
        "then the teacher's and the search's (default: --batch-size)",
    )
    label_smoothing: float | None = option(
        None, kind=Number(low=0, below=1), metavar="X", help="of the students' labels (default: 0)"
    )
    seed: int = option(0, kind=SEED, metavar="N", help="(default: %(default)s)")
    bf16: bool = flag("train, evaluate and score heads, neurons or weights in bfloat16 mixed precision")
    no_cuda_graphs: bool = flag(
        "on a GPU, launch each operation of a step by itself, and capture no training and scoring step as CUDA graphs, "
        "which take up to twice the memory"
    )
    checkpoints: int | None = option(
        None,
        kind=Integer(0),
        metavar="N",
        help="how often a model's training saves its state, to go on from if interrupted (default: 3, but not within "
        "half a minute of the last time, or of its beginning)",
    )
    tensorboard: bool = flag("write TensorBoard logs beside the models")
    debug_gradients: bool = flag("measure and show, before each training, the gradient of every term of its loss")

    @property
    def smoothing(self) -> float:
        return self.label_smoothing or 0.0


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings(Settings):
    """What else to train beside a method, how often, and where trainings run that do not wait for each other."""

    title: ClassVar[str] = "comparison"

    seeds: tuple[int, ...] | None = option(
        None,
        kind=Listed(SEED),
        metavar="N[,N...]",
        help="train every student once with each, and report mean and spread (default: --seed)",
    )
    student_from: Literal["teacher", "pretrained"] | None = option(
        None,
        kind=Choice(("teacher", "pretrained")),
        help="whose first layers students and assistants begin as: the fine-tuned teacher's, which is already a form "
        "of transfer, or the pretrained encoder's, with a new head (default: as in the method's paper, pretrained for "
        "peakd and autoskd, else teacher; and teacher where --teacher is not fine-tuned here)",
    )
    baselines: tuple[Baseline, ...] | None = option(
        None,
        kind=Listed(Choice(get_args(Baseline))),
        metavar="NAME[,NAME...]",
        alone=("none", "kd"),
        help=f"{BASELINES_HELP} (without a NAME: none,kd)",
    )
    baseline_runs: int | None = option(
        None,
        kind=Integer(1),
        metavar="N",
        help="train each baseline N times with a seed, each time with other batches, and take the best (default: as "
        "often as the method has candidates)",
    )
    chain: tuple[int, ...] | None = option(
        None,
        kind=Listed(Integer(1)),
        metavar="K,K[,...]",
        help="a student by plain distillation down a chain of models with so many layers, such as 6,4,2 (TAKD); "
        "--baselines takd has one assistant, midway",
    )
    kd_temperature: float | None = option(
        None,
        kind=POSITIVE,
        metavar="X",
        help="of plain distillation: the assistants', the baseline's and the chain's (default: 2)",
    )
    executor: Literal["auto", "local", "ray", "stacked"] = option(
        "local",
        kind=Choice(("auto", "local", "ray", "stacked")),
        help="train students one after another (local), those of one shape side by side, as one batched model, each "
        "with its own teacher's stored logits, rate, seed and early stopping (stacked: for a GPU; what cannot be is "
        "trained one after another, and it says why), or as many at a time as a Ray cluster has GPUs, or "
        "else CPUs (ray: the cluster of RAY_ADDRESS, or this machine; --output and HF_HOME must be on a file system "
        "that all its machines share); auto: stacked where there is a GPU, else local (default: %(default)s)",
    )

    def compares_with(self, *names: str) -> bool:
        """Whether any of these is among the baselines."""
        return not set(names).isdisjoint(self.baselines or ())

    @property
    def distils(self) -> bool:
        """Whether a baseline learns by plain distillation, of which `kd_temperature` is."""
        own = {"none", "dkd", "distilbert", "tinybert"}  # whose losses have temperatures of their own, or none
        return self.chain is not None or self.compares_with(*(name for name in get_args(Baseline) if name not in own))


@dataclass(frozen=True, kw_only=True)
class RecipeSettings(RunSettings, TrainingSettings, OptimizationSettings, ComparisonSettings):
    """What every recipe is asked."""

    command: ClassVar[str]
    """The recipe's name."""
    does: ClassVar[str]
    """What it does, in a line."""

    begins_as: ClassVar[Literal["teacher", "pretrained"]] = "teacher"
    """Where `student_from` is None."""

    def record(self) -> dict[str, Any]:
        """For results.json."""
        return {"command": self.command, **asdict(self)}

    def check(self) -> None:
        if self.learning_rate is not None and self.learning_rate_grid is not None:
            raise ValueError("--learning-rate would have no effect beside --learning-rate-grid; leave it out")
        if self.student_layers == 1 and self.compares_with("ckd"):
            raise ValueError("--student-layers is 1; --baselines ckd relates a token's states through 2 layers or more")


@dataclass(frozen=True, kw_only=True)
class FirstLayersSettings(RecipeSettings):
    """Those of a student that is a teacher's first layers."""

    student_layers: int = option(kind=Integer(1), metavar="K", help=STUDENT_LAYERS)


@dataclass(frozen=True, kw_only=True)
class DistillationSettings(Settings):
    """The objective that a student learns by from its teacher."""

    title: ClassVar[str] = "distillation"

    temperature: float | None = option(
        None, kind=POSITIVE, metavar="X", help="of the softmax on both sides (default: 2)"
    )
    kd_weight: float = option(
        1.0, kind=POSITIVE, metavar="X", help="weight of the teacher's term (default: %(default)g)"
    )
    ce_weight: float = option(1.0, kind=Number(low=0), metavar="X", help="weight of the labels' (default: %(default)g)")
    divergence: Divergence | None = option(
        None,
        kind=Choice(get_args(Divergence)),
        help="of the student's probabilities from the teacher's (default: forward_kl)",
    )
    form: Literal["paper", "released"] | None = option(
        None,
        kind=Choice(("paper", "released")),
        help="as STARK's paper prints the loss, without the factor temperature^2 before the teacher's term, or as its "
        "published code has it, with that factor and half of the sum (default: with the factor, and all of the sum)",
    )


@dataclass(frozen=True, kw_only=True)
class PlotSettings(Settings):
    """Whether plots are drawn."""

    title: ClassVar[str] = "plots"

    no_plots: bool = flag("draw none; they need matplotlib")


def store_hidden_states() -> Any:
    """The field of that name."""
    return flag(
        "run the teacher once, and keep its hidden states on disk, 4 bytes * (layers + 1) * width an example, or run "
        "it in every step (default: keep them where all are at most 2 GB)",
        default=None,
    )
