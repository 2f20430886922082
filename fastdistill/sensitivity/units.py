"""How much a teacher's heads and neurons matter to itself, and to a student: sensitivities of gates, by example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers.modeling_outputs import SequenceClassifierOutput

from fastdistill.cuda_graphs import Graphs, graphs_on, replaying
from fastdistill.digest import digest, model_digest, tensor_pieces
from fastdistill.files import check_file, load_tensors, save_tensors
from fastdistill.models.attention_scores import call
from fastdistill.models.fast_linear import fast_linear
from fastdistill.models.first_token import first_token_only
from fastdistill.models.fit import check_finite, check_model
from fastdistill.models.fused_residuals import fused_residuals
from fastdistill.models.heads import head_of
from fastdistill.models.hooks import whole
from fastdistill.models.inputs import inputs_of
from fastdistill.models.scores import Scores, mix
from fastdistill.objectives.base import ATTENTION_MASK, LossFunction, Objective, as_objective
from fastdistill.objectives.capturing import obstacle_to_capture
from fastdistill.objectives.logits import MSE, LogitsKD, MultiLabelKD, TaskLoss
from fastdistill.ops.checks import check_choice
from fastdistill.processes import rank_and_number, sum_over_processes
from fastdistill.sensitivity.values import UnitValues, unit_values

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

SAVE_EVERY = 64
"""Batches between two writings of what was found so far."""


@dataclass(frozen=True)
class Sensitivities:
    """What `score` found, each the mean over examples (or batches) of the gates' absolute gradients.

    `expressiveness`, P, is that of the teacher's own loss, and `friendliness`, Q, that of the distillation loss between
    the teacher and a trial student; None where there was no student.
    """

    expressiveness: Scores
    friendliness: Scores | None

    def knowledgeable(self, tradeoff: float = 0.5) -> Scores:
        r""":math:`\lambda P + (1 - \lambda) Q`, each divided by its l2 norm within a layer (STARK, section 3.2).

        Args:
            tradeoff: :math:`\lambda`, from 0 to 1. Less than 1 needs a student.
        """
        mixed: Scores = mix(self.expressiveness, self.friendliness, tradeoff)
        return mixed


def score(
    teacher: PreTrainedModel,
    loader: Iterable[Mapping[str, Any]],
    student: PreTrainedModel | None = None,
    *,
    objective: Objective | LossFunction | None = None,
    reduce: Literal["example", "batch"] = "example",
    checkpoint: str | Path | None = None,
    progress: bool = True,
    cuda_graphs: bool = False,
) -> Sensitivities:
    r"""The sensitivity of a teacher's losses to its heads and neurons.

    .. math::
        P = E_D \left| \frac{\partial L_{TK}}{\partial \xi} \right|, \qquad
        Q = E_D \left| \frac{\partial L_{KD}}{\partial \xi} \right|

    with gates :math:`\xi = 1` on every head and neuron (STARK, Yang et al. 2022, section 3.2). Both models are in eval
    mode meanwhile, and as they were afterwards. Of each batch there is one forward pass, and one backward pass gives
    every example's gradient: a gate's is the sum of its unit's values times their gradients, in float32 for models of
    16 bits, so that nothing is multiplied by gates of one. Weights take no gradient. Of an objective that sees the
    logits alone, a single backward pass serves both P and Q for two classes or regression; otherwise there are two.

    Args:
        teacher: a classifier, or regression model, that `fastdistill.gate` knows.
        loader: yields dictionaries of the models' inputs with "labels".
        student: the trial student, on the teacher's device; it takes the same inputs. None: P alone.
        objective: :math:`L_{KD}`, a mean over examples, differentiated with respect to the teacher: by default soft
            cross-entropy at temperature 2 without labels, as in the paper, of many labels that of each, or squared
            error for one output.
        reduce: "example", the definition: the mean over labelled examples of absolute gradients. "batch", as the
            published code: the mean over batches of the batch mean's absolute gradient.
        checkpoint: a file in which what was found so far is kept every few batches; a call with the same models and
            settings goes on from there, and skips the batches that it has seen. The loader must give the same ones in
            the same order. Each process has its own. At the end it holds everything, and is yours to remove.
        progress: whether to show a progress bar.
        cuda_graphs: on CUDA, replay the passes of batches whose shapes come again as CUDA graphs, as
            `fastdistill.DistillationConfig` has it.

    In a data-parallel run each process gives its own share of the data, and all get the sum of what they found.

    Raises ValueError for a batch without labels or without a column that the objective needs, an unknown architecture,
    data without a labelled example, a student that is the teacher itself, an objective that needs no teacher or
    several, a checkpoint that is damaged or of other data or cannot be written, models that give NaN, and a call within
    torch.inference_mode; TypeError for models or a loader that are none.
    """
    check_choice("reduce", reduce, ("example", "batch"))
    if torch.is_inference_mode_enabled():
        raise ValueError("score was called in torch.inference_mode, where there are no gradients; expected outside it")
    if checkpoint is not None:
        check_file("checkpoint", checkpoint)
    chosen = objective_of(teacher, student, objective)
    check_loader(loader)
    given: list[PreTrainedModel | None] = [teacher, student]
    teacher, student = whole(teacher), None if student is None else whole(student)
    device = next(teacher.parameters()).device
    graphs = graphs_of("score", teacher, student, chosen) if cuda_graphs else None
    narrowed = (teacher, student) if student is None or not chosen.needs.all_tokens else ()
    with (
        evaluating(teacher, student),
        fast_linear(teacher, student),
        fused_residuals(teacher, student),
        first_token_only(*narrowed),
        unit_values(teacher) as values,
    ):
        sizes = values.units
        widest = torch.float32 if device.type == "mps" else torch.float64
        totals = torch.zeros(1 if student is None else 2, sum(sizes), dtype=widest, device=device)
        kept = None
        if checkpoint is not None:
            kept = _Checkpoint(checkpoint, given, (chosen.fingerprint, reduce))
        count, done = (0, 0) if kept is None else kept.load(totals)
        passes = replaying(Passes(totals, teacher, student, values, chosen, reduce), graphs, "score")
        for number, batch in enumerate(tqdm(loader, desc="score", disable=not progress)):
            if kept is not None:
                kept.see(batch)
            if number < done:
                continue
            split = split_batch(batch, chosen, teacher, student, device)
            if labelled := split[-1]:
                passes(*split)
                count += labelled if reduce == "example" else 1
            if kept is not None and (number + 1) % SAVE_EVERY == 0:
                kept.save(totals, count)
        if kept is not None:
            kept.save(totals, count)
    counted = torch.tensor(float(count), dtype=torch.float64, device=device)
    sum_over_processes(totals, counted)
    count = int(counted)
    if not count:
        raise ValueError("loader gave no labelled example; expected at least one")
    check_totals(totals, teacher, student)
    found = [_split(row / count, sizes) for row in totals.float()]
    return Sensitivities(found[0], found[1] if student is not None else None)


@dataclass(frozen=True)
class Passes:
    """The passes of one batch after another, whose sensitivities are added to the totals: called with what
    `split_batch` gives, a function of tensors alone where the objective is one."""

    totals: Tensor
    teacher: PreTrainedModel
    student: PreTrainedModel | None
    units: UnitValues
    objective: Objective
    reduce: str

    def __call__(
        self, features: dict[str, Any], columns: dict[str, Tensor], labels: Tensor, labelled: int
    ) -> dict[str, Tensor]:
        teacher, student, units, objective = self.teacher, self.student, self.units, self.objective
        units.clear()
        with torch.enable_grad():
            outputs = outputs_of(teacher, features, student)
        losses: list[Callable[[Any], Tensor]] = [lambda theirs: TaskLoss()(theirs, None, labels) * labelled]
        if student is not None:
            with torch.no_grad():
                answers = outputs_of(student, features, teacher)
            losses.append(lambda theirs: objective(answers, theirs, labels, **columns) * labelled)

        if student is None or objective.needs.only:
            of_softmax = not labels.is_floating_point() and (student is None or objective.needs.only == "probabilities")
            found = _from_logits(units, outputs.logits, losses, of_softmax)
        else:
            with torch.enable_grad():
                values = [loss(outputs) for loss in losses]
            found = [units.gradients(values[0], retain_graph=True), units.gradients(values[1])]
        by_example = self.reduce == "example"
        self.totals.add_(
            torch.stack([one.abs().sum(0) if by_example else one.sum(0).abs() / labelled for one in found])
        )
        units.clear()
        return {}


def graphs_of(
    name: str, teacher: PreTrainedModel, student: PreTrainedModel | None, objective: Objective
) -> Graphs | None:
    """What captures passes of that name; a line says why they cannot be."""
    models = {"teacher": teacher} | ({} if student is None else {"student": student})
    device = next(teacher.parameters()).device
    return graphs_on(device, name, lambda: obstacle_to_capture(objective, models))


def _from_logits(
    units: UnitValues, logits: Tensor, losses: Sequence[Callable[[Any], Tensor]], of_softmax: bool
) -> list[Tensor]:
    """The gradients of losses that see the logits alone.

    Losses `of_softmax` do not change when all logits of an example do alike. Of two classes their gradients are
    multiples of (1, -1), as those of one output are of (1): that one vector goes back, and its result is multiplied."""
    grad_outputs: list[Tensor] = []
    for loss in losses:
        leaf = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).requires_grad_()
        with torch.enable_grad():
            value = loss(SequenceClassifierOutput(logits=leaf))
        grad_outputs += torch.autograd.grad(value, leaf)
    if logits.dim() == 2 and (logits.shape[1] == 1 or (logits.shape[1] == 2 and of_softmax)):
        vector = torch.ones_like(logits)
        vector[:, 1:].neg_()
        base = units.gradients(logits, vector)
        return [base * factor[:, :1] for factor in grad_outputs]
    last = len(grad_outputs) - 1
    return [
        units.gradients(logits, row.to(logits.dtype), retain_graph=place < last)
        for place, row in enumerate(grad_outputs)
    ]


def objective_of(
    teacher: PreTrainedModel, student: PreTrainedModel | None, objective: Objective | LossFunction | None
) -> Objective:
    """The objective, checked as the models are, or the default."""
    check_model("teacher", teacher)
    if student is not None:
        check_model("student", student)
    if student is teacher:
        raise ValueError("student is the teacher itself; expected another model")
    if objective is not None:
        if student is None:
            raise ValueError("objective is given but student is None; expected a student")
        chosen = as_objective(objective)
        if not chosen.needs.teacher or chosen.needs.teachers:
            raise ValueError(f"objective is {chosen}; expected one of a single teacher's outputs")
        return chosen
    problem = head_of(teacher).problem
    if problem == "regression":
        return MSE(label_weight=0.0)
    if problem == "multi_label":
        return MultiLabelKD(temperature=2.0, divergence="soft_ce", bce_weight=0.0)
    return LogitsKD(temperature=2.0, divergence="soft_ce", ce_weight=0.0)


def check_loader(loader: object) -> None:
    if not isinstance(loader, Iterable) or isinstance(loader, Mapping):
        raise TypeError(f"loader is {loader!r}; expected what yields dictionaries of the models' inputs with labels")


def outputs_of(model: PreTrainedModel, features: Mapping[str, Any], other: PreTrainedModel | None) -> Any:
    """What a model says to a batch of which it and the other take their own, with logits as its labels are."""
    inputs = inputs_of(model, features, others=[] if other is None else [other])
    return head_of(model).aligned(call(model, inputs), features)


def split_batch(
    batch: Mapping[str, Any],
    objective: Objective,
    teacher: PreTrainedModel,
    student: PreTrainedModel | None,
    device: torch.device,
) -> tuple[dict[str, Any], dict[str, Tensor], Tensor, int]:
    """What of a batch the models take, what the objective takes, and the labels as the teacher's head has them, of the
    examples that have one, on the device; and how many labels there are."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"loader gave a {type(batch).__name__}; expected dictionaries of inputs with labels")
    labels = head_of(teacher).labels(batch)
    for column in ("labels", *objective.needs.columns):
        if column not in batch and (column != "labels" or labels is None):
            raise ValueError(f"loader gave a batch without {column}: {', '.join(batch)}")
    assert labels is not None
    there = labels == labels if labels.is_floating_point() else labels != -100
    if labels.dim() == 1 and not there.all():
        number = len(labels)
        rows = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.shape[:1] == (number,)}
        batch = {**batch, **{name: value[there] for name, value in rows.items()}}
        labels = labels[there]
    labelled = int(there.sum())
    batch = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
    own = {name for name in objective.needs.columns if name != ATTENTION_MASK}
    features = {name: value for name, value in batch.items() if name not in own}
    if student is not None:
        features |= objective.needs.asked
    return features, {name: batch[name] for name in objective.needs.columns}, labels.to(device), labelled


def check_totals(totals: Tensor, teacher: PreTrainedModel, student: PreTrainedModel | None) -> None:
    """Raises ValueError, for the model that it is of, where what was found is NaN or infinite."""
    if totals.isfinite().all():
        return
    check_finite("teacher", teacher)
    if student is not None:
        check_finite("student", student)
    raise ValueError("teacher's sensitivities are NaN or infinite; expected models and an objective that give numbers")


def _split(values: Tensor, sizes: list[int]) -> Scores:
    layers = [part.clone() for part in values.split(sizes)]
    half = len(layers) // 2
    return Scores(layers[:half], layers[half:])


@contextmanager
def evaluating(*models: nn.Module | None, trained: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """Models in eval mode whose weights take no gradient, but for those `trained`; then as they were."""
    modules = [module for model in models if model is not None for module in model.modules()]
    modes = [module.training for module in modules]
    weights = [weight for model in models if model is not None for weight in model.parameters()]
    wanted = [weight.requires_grad for weight in weights]
    for module in modules:
        module.training = False
    for weight in weights:
        weight.requires_grad_(any(weight is one for one in trained))
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for weight, flag in zip(weights, wanted, strict=True):
            weight.requires_grad_(flag)


class _Checkpoint:
    """A file of what was found so far, with a hash of what it was found with."""

    def __init__(self, path: str | Path, models: list[PreTrainedModel | None], settings: tuple[str, ...]) -> None:
        rank, _ = rank_and_number()
        self.path = Path(f"{path}.{rank}" if rank else path)
        self.digest = digest([*settings, *(model_digest(model) for model in models if model is not None)])
        self.number, self.seen = 0, ""  # batches so far, and a hash of them
        self.done, self.expected = 0, ""  # the same of those that the file is of

    def load(self, totals: Tensor) -> tuple[int, int]:
        """Fills the totals; returns how many examples they are of, and of how many batches."""
        if not self.path.is_file():
            return 0, 0
        tensors, metadata = load_tensors(self.path)
        if metadata.get("digest") != self.digest:
            return 0, 0
        totals.copy_(tensors["totals"])
        self.done, self.expected = int(metadata["done"]), metadata["seen"]
        return int(metadata["count"]), self.done

    def see(self, batch: Mapping[str, Any]) -> None:
        self.number += 1
        self.seen = digest([self.seen, *tensor_pieces({k: v for k, v in batch.items() if isinstance(v, Tensor)})])
        self._check(self.number != self.done or self.seen == self.expected)

    def save(self, totals: Tensor, count: int) -> None:
        self._check(self.number >= self.done)
        facts = {"digest": self.digest, "count": str(count), "done": str(self.number), "seen": self.seen}
        save_tensors({"totals": totals.cpu()}, self.path, facts)

    def _check(self, fits: bool) -> None:
        if not fits:
            raise ValueError(f"{self.path} is of other batches than loader gives; expected the same, or another file")
