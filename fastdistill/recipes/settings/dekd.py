"""What is asked of dekd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from fastdistill.recipes.settings.fields import Choice, Integer, Listed, Number, flag, option, options
from fastdistill.recipes.settings.shared import POSITIVE, FirstLayersSettings, PlotSettings, store_hidden_states

Strategy = Literal["entropy", "least_confidence", "margin", "random"]
Part = Literal["ds", "ta", "doa"]

NOT_NEGATIVE = Number(low=0)


@dataclass(frozen=True, kw_only=True)
class DeKDSettings(FirstLayersSettings, PlotSettings):
    """Settings of data-efficient distillation, `fastdistill.recipes.dekd`."""

    command: ClassVar[str] = "dekd"
    does: ClassVar[str] = (
        "distil what a student is unsure of, from a teacher and its assistant, aligning informative layers (DeKD)"
    )
    title: ClassVar[str] = "DeKD"

    assistant_layers: int | None = option(
        None,
        kind=Integer(0),
        metavar="K",
        help="the teacher's layers that the assistant has (default: midway between the student's and the teacher's); 0 "
        "for no assistant: the teacher teaches all examples that are kept",
    )
    ratio: tuple[float, ...] = option(
        (0.5,),
        kind=Listed(Number(above=0, most=1)),
        metavar="X[,X...]",
        help="share of the examples that query a teacher; of several each is tried (default: 0.5)",
    )
    strategy: tuple[Strategy, ...] = option(
        ("entropy",),
        kind=Listed(Choice(get_args(Strategy))),
        metavar="S[,S...]",
        help=f"how they are chosen: {', '.join(get_args(Strategy))}; of several each is tried (default: entropy)",
    )
    select_per: Literal["batch", "epoch"] = option(
        "batch",
        kind=Choice(("batch", "epoch")),
        help="choose in each batch, or from all data before each epoch (default: %(default)s)",
    )
    ce_on: Literal["all", "selected"] = option(
        "all",
        kind=Choice(("all", "selected")),
        help="examples whose labels are learned (default: %(default)s)",
    )
    ce_weight: float = option(
        0.5, kind=NOT_NEGATIVE, metavar="X", help="weight of the term of labels (default: %(default)g)"
    )
    ta_weight: float = option(
        0.3, kind=NOT_NEGATIVE, metavar="X", help="weight of the term of the teachers (default: %(default)g)"
    )
    da_weight: float = option(
        0.2, kind=NOT_NEGATIVE, metavar="X", help="weight of the term of the aligned layers (default: %(default)g)"
    )
    temperature: float = option(
        5.0, kind=POSITIVE, metavar="X", help="of the softmax on both sides (default: %(default)g)"
    )
    unscaled: bool = flag(
        "do not multiply the teachers' terms by the temperature's square, as the paper prints them: they are then too "
        "weak to matter"
    )
    align_layers: int | None = option(
        None,
        kind=Integer(1),
        metavar="M",
        help="layers of teacher and student that are aligned (default: as many as the student has)",
    )
    over_layers: Literal["sum", "mean"] = option(
        "sum",
        kind=Choice(("sum", "mean")),
        help="of the aligned layers' distances (default: %(default)s, as printed)",
    )
    store_hidden_states: bool | None = store_hidden_states()
    without: tuple[tuple[Part, ...], ...] = options(
        kind=Listed(Choice(get_args(Part))),
        metavar="PART[,PART]",
        help="a student without data selection (ds), the assistant (ta) or the alignment of layers (doa), or several "
        "of these at once; may be repeated, for a student each",
    )

    def check(self) -> None:
        super().check()
        if (self.align_layers or 0) > self.student_layers:
            raise ValueError(f"--align-layers is {self.align_layers}; the student has {self.student_layers}")
        if self.store_hidden_states is not None and not self.da_weight:
            raise ValueError("--store-hidden-states is given, but --da-weight is 0: no hidden states are used")
