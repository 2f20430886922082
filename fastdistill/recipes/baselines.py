"""What methods are compared with, by name: how each baseline learns, and from whom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from fastdistill.models.students import parameter_pruned
from fastdistill.objectives.base import Objective, WeightedSum
from fastdistill.objectives.ckd import CKD
from fastdistill.objectives.distilbert import DistilBERT, OneLabel
from fastdistill.objectives.dkd import DKD
from fastdistill.objectives.logits import TaskLoss
from fastdistill.objectives.metakd import MetaKD
from fastdistill.objectives.pkd import PKD
from fastdistill.objectives.tinybert import TinyBERT
from fastdistill.recipes.comparison import Comparison, Learner
from fastdistill.recipes.measuring import Scoring
from fastdistill.recipes.settings import StarkSettings
from fastdistill.recipes.settings.shared import Baseline
from fastdistill.recipes.training import Teacher
from fastdistill.sensitivity.units import Sensitivities


@dataclass(frozen=True)
class Asked:
    """What baselines are made of: plain distillation's objective, which the comparison has, TAKD's chain, and the
    teacher of those that learn from one that is no assistant."""

    comparison: Comparison
    chain: tuple[int, ...]
    teacher: PreTrainedModel

    @property
    def kd(self) -> Objective:
        return self.comparison.kd

    @property
    def temperature(self) -> float:
        return self.comparison.settings.kd_temperature or 2.0

    @property
    def smoothing(self) -> float:
        return self.comparison.settings.smoothing

    @property
    def problem(self) -> OneLabel:
        return "regression" if self.comparison.stages.task.is_regression else "classification"

    def taught_by(self) -> PreTrainedModel:
        return self.teacher

    def assistant(self) -> PreTrainedModel:
        return self.comparison.assistant(*self.chain[:-1]) if self.chain else self.pruned_assistant()

    def pruned_assistant(self) -> PreTrainedModel:
        """The teacher without its least expressive heads and neurons, distilled from it: midway to the student."""
        teacher, settings = self.comparison.assistant(), self.comparison.settings
        sparsity = settings.assistant_sparsity if isinstance(settings, StarkSettings) else None
        if sparsity is None and isinstance(settings, StarkSettings) and settings.student_sparsity is not None:
            sparsity = settings.student_sparsity / 2
        if sparsity is None:
            assert settings.student_layers is not None
            sparsity = (1 - settings.student_layers / teacher.config.num_hidden_layers) / 2
        model = without_the_least_expressive(self.comparison, sparsity)
        return self.comparison.assist(f"assistant-{sparsity:g}", model, teacher).model


Rule = tuple[Callable[[Asked], Objective], Callable[[Asked], Teacher]]

BASELINES: dict[Baseline, Rule] = {
    "none": (lambda asked: TaskLoss(asked.smoothing), lambda asked: None),
    "kd": (lambda asked: asked.kd, Asked.taught_by),
    "dkd": (lambda asked: DKD(label_smoothing=asked.smoothing), Asked.taught_by),
    "pkd": (lambda asked: WeightedSum({"logits": (1.0, asked.kd), "pkd": (100.0, PKD())}), Asked.taught_by),
    "ckd": (lambda asked: WeightedSum({"logits": (1.0, asked.kd), "ckd": (1.0, CKD())}), Asked.taught_by),
    "distilbert": (lambda asked: DistilBERT(label_smoothing=asked.smoothing, problem=asked.problem), Asked.taught_by),
    "tinybert": (lambda asked: TinyBERT(problem=asked.problem), Asked.taught_by),
    "metakd": (
        lambda asked: MetaKD(asked.temperature, label_smoothing=asked.smoothing, problem=asked.problem),
        Asked.taught_by,
    ),
    "takd-pruned": (lambda asked: asked.kd, Asked.pruned_assistant),
    "takd": (lambda asked: asked.kd, Asked.assistant),
}
"""In the order of the results. To add one, name it in `Baseline`, which the command line takes, and here."""

RESULTS: dict[str, str] = {"none": "finetuned"}
"""What students are called where it is not the baseline's name."""


def baselines(
    comparison: Comparison, chain: tuple[int, ...] = (), teacher: PreTrainedModel | None = None
) -> dict[str, Learner]:
    """Those that are asked for, by what their students are called; assistants are trained. Without a `teacher`, which
    those have that learn from no assistant, it is the comparison's."""
    settings = comparison.settings
    wanted = set(settings.baselines or ())
    if chain or (isinstance(settings, StarkSettings) and settings.assistant_sparsity is not None):
        wanted.add("takd")
    asked = Asked(comparison, chain, comparison.assistant() if teacher is None else teacher)
    return {
        RESULTS.get(name, name): (objective(asked), of(asked))
        for name, (objective, of) in BASELINES.items()
        if name in wanted
    }


def without_the_least_expressive(comparison: Comparison, sparsity: float) -> PreTrainedModel:
    """The teacher without that share of its heads and neurons."""
    teacher, settings = comparison.assistant(), comparison.settings
    scoring = Scoring(name="expressiveness", teacher=teacher)
    if isinstance(settings, StarkSettings):
        scoring = Scoring(name="expressiveness", teacher=teacher, reduce=settings.reduce, on=settings.score_on)
    found = comparison.stages.score(scoring)
    assert isinstance(found, Sensitivities)
    return parameter_pruned(teacher, found.expressiveness, sparsity)
