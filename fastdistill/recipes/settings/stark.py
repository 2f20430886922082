"""What is asked of stark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from fastdistill.recipes.settings.fields import Choice, Integer, Listed, Number, flag, option
from fastdistill.recipes.settings.shared import (
    POSITIVE,
    DistillationSettings,
    Divergence,
    PlotSettings,
    RecipeSettings,
)

Selection = Literal["knowledge", "random", "auto", "dynabert"]
KNOWLEDGEABLE = frozenset(("knowledge", "auto"))
"""Those by the scores of this method, for which a trial student is needed."""

SPARSITIES = tuple(n / 10 for n in range(1, 10))


@dataclass(frozen=True, kw_only=True)
class StarkSettings(RecipeSettings, DistillationSettings, PlotSettings):
    """Settings of sparse teachers, `fastdistill.recipes.stark`."""

    command: ClassVar[str] = "stark"
    does: ClassVar[str] = "prune a teacher of what its student finds unfriendly, and distil the sparse teacher (STARK)"
    title: ClassVar[str] = "STARK"

    divergence: Divergence | None = option(
        None,
        kind=Choice(get_args(Divergence)),
        help="of the student's probabilities from the teacher's (default: soft_ce)",
    )
    student_sparsity: float | None = option(
        None,
        kind=Number(above=0, below=1),
        metavar="X",
        help="in the place of --student-layers: the student is the teacher without that share of its heads and "
        "neurons, the least expressive (the paper's: 0.7)",
    )
    assistant_sparsity: float | None = option(
        None,
        kind=Number(above=0, below=1),
        metavar="X",
        help="a student by plain distillation from an assistant, the teacher without that share of its least "
        "expressive heads and neurons, distilled from it (TAKD: what --chain is for --student-layers, this is for "
        "--student-sparsity, of which --baselines takd takes half)",
    )
    sparsity: tuple[float, ...] | None = option(
        None,
        kind=Listed(Number(above=0, below=1)),
        metavar="X[,X...]",
        help="shares of the teacher's heads and neurons that are removed, each tried (default: 0.1,0.2,...,0.9)",
    )
    budget: tuple[float, ...] | None = option(
        None,
        kind=Listed(POSITIVE),
        metavar="N[,N...]",
        help="in the place of --sparsity: parameters that sparse teachers may have, with their embeddings and head, "
        "each tried (of grouped queries, and with --round-to, about as many)",
    )
    selection: tuple[Selection, ...] = option(
        ("knowledge",),
        kind=Listed(Choice(get_args(Selection))),
        metavar="S[,S...]",
        help="what is removed: the least knowledgeable (knowledge), any (random), the least knowledgeable up to the "
        "first peak of the density of the heads' scores, which tries one sparsity alone (auto), or of each layer the "
        "least important by DynaBERT's measure (dynabert) (default: knowledge)",
    )
    tradeoff: tuple[float, ...] = option(
        (0.5,),
        kind=Listed(Number(low=0, most=1)),
        metavar="X[,X...]",
        help="weight of expressiveness against student-friendliness in a score; of several each is tried (default: "
        "0.5)",
    )
    objective: Literal["kd", "pkd", "ckd"] = option(
        "kd",
        kind=Choice(("kd", "pkd", "ckd")),
        help="how students learn: by logits alone (kd), or by hidden states too, of the first token (pkd) or the "
        "relations of all tokens (ckd: its teachers run in every step) (default: %(default)s)",
    )
    hidden_weight: float | None = option(
        None,
        kind=POSITIVE,
        metavar="X",
        help="weight of the hidden states' term (default: 100 for pkd, 1 for ckd)",
    )
    pkd_over: Literal["mean", "sum"] = option(
        "mean",
        kind=Choice(("mean", "sum")),
        help="of the hidden size: the published code's mean, to which the weight 100 belongs, or the paper's sum "
        "(default: %(default)s)",
    )
    unstructured: bool = flag("remove single weights of the encoder, by making them zero")
    reduce: Literal["example", "batch"] = option(
        "example",
        kind=Choice(("example", "batch")),
        help="sensitivities by example, for --unstructured at a backward pass each, or as in the published code by "
        "batch (default: %(default)s)",
    )
    score_on: Literal["train", "validation"] = option(
        "train",
        kind=Choice(("train", "validation")),
        help="the examples that the teacher is scored on: those that are learned, or those that select (validation) "
        "(default: %(default)s)",
    )
    round_to: int | None = option(
        None, kind=Integer(1), metavar="N", help="round the neurons that a layer keeps to a multiple of N (default: 1)"
    )

    @property
    def candidates(self) -> int:
        """Students that are tried for each seed, of which the best counts."""
        return 1 if set(self.selection) == {"auto"} else len(self.sparsities)

    @property
    def sparsities(self) -> tuple[float, ...]:
        return self.sparsity or SPARSITIES

    def record(self) -> dict[str, Any]:
        return {**super().record(), "sparsity": self.sparsities if self.budget is None else None}

    def check(self) -> None:
        super().check()
        if (self.student_layers is None) == (self.student_sparsity is None):
            raise ValueError("expected either --student-layers or --student-sparsity")
        if self.student_layers is None and self.chain is not None:
            raise ValueError("--chain is of layers, but the student has --student-sparsity; expected --student-layers")
        if self.assistant_sparsity is not None and not self.assistant_sparsity < (self.student_sparsity or 0):
            raise ValueError(
                f"--assistant-sparsity is {self.assistant_sparsity}; expected less than --student-sparsity, which is "
                f"{self.student_sparsity}"
            )
        if self.student_sparsity is not None and self.student_from == "pretrained":
            raise ValueError("--student-from is pretrained, but --student-sparsity cuts the fine-tuned teacher")
        if self.objective == "kd" and self.hidden_weight is not None:
            raise ValueError(f"--hidden-weight is {self.hidden_weight}, but --objective kd has no hidden states")
        if self.objective == "ckd" and self.student_layers == 1:
            raise ValueError("--student-layers is 1; --objective ckd relates a token's states through 2 layers or more")
        if self.sparsity is not None and self.budget is not None:
            raise ValueError("expected either --sparsity or --budget, which is in its place")
        if self.student_sparsity is not None and self.compares_with("tinybert"):
            raise ValueError(
                "--baselines has tinybert, of all heads' attention, of which --student-sparsity lacks some"
            )
        if self.student_sparsity is not None and self.compares_with("takd-pruned"):
            raise ValueError("--baselines has takd-pruned, which is takd itself where --student-sparsity is given")
        by_scores = bool(KNOWLEDGEABLE & set(self.selection))
        at_random = set(self.selection) == {"random"}
        distils = self.distils or self.assistant_sparsity
        ignored = {
            "--pkd-over": self.pkd_over != "mean" and self.objective != "pkd",
            "--reduce": self.reduce != "example" and not by_scores and self.student_sparsity is None,
            "--round-to": self.round_to is not None and self.unstructured,
            "--tradeoff": self.tradeoff != (0.5,) and not by_scores,
            "--score-on": self.score_on != "train" and at_random and self.student_sparsity is None,
            "--sparsity": self.sparsity is not None and set(self.selection) == {"auto"},
            "--budget": self.budget is not None and (self.unstructured or set(self.selection) == {"auto"}),
            "--kd-temperature": self.kd_temperature is not None and not distils,
        }
        if names := [name for name, is_ignored in ignored.items() if is_ignored]:
            raise ValueError(f"{', '.join(names)} would have no effect beside the other options; leave it out")
        if self.unstructured and "auto" in self.selection:
            raise ValueError("--selection auto is by the scores of heads, which --unstructured does not have")
        if self.unstructured and "dynabert" in self.selection:
            raise ValueError("--selection dynabert is of heads and neurons, but --unstructured is of single weights")
