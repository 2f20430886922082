"""What is asked of peakd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from fastdistill.recipes.settings.fields import Choice, Integer, Listed, Number, option, options
from fastdistill.recipes.settings.shared import POSITIVE, FirstLayersSettings, store_hidden_states

Part = Literal["sps", "swap", "ptp"]


@dataclass(frozen=True, kw_only=True)
class PeaKDSettings(FirstLayersSettings):
    """Settings of layers that are applied twice, `fastdistill.recipes.peakd`."""

    command: ClassVar[str] = "peakd"
    does: ClassVar[str] = (
        "distil into layers that are applied twice, after a pretraining with the teacher's predictions (Pea-KD)"
    )
    begins_as: ClassVar[Literal["teacher", "pretrained"]] = "pretrained"
    title: ClassVar[str] = "Pea-KD"

    shared_layers: int | None = option(
        None,
        kind=Integer(1),
        metavar="K",
        help="the student's top layers that are applied again (default: all, of six layers three)",
    )
    threshold: tuple[float, ...] | None = option(
        None,
        kind=Listed(Number(above=0.5, most=1), different=False),
        metavar="X[,X]",
        help="probability above which the teacher is confident; of two the first where it is right, the second where "
        "it is wrong (default: the published code's for mrpc, qnli, rte and sst2, else 0.8)",
    )
    ptp_epochs: float | None = option(
        None,
        kind=POSITIVE,
        metavar="N",
        help="epochs of a student's pretraining with the teacher's predictions (default: --epochs)",
    )
    ptp_folds: int = option(
        1,
        kind=Integer(1),
        metavar="K",
        help="label the training examples out of fold, by K teachers none of which has learned what it labels: a "
        "teacher is rarely wrong on what it has learned (default: %(default)s, the teacher itself)",
    )
    alpha: float = option(
        0.7,
        kind=Number(low=0, most=1),
        metavar="X",
        help="weight of the teacher's term, and 1 less it that of the labels (default: %(default)g)",
    )
    beta: float = option(
        100.0, kind=Number(low=0), metavar="X", help="weight of the hidden states' term (default: %(default)g)"
    )
    pkd_over: Literal["mean", "sum"] = option(
        "mean",
        kind=Choice(("mean", "sum")),
        help="of the hidden size: the published code's mean, to which --beta belongs, or the sum that the paper prints "
        "(default: %(default)s)",
    )
    temperature: float = option(
        10.0,
        kind=POSITIVE,
        metavar="X",
        help="of the softmax on both sides; the teacher's term is multiplied by its square (default: %(default)g)",
    )
    store_hidden_states: bool | None = store_hidden_states()
    without: tuple[tuple[Part, ...], ...] = options(
        kind=Listed(Choice(get_args(Part))),
        metavar="PART[,PART]",
        help="a student without shared layers (sps), whose shared layers do not swap query and key (swap: SPS-1), or "
        "without pretraining (ptp), or several of these at once; may be repeated, for a student each",
    )

    def check(self) -> None:
        super().check()
        for parts in self.without:
            if {"sps", "swap"} <= set(parts):
                raise ValueError(f"--without {','.join(parts)}: swap changes nothing without sps")
        if self.threshold is not None and len(self.threshold) > 2:
            raise ValueError(f"--threshold has {len(self.threshold)} numbers; expected one or two")
        if self.kd_temperature is not None and not self.distils:
            raise ValueError("--kd-temperature would have no effect without --baselines or --chain; leave it out")
        if self.store_hidden_states is not None and not self.beta:
            raise ValueError("--store-hidden-states would have no effect with --beta 0; leave it out")
        if (self.shared_layers or 0) > self.student_layers:
            raise ValueError(f"--shared-layers is {self.shared_layers}; the student has {self.student_layers}")
