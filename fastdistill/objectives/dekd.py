"""DeKD's objective: fewer examples, an assistant beside the teacher, and layers aligned as they are informative."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastdistill.objectives.base import Needs, Objective, check_teacher, weighted_sum
from fastdistill.objectives.pkd import OVER, Over, align, hidden_states, informative_layers, projections
from fastdistill.objectives.selection import EXAMPLE, Chosen, Strategy, check_ratio, select
from fastdistill.ops import kd_ce_loss, select_uncertain, uncertainty
from fastdistill.ops.checks import check_choice, check_number
from fastdistill.ops.select_uncertain import STRATEGIES
from fastdistill.teachers.outputs import rows_of

ENTROPY_BINS = 10


@dataclass(eq=False)
class DeKD(Objective):
    r"""Data-efficient distillation with a teacher assistant and dynamic objective alignment (Xu et al. 2024).

    .. math::
        \ell = \lambda_1\,\mathrm{CE} + \lambda_2\,(\mathrm{KL}^T + \mathrm{KL}^A) + \lambda_3\,L_{DA}

    Of a batch, those examples are kept that the student is least certain of (its predictions at temperature 1, as
    they are in this very step); no teacher sees another.

    * :math:`\mathrm{KL}^T` and :math:`\mathrm{KL}^A`: of the kept examples, ordered by entropy, the more certain
      half learns from the teacher and the less certain half from the assistant: forward KL at temperature
      :math:`\tau`, times :math:`\tau^2`, each the mean over its half (section 3.3, equation 7). Of an odd number the
      teacher has the one more; of a half without examples the term is 0.
    * :math:`L_{DA}`: of the teacher's layers the M whose [CLS] states have the highest entropy on the kept examples
      are aligned, in the order of their depth, with the student's layers 1 to M (equations 8 and 9), by the sum over
      layers, of the mean over kept examples of the squared distance between states of length 1.

    The paper prints no factor :math:`\tau^2`. At its temperature of 5 the teachers' gradient is then about 1/25 of what
    it is with it, far below the labels', and neither selection nor assistant can matter. As printed:
    ``scale_by_temperature=False``.

    The teachers' outputs are given by name, ``{"teacher": ..., "assistant": ...}``; without an assistant, the
    teacher's alone. As `TeacherOutputs` (`DistillationTrainer` gives those) a teacher is run on the examples routed to
    it only: the assistant on the less certain half, the teacher on the other half or, to align, on all
    that are kept. Other outputs must be of the whole batch.

    Args:
        ratio, strategy: how many are kept, and by which measure; see `fastdistill.objectives.selection.select`. The
            ratio is of each micro-batch: with accumulation or several processes, of each one's share of a step.
        select_per: "batch", or "epoch": they are chosen from the whole of the data before each epoch (see
            `SelectEachEpoch`), and those of a batch are found by the dataset's column "example".
        ce_on: cross-entropy on "all" examples of a batch, or on the "selected" ones.
        ce_weight, ta_weight, da_weight: lambda 1 to 3, >= 0; a term with weight 0 is left out.
        temperature: tau > 0.
        scale_by_temperature: multiply the KL terms by tau^2.
        assistant: whether there is one; without, all kept examples learn from the teacher, with the weight of both
            terms: twice the mean over them.
        layers: M; by default the number of the student's layers.
        over_layers: the "sum" over the layers, as printed, or their "mean".
        widths: the student's and the teacher's hidden size, where they differ: each of the M pairs (`layers` must be
            given) then has a learned linear map from one to the other, in `module`.
        label_smoothing: in [0, 1), of the hard labels.
        log_selection: count what is kept, too: "entropy/0" to "entropy/9", the kept examples whose entropy, divided by
            log C, is in that tenth of [0, 1]; and "layer/1", ...: the micro-batches that a layer is aligned on.

    Its parts are "ce", "ta" and "da", and those numbers (int64). An example with the label -100 has no cross-entropy,
    which is 0 where no example has one, and is otherwise as others are. `DistillationTrainer` however weighs
    micro-batches by their labelled examples, all terms alike: one without any teaches nothing.

    Raises ValueError or TypeError for an argument out of its range, or without effect, and for models that do not fit:
    logits must be ``[B, C]``.
    """

    ratio: float = 0.5
    strategy: Strategy = "entropy"
    select_per: Literal["batch", "epoch"] = "batch"
    ce_on: Literal["all", "selected"] = "all"
    ce_weight: float = 0.5
    ta_weight: float = 0.3
    da_weight: float = 0.2
    temperature: float = 5.0
    scale_by_temperature: bool = True
    assistant: bool = True
    layers: int | None = None
    over_layers: Over = "sum"
    widths: tuple[int, int] | None = None
    label_smoothing: float = 0.0
    log_selection: bool = False
    module: nn.ModuleDict | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_choice("strategy", self.strategy, STRATEGIES)
        check_choice("select_per", self.select_per, ("batch", "epoch"))
        check_choice("ce_on", self.ce_on, ("all", "selected"))
        check_choice("over_layers", self.over_layers, OVER)
        for name in ("ce_weight", "ta_weight", "da_weight"):
            check_number(name, getattr(self, name), minimum=0)
        if not self.ta_weight and not self.da_weight:
            raise ValueError("ta_weight and da_weight are both 0; expected a positive one, or TaskLoss")
        check_number("temperature", self.temperature, above=0)
        check_number("label_smoothing", self.label_smoothing, minimum=0, below=1)
        for name in ("scale_by_temperature", "assistant", "log_selection"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}; expected True or False")
        self._refuse_without("ce_weight", "ce_on", "label_smoothing")
        self._refuse_without("ta_weight", "temperature", "scale_by_temperature")
        self._refuse_without("da_weight", "layers", "widths", "over_layers")
        if self.layers is not None and (isinstance(self.layers, bool) or not isinstance(self.layers, int)):
            raise TypeError(f"layers is {self.layers!r}; expected an integer or None")
        if self.layers is not None and self.layers < 1:
            raise ValueError(f"layers is {self.layers!r}; expected at least 1")
        if self.widths is not None and self.layers is None:
            raise ValueError(f"widths is {self.widths} but layers is None; expected the number of layers to align")
        self._projections = None if self.widths is None else projections(self.widths, self.layers or 0)
        self._chosen = Chosen() if self.select_per == "epoch" else None
        own = {"projections": self._projections, "chosen": self._chosen}
        modules = {name: module for name, module in own.items() if module is not None}
        self.module = nn.ModuleDict(modules) if modules else None

    def _refuse_without(self, weight: str, *names: str) -> None:
        """Arguments that have no effect without this weight."""
        for name in names:
            value, default = getattr(self, name), getattr(DeKD, name)
            if not getattr(self, weight) and value != default:
                raise ValueError(f"{name} is {value!r} but {weight} is 0; expected {default!r}, the default")

    @property
    def on_host(self) -> str | None:
        return "asks how many of a batch's examples the epoch has chosen" if self._chosen is not None else None

    @property
    def needs(self) -> Needs:
        return Needs(
            teachers=("teacher", "assistant") if self.assistant and self.ta_weight else (),
            only=None if self.da_weight else "logits",
            hidden_states=self.da_weight > 0,
            all_tokens=False,
            lazily=True,
            columns=(EXAMPLE,) if self.select_per == "epoch" else (),
            problem="classification",
            labels=True,
            per_example=True,
        )

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> None:
        """With ``select_per="epoch"``: choose the epoch's examples, given the logits ``[N, C]`` of the whole data."""
        if self._chosen is None:
            raise ValueError("select_per is 'batch': examples are chosen in each; expected 'epoch'")
        self._chosen.choose(len(logits), select(logits, self.ratio, self.strategy, generator=generator))

    def parts(
        self, student: Any, teacher: Any, labels: Tensor | None, example: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        terms, counts = self._terms(student, teacher, labels, example)
        loss, parts = weighted_sum(terms)
        return loss, parts | counts

    def summands(self, student: Any, teacher: Any, labels: Tensor | None, **columns: Tensor) -> dict[str, Tensor]:
        terms, _ = self._terms(student, teacher, labels, **columns)
        return {name: weight * loss for name, (weight, loss) in terms.items()}

    def _terms(
        self, student: Any, teacher: Any, labels: Tensor | None, example: Tensor | None = None
    ) -> tuple[dict[str, tuple[float, Tensor]], dict[str, Tensor]]:
        """By name weight and loss, and what was counted."""
        if labels is None and self.ce_weight:
            raise ValueError(f"labels is None; {self} needs them")
        if student.logits.dim() != 2:
            raise ValueError(f"student.logits has shape {tuple(student.logits.shape)}; expected [B, C]")
        main, assistant = self._named(teacher)
        kept = self._kept(student.logits.detach(), example)
        terms: dict[str, tuple[float, Tensor]] = {}
        if self.ce_weight:
            terms["ce"] = self.ce_weight, self._cross_entropy(student.logits, labels, kept)
        half = len(kept) // 2 if assistant is not None else 0
        uncertain, certain = kept[:half], kept[half:]
        taught = None if not len(kept) else rows_of(main, kept if self.da_weight else certain)
        if self.ta_weight:
            # of those that the teacher was asked for, the certain ones are the last
            answers = None if taught is None else taught.logits[-len(certain) :]
            learned = self._divergence(student.logits, certain, answers)
            if assistant is None:
                learned = 2 * learned
            else:
                answers = rows_of(assistant, uncertain).logits if half else None
                learned = learned + self._divergence(student.logits, uncertain, answers)
            terms["ta"] = self.ta_weight, learned
        layers: dict[str, Tensor] = {}
        if self.da_weight:
            aligned, layers = self._align(student, taught, kept)
            terms["da"] = self.da_weight, aligned
        counts = _entropies(student.logits.detach()[kept]) | layers if self.log_selection else {}
        return terms, counts

    def _named(self, teacher: Any) -> tuple[Any, Any]:
        teachers = self.needs.teachers
        if not teachers:
            check_teacher(self, teacher)
            return teacher, None
        for name in teachers:
            if not isinstance(teacher, Mapping) or teacher.get(name) is None:
                raise ValueError(f"teacher has no {name!r}; {self} needs the outputs of {' and '.join(teachers)}")
        return teacher["teacher"], teacher["assistant"]

    def _kept(self, logits: Tensor, example: Tensor | None) -> Tensor:
        """The kept places in the batch, the most uncertain by entropy first."""
        if self._chosen is None:
            kept = select(logits, self.ratio, self.strategy)
            if self.strategy == "entropy":
                return kept
        elif example is None:
            raise ValueError(f"{EXAMPLE} is None, but select_per is 'epoch'; expected the examples' numbers")
        else:
            kept = self._chosen.among(example)
            if not len(kept):
                return kept
        return kept[select_uncertain(logits[kept], 1.0)]

    def _cross_entropy(self, logits: Tensor, labels: Tensor | None, kept: Tensor) -> Tensor:
        assert labels is not None
        if self.ce_on == "selected":
            logits, labels = logits[kept], labels[kept]
        smoothing = self.label_smoothing
        total = kd_ce_loss(logits, None, labels, kd_weight=0.0, label_smoothing=smoothing, reduction="sum")
        return total / labels.ne(-100).sum().clamp(min=1)

    def _divergence(self, logits: Tensor, rows: Tensor, answers: Tensor | None) -> Tensor:
        if answers is None:
            return _nothing(logits)
        return kd_ce_loss(
            logits[rows],
            answers,
            temperature=self.temperature,
            ce_weight=0.0,
            scale_by_temperature=self.scale_by_temperature,
        )

    def _align(self, student: Any, taught: Any, kept: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and for each of the teacher's layers whether it is aligned, 1 or 0."""
        ours = hidden_states("student", student)[1:]
        number = len(ours) if self.layers is None else self.layers
        if number > len(ours):
            raise ValueError(f"layers is {number}; expected at most {len(ours)}, the student's layers")
        if taught is None:
            return _nothing(student.logits), {}
        theirs = torch.stack([layer[:, 0] for layer in hidden_states("teacher", taught)[1:]])
        layers = informative_layers(theirs, number)
        distances = align([layer[kept, 0] for layer in ours[:number]], theirs[layers], self._projections)
        loss = distances.sum() if self.over_layers == "sum" else distances.mean()
        chosen = torch.zeros(len(theirs), dtype=torch.int64, device=layers.device).index_fill(0, layers, 1)
        return loss, {f"layer/{place}": flag for place, flag in enumerate(chosen, 1)}


def _entropies(logits: Tensor) -> dict[str, Tensor]:
    """How many examples have a normalised entropy in each of `ENTROPY_BINS` equal parts of [0, 1]."""
    part = (uncertainty(logits) * ENTROPY_BINS).long().clamp(max=ENTROPY_BINS - 1)
    return {f"entropy/{i}": (part == i).sum() for i in range(ENTROPY_BINS)}


def _nothing(logits: Tensor) -> Tensor:
    """0, with a gradient."""
    return logits[:0].sum(dtype=torch.promote_types(logits.dtype, torch.float32))
