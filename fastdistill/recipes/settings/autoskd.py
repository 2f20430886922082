"""What is asked of autoskd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from fastdistill.recipes.settings.fields import Choice, Integer, Listed, Text, flag, option
from fastdistill.recipes.settings.shared import (
    BASELINES_HELP,
    POSITIVE,
    TASK,
    TEACHER,
    Baseline,
    PlotSettings,
    RecipeSettings,
)

TeamBaseline = Literal["single", "avgkd", "mtbert"]


@dataclass(frozen=True, kw_only=True)
class AutoSKDSettings(RecipeSettings, PlotSettings):
    """Settings of teams of which one teacher is sampled a step, `fastdistill.recipes.autoskd`."""

    command: ClassVar[str] = "autoskd"
    does: ClassVar[str] = (
        "distil from a team of teachers, one sampled a step, as likely as is learned to be best (AutoSKDBERT)"
    )
    begins_as: ClassVar[Literal["teacher", "pretrained"]] = "pretrained"
    title: ClassVar[str] = "AutoSKDBERT"

    task: str = option(kind=Text(), help=f"{TASK}; or a folder of images, train/CLASS/* and validation/CLASS/*")
    teacher: str | None = option(None, kind=Text(), help=TEACHER)
    baselines: tuple[Baseline | TeamBaseline, ...] | None = option(  # type: ignore[assignment]
        None,
        kind=Listed(Choice((*get_args(Baseline), *get_args(TeamBaseline)))),
        metavar="NAME[,NAME...]",
        alone=("none", "kd", *get_args(TeamBaseline)),
        help=f"{BASELINES_HELP}; those without an assistant learn from the strongest of the team; or from it by this "
        "method's loss (single), or from all teachers at once (avgkd, mtbert); none is always there (without a NAME: "
        "kd,single,avgkd,mtbert)",
    )
    each_teacher: bool = flag("a student of each of the team alone, with this method's loss (single-NAME)")
    team_chain: bool = flag(
        "a student down a chain from the strongest of the team to the weakest, each by plain distillation (takd-team)"
    )
    batch_size: int = option(  # None until the task is known
        None,
        kind=Integer(1),
        metavar="N",
        help="examples in a training batch, all processes' together (default: 32; 64 for images)",
    )
    team: tuple[str, ...] | None = option(
        None,
        kind=Listed(Text()),
        metavar="WHICH,WHICH[,...]",
        help="each of the team: an encoder as --teacher may be, with its own tokenizer, which is fine-tuned as the "
        "teacher is; or a number of the teacher's first layers, as --student-from says, trained as a student is; its "
        "own number is the teacher itself (default: 1,2,... to the teacher's); for images networks, as "
        "wrn-16-1,wrn-16-2,resnet8x4",
    )
    student: str | None = option(
        None,
        kind=Text(),
        metavar="WHICH",
        help="what the student begins as: an encoder as --teacher may be, or its first --student-layers (default: the "
        "teacher's); for images a network, as wrn-16-2",
    )
    augmentation: Literal["crop-flip", "none"] | None = option(
        None,
        kind=Choice(("crop-flip", "none")),
        help="of images in training: cropped at random within a margin of an eighth, and mirrored half of the time; "
        "teachers then run in each step, on what the student sees. The search takes images as they are (default: "
        "crop-flip)",
    )
    team_from: Literal["labels", "teacher"] = option(
        "labels",
        kind=Choice(("labels", "teacher")),
        help="what those with fewer layers than the teacher learn from: the labels alone, or by plain distillation "
        "from the teacher (default: %(default)s)",
    )
    temperature: float = option(
        1.0,
        kind=POSITIVE,
        metavar="X",
        help="of the softmax on both sides, in the search and for its students (default: %(default)g)",
    )
    method: Literal["sswo", "cr"] = option(
        "sswo",
        kind=Choice(("sswo", "cr")),
        help="search by the sampled teacher's logits and weight alone (sswo), or by all teachers' mixed (cr) "
        "(default: %(default)s)",
    )
    order: Literal[1, 2] = option(
        2,
        kind=Choice((1, 2)),
        help="whether the weights' gradient looks a step of the student ahead (2) or not (1) (default: %(default)s)",
    )
    look_ahead: float | None = option(
        None,
        kind=POSITIVE,
        metavar="X",
        help="length of that step (default: --theta-learning-rate, as the paper has it)",
    )
    drop: int | None = option(
        None,
        kind=Integer(0),
        metavar="M",
        help="teachers dropped after half of the search, the least likely (default: as many as are no stronger than "
        "the student without teacher, and one at least)",
    )
    candidates: int = option(
        25,
        kind=Integer(1),
        metavar="N",
        help="distributions taken from the search's second half, a student trained with each (default: %(default)s)",
    )
    random_candidates: int = option(
        0,
        kind=Integer(0),
        metavar="N",
        help="students of random distributions, to compare with (default: %(default)s)",
    )
    phase_1_candidates: int = option(
        0,
        kind=Integer(0),
        metavar="N",
        help="students of distributions from the search's first half, before weak teachers are dropped, to compare "
        "with (default: %(default)s)",
    )
    search_epochs: float | None = option(
        None, kind=POSITIVE, metavar="N", help="of the search, over half the data (default: 15; 50 for images)"
    )
    theta_optimizer: Literal["sgd", "adam"] = option(
        "sgd",
        kind=Choice(("sgd", "adam")),
        help="of the distribution: gradient descent, or the paper's Adam, by which it follows the draws, not the "
        "teachers, unless the search is long (default: %(default)s)",
    )
    theta_learning_rate: float | None = option(
        None,
        kind=POSITIVE,
        metavar="X",
        help="of the distribution; the paper's are 3e-4 to 1e-3 (default: 0.03 for sgd, 0.001 for adam)",
    )
    no_theta_baseline: bool = flag(
        "move the sampled teacher's probability by its gradient as it is, as in the paper, not by what it is more than "
        "the team's mean"
    )

    @property
    def theta_rate(self) -> float:
        return self.theta_learning_rate or {"sgd": 3e-2, "adam": 1e-3}[self.theta_optimizer]

    def check(self) -> None:
        super().check()
        uses_kd = self.distils or self.team_chain or self.team_from == "teacher"
        if self.no_theta_baseline and self.method == "cr":
            raise ValueError("--no-theta-baseline would have no effect: --method cr has none; leave it out")
        if self.kd_temperature is not None and not uses_kd:
            raise ValueError(
                "--kd-temperature would have no effect: nothing learns by plain distillation; leave it out"
            )
