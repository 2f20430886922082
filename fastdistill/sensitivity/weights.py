"""The sensitivity of single weights, and weights that are masked: STARK in its unstructured form."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from fastdistill.cuda_graphs import replaying
from fastdistill.files import load_tensors, save_tensors
from fastdistill.models.architectures import encoder_weights
from fastdistill.models.first_token import first_token_only
from fastdistill.models.hooks import refuse_hooked, refuse_peft
from fastdistill.models.scores import check_sparsity, mix
from fastdistill.objectives.base import LossFunction, Objective
from fastdistill.objectives.logits import TaskLoss
from fastdistill.ops import accumulate_sensitivity_
from fastdistill.processes import sum_over_processes
from fastdistill.sensitivity.units import (
    check_loader,
    check_totals,
    evaluating,
    graphs_of,
    objective_of,
    outputs_of,
    split_batch,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True)
class WeightScores:
    """A score for every weight of the encoder's matrices, by the matrix's name in the model."""

    matrices: Mapping[str, Tensor]

    def normalized(self, eps: float = 1e-7) -> WeightScores:
        """Each matrix divided by its Frobenius norm, plus `eps`."""
        return WeightScores({n: m / (torch.linalg.vector_norm(m) + eps) for n, m in self.matrices.items()})

    def lerp(self, other: WeightScores, weight: float) -> WeightScores:
        """``(1 - weight) * self + weight * other``."""
        return WeightScores({n: torch.lerp(m, other.matrices[n], weight) for n, m in self.matrices.items()})

    def save(self, path: str | Path) -> None:
        save_tensors({name: matrix.contiguous() for name, matrix in self.matrices.items()}, Path(path), {})

    @classmethod
    def load(cls, path: str | Path) -> WeightScores:
        return cls(load_tensors(Path(path))[0])


@dataclass(frozen=True)
class WeightSensitivities:
    """As `fastdistill.sensitivity.units.Sensitivities`, of single weights."""

    expressiveness: WeightScores
    friendliness: WeightScores | None

    def knowledgeable(self, tradeoff: float = 0.5) -> WeightScores:
        r""":math:`\lambda P + (1 - \lambda) Q`, each divided by its norm within a matrix."""
        mixed: WeightScores = mix(self.expressiveness, self.friendliness, tradeoff)
        return mixed


def score_weights(
    teacher: PreTrainedModel,
    loader: Iterable[Mapping[str, Any]],
    student: PreTrainedModel | None = None,
    *,
    objective: Objective | LossFunction | None = None,
    progress: bool = True,
    cuda_graphs: bool = False,
) -> WeightSensitivities:
    r"""The sensitivity :math:`E_B |w \cdot \partial L / \partial w|` of the encoder's matrices: a gate on every weight.

    STARK's unstructured form (Yang et al. 2022, section 4.4). The mean is over batches, of the gradient of the batch's
    mean loss: a loader of single examples gives the sensitivity by example. Two backward passes a batch, one without a
    student. Arguments and errors as of `fastdistill.score`, but what was found cannot be kept on the way. In a
    data-parallel run processes sum what they find.
    """
    chosen = objective_of(teacher, student, objective)
    check_loader(loader)
    refuse_peft(teacher)
    named = dict(encoder_weights(teacher))
    weights = list(named.values())
    totals = [[torch.zeros_like(w, dtype=torch.float32) for w in weights] for _ in range(1 if student is None else 2)]
    batches = torch.zeros(1, device=weights[0].device)
    graphs = graphs_of("score", teacher, student, chosen) if cuda_graphs else None
    passes = replaying(_Passes(totals, teacher, student, weights, chosen), graphs, "score")
    narrowed = (teacher, student) if student is None or not chosen.needs.all_tokens else ()
    with evaluating(teacher, student, trained=weights), first_token_only(*narrowed):
        for batch in tqdm(loader, desc="score", disable=not progress):
            features, columns, labels, labelled = split_batch(batch, chosen, teacher, student, weights[0].device)
            if not labelled:
                continue
            passes(features, columns, labels)
            batches += 1
    sum_over_processes(*(total for group in totals for total in group), batches)
    if not batches.item():
        raise ValueError("loader gave no labelled example; expected at least one")
    check_totals(torch.stack([total.sum() for group in totals for total in group]), teacher, student)
    found = [WeightScores({n: t / batches for n, t in zip(named, group, strict=True)}) for group in totals]
    return WeightSensitivities(found[0], found[1] if student is not None else None)


@dataclass(frozen=True)
class _Passes:
    """The passes of one batch after another, as `fastdistill.sensitivity.units.Passes` of single weights."""

    totals: list[list[Tensor]]
    teacher: PreTrainedModel
    student: PreTrainedModel | None
    weights: Sequence[Tensor]
    objective: Objective

    def __call__(self, features: dict[str, Any], columns: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        with torch.enable_grad():
            theirs = outputs_of(self.teacher, features, self.student)
            losses = [TaskLoss()(theirs, None, labels)]
        if self.student is not None:
            with torch.no_grad():
                ours = outputs_of(self.student, features, self.teacher)
            with torch.enable_grad():
                losses.append(self.objective(ours, theirs, labels, **columns))
        last, found = len(losses) - 1, []
        for place, loss in enumerate(losses):
            retain = place < last
            found.append(torch.autograd.grad(loss, self.weights, retain_graph=retain, allow_unused=True))
        for totals, gradients in zip(self.totals, found, strict=True):  # all or none: who calls may have to begin again
            accumulate_sensitivity_(totals, gradients, [weight.detach() for weight in self.weights])
        return {}


def random_weight_scores(model: PreTrainedModel, generator: torch.Generator) -> WeightScores:
    """Scores that mask at random."""
    return WeightScores({n: torch.rand(w.shape, generator=generator) for n, w in encoder_weights(model)})


def mask_weights(model: Model, scores: WeightScores, sparsity: float) -> Model:
    """A copy of the model in which the lowest ``round(sparsity * total)`` of all scored weights are zero; the first
    of equal ones go first. Raises ValueError for scores of another model, or NaN, or a sparsity outside [0, 1]."""
    check_sparsity(sparsity)
    if not isinstance(scores, WeightScores):
        raise TypeError(f"scores is a {type(scores).__name__}; expected WeightScores, as score_weights finds them")
    refuse_hooked(model)
    masked = copy.deepcopy(model)
    weights = dict(encoder_weights(masked))
    shapes = {name: tuple(matrix.shape) for name, matrix in scores.matrices.items()}
    if shapes != {name: tuple(weight.shape) for name, weight in weights.items()}:
        raise ValueError("scores are of other matrices than the model's encoder has; expected those of this model")
    values = torch.cat([scores.matrices[name].flatten() for name in weights])
    if values.isnan().any():
        raise ValueError("scores hold NaN; expected numbers")
    number = round(sparsity * len(values))
    if not number:
        return masked
    threshold = values.kthvalue(number).values
    goes = values < threshold
    equal = (values == threshold).nonzero().squeeze(1)
    goes[equal[: number - int(goes.sum())]] = True
    with torch.no_grad():
        for weight, flags in zip(weights.values(), goes.split([w.numel() for w in weights.values()]), strict=True):
            weight.masked_fill_(flags.view_as(weight).to(weight.device), 0)
    return masked
