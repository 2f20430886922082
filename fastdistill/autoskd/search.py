"""AutoSKDBERT's search for the distribution that teachers are sampled from (OpenReview, "AutoSKDBERT: Learn to
Stochastically Distill BERT", section 2): bilevel optimisation of the student's weights w and of theta.

Both levels' loss is soft cross-entropy (`fastdistill.kd_ce_loss`) from a target that theta makes of stored logits:

* "sswo": of the step's teacher i alone, ``theta_i z_i``, and only theta_i learns;
* "cr": of all, ``sum_i theta_i z_i``, and all of theta learns.

theta's gradient, through a step of the student, is in `fastdistill.autoskd.theta`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.func import functional_call
from transformers.utils.generic import find_labels

from fastdistill.autoskd.settings import Settings
from fastdistill.autoskd.theta import Batch, Weights, renormalize, select_teachers, target_loss, theta_gradient
from fastdistill.cuda_graphs import Graphs, graphs_on, replaying
from fastdistill.digest import digest, model_digest, tensor_pieces
from fastdistill.files import check_file, load_tensors, save_tensors
from fastdistill.models.fast_linear import fast_linear
from fastdistill.models.first_token import first_token_only
from fastdistill.models.fused_residuals import fused_residuals
from fastdistill.models.vocabulary import compact_vocabulary
from fastdistill.objectives.capturing import obstacle_to_capture
from fastdistill.objectives.logits import TaskLoss
from fastdistill.objectives.team import Draws
from fastdistill.processes import rank_and_number, sums_over_processes
from fastdistill.teachers.outputs import LOGITS
from fastdistill.training.graphed import GraphedBackward, Told
from fastdistill.training.padding import Padded, can_pad
from fastdistill.training.sampling import LengthGroupedSampler

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from fastdistill.teachers.store import Collate


@dataclass(frozen=True)
class Found:
    """What a search found: theta before the first step and after each, ``[steps + 1, n]``; the candidates, ``[k, n]``;
    and the step after which teachers were selected (its row of `theta` is after the selection). All float64. `drawn`
    are the places of the teachers that were sampled, a step each, int64; none for "cr"."""

    names: tuple[str, ...]
    theta: Tensor
    candidates: Tensor
    selected_at: int
    drawn: Tensor

    def draw_counts(self) -> Tensor:
        """How often each was sampled in phase 1, ``[n]``: what theta correlates with where it follows the draws."""
        return torch.bincount(self.drawn[: self.selected_at], minlength=len(self.names))

    def correlation(self, values: Tensor) -> float:
        """Pearson's of theta at the end of phase 1, before selection, with one value a teacher, such as its accuracy;
        NaN where one of the two is all equal."""
        both = torch.stack([self.theta[self.selected_at - 1], values.to(torch.float64)])
        return float(torch.corrcoef(both)[0, 1])

    def save(self, path: Path) -> None:
        facts = {"names": ",".join(self.names), "selected_at": str(self.selected_at)}
        save_tensors({"theta": self.theta, "candidates": self.candidates, "drawn": self.drawn}, path, facts)

    @classmethod
    def load(cls, path: Path) -> Found:
        tensors, facts = load_tensors(path)
        found = (tensors["theta"], tensors["candidates"], int(facts["selected_at"]), tensors["drawn"])
        return cls(tuple(facts["names"].split(",")), *found)


def search(
    student: PreTrainedModel,
    dataset: Dataset,
    names: Sequence[str],
    settings: Settings,
    *,
    collate: Collate,
    tokens: Tensor | None = None,
    checkpoint: str | Path | None = None,
    checkpoints: int = 3,
    device: torch.device | str | None = None,
    bf16: bool = False,
    cuda_graphs: bool = False,
    progress: bool = False,
) -> Found:
    """Learn theta (algorithm 1). In each step theta learns on a batch of either half of the data, then the student,
    a copy, on that of the training half. Half of the steps; teacher selection; the other half of them.

    theta's step runs the student in eval mode and float32: its gradient is of one function, without dropout. Under
    "sswo" the teacher is drawn from Cat(theta) once a step, and its weight alone moves.

    In a data-parallel run every process calls it and takes its share of each batch. All find the same, and what one
    process alone would, within rounding; but dropout draws other numbers, and BatchNorm takes each share's statistics
    (and the main process's running ones), as in DistributedDataParallel.

    Args:
        student: a classifier; where it starts from.
        dataset: the training data with "{name}_logits" of each teacher (`fastdistill.TeacherTeam.store`). A
            random half of it trains the student, the rest theta.
        names: the teachers', in theta's order.
        collate: makes a batch of examples without labels.
        tokens: the ids that may be in a batch, padding's among them: the student then has the embeddings of these alone
            (`fastdistill.compact_vocabulary`). Others have no gradient, and what is found does not depend on them. None
            for all, or for a student without an embedding of its own.
        checkpoint: a file for the state (student, both optimizers, theta, generator), written whole or not at all,
            `checkpoints` times on the way. A call that finds one of the same student, logits and settings goes on from
            it and ends as one that was never interrupted; one of others is written over. It stays there at the end.
        device: where it runs; by default where the student is.
        bf16: train the student under bfloat16 autocast.
        cuda_graphs: on CUDA, replay both steps as CUDA graphs, as `fastdistill.DistillationConfig` has it.
        progress: show a bar on stderr.

    Raises ValueError for a dataset without a teacher's logits, for logits that are not finite or not of the student's
    classes, for fewer teachers than two, for too few steps or too many dropped teachers, for `checkpoints` below 0, for
    tokens that the student does not have, and for a checkpoint that is damaged or cannot be written.
    """
    if isinstance(checkpoints, bool) or not isinstance(checkpoints, int) or checkpoints < 0:
        raise ValueError(f"checkpoints is {checkpoints!r}; expected an integer of at least 0")
    if checkpoint is not None:
        check_file("checkpoint", checkpoint)
    _check(dataset, tuple(names), settings)
    file = None if checkpoint is None else Path(checkpoint)
    own = copy.deepcopy(student).to(device or student.device).requires_grad_(True)  # type: ignore[arg-type]
    came_from = [
        repr((asdict(settings), tuple(names), bf16)),
        model_digest(student),
        *tensor_pieces({} if tokens is None else {"tokens": tokens}),
    ]
    compact = nullcontext() if tokens is None else compact_vocabulary(own, tokens)
    with compact, torch.random.fork_rng(), fast_linear(own), fused_residuals(own), first_token_only(own):
        graphs = graphs_on(own.device, "search", lambda: _obstacle(own)) if cuda_graphs else None
        if graphs is not None and can_pad(own):
            collate = Padded(collate, [own])
        state = _Search(own, dataset, tuple(names), settings, collate, bf16, came_from, graphs)
        if file is not None:
            state.load(file)
        every = -(-state.steps // (checkpoints + 1))
        rest = range(state.done, state.steps)
        for _ in track(rest, "searching", console=Console(stderr=True)) if progress else rest:
            state.step()
            if file is not None and state.done % every == 0 and state.done < state.steps and not state.process:
                state.save(file)  # all have read it: none takes a step before all do
    return state.found()


class _Search:
    """The state of a search whose student is to be trained in its place."""

    def __init__(
        self,
        student: PreTrainedModel,
        dataset: Dataset,
        names: tuple[str, ...],
        settings: Settings,
        collate: Collate,
        bf16: bool,
        came_from: Sequence[str | bytes | memoryview],
        graphs: Graphs | None = None,
    ) -> None:
        self.student, self.settings, self.names, self.collate, self.bf16 = student, settings, names, collate, bf16
        self.device: torch.device = student.device
        self.process, self.processes = rank_and_number()
        self.team = torch.stack([_logits(dataset, name, student) for name in names], 1)
        taken = inspect.signature(student.forward).parameters.keys() - {"label", *find_labels(type(student))}  # type: ignore[no-untyped-call]
        self.data = dataset.with_format(None).select_columns([c for c in dataset.column_names if c in taken])
        lengths = dataset["length"][:] if "length" in dataset.column_names else [0] * len(dataset)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(settings.seed)).tolist()
        cut = len(order) // 2
        halves = (order[:cut], order[cut:])
        self.halves = [_Half(rows, lengths, settings.batch_size, settings.seed + i) for i, rows in enumerate(halves)]
        self.steps, self.selected_at, self.snapshots = settings.schedule(len(dataset))
        self.draws = Draws(settings.seed)
        uniform = torch.full((len(names),), 1 / len(names), dtype=torch.float64)
        self.theta = [weight.clone().requires_grad_() for weight in uniform]  # apart: a step moves one and no other
        self.history, self.drawn = [uniform], list[int]()
        weights, decay = list(self.student.parameters()), settings.weight_decay
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(weights, settings.learning_rate, settings.momentum, weight_decay=decay)
            if settings.optimizer == "sgd"
            else torch.optim.Adam(weights, settings.learning_rate, weight_decay=decay, fused=True)
        )
        self.theta_optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(self.theta, settings.theta_learning_rate)
            if settings.theta_optimizer == "sgd"
            else torch.optim.Adam(self.theta, settings.theta_learning_rate, weight_decay=1e-3)
        )
        self.slope = replaying(self._slope, graphs, "search")
        self.backward = None if graphs is None else GraphedBackward(self._loss, weights, [], graphs, "search")
        self.slopes = torch.full((len(names),), torch.nan, dtype=torch.float64)  # when each was last sampled
        self.digest = digest([*came_from, *tensor_pieces({"team": self.team})])

    @property
    def done(self) -> int:
        return len(self.history) - 1

    def step(self) -> None:
        train, validation = (self._batch(half) for half in self.halves)
        theta = self.history[-1]
        sampled = self.settings.method == "sswo"
        active = [self.draws.draw(theta)] if sampled else theta.nonzero().flatten().tolist()
        self.drawn += active if sampled else []
        train, validation = (replace(one, team=one.team[:, active]) for one in (train, validation))
        # Dropout's numbers are the step's (and the process's) own: the state to keep is one generator's
        torch.manual_seed(int(torch.randint(2**62, (), generator=self.draws.generator)) + self.process)
        theta = self._theta_step(theta, active, train, validation)
        self._student_step(theta[active], train)
        if self.done + 1 == self.selected_at:
            theta = select_teachers(theta, self.settings.drop)
        self._set(theta)
        self.history.append(theta)

    def _theta_step(self, theta: Tensor, active: list[int], train: Batch, validation: Batch) -> Tensor:
        self.student.eval()  # type: ignore[no-untyped-call]
        slope = self.slope(theta[active].to(self.device), vars(train), vars(validation))
        gradient = slope.to("cpu", torch.float64)
        if self.settings.theta_baseline and self.settings.method == "sswo":
            self.slopes[active] = gradient
            gradient = gradient - self.slopes[theta > 0].nanmean()
        for place, slope in zip(active, gradient, strict=True):
            self.theta[place].grad = slope
        self.theta_optimizer.step()
        self.theta_optimizer.zero_grad(set_to_none=True)
        moved = renormalize(torch.stack(self.theta).detach())
        self._set(moved)
        return moved

    def _student_step(self, theta: Tensor, train: Batch) -> None:
        self.student.train()
        self.optimizer.param_groups[0]["lr"] = self.settings.rate(self.done, self.steps)
        given = theta.to(self.device), vars(train)
        if self.backward is None or self.backward(*given) is None:
            self._loss(*given)[0].backward()
        if self.backward is not None and not self.backward.step.is_on:
            self.backward = None  # with its buffers
        if self.processes > 1:
            learned = [(weight, weight.grad) for weight in self.student.parameters() if weight.grad is not None]
            sums = sums_over_processes([gradient for _, gradient in learned])
            for (weight, _), gradient in zip(learned, sums, strict=True):
                weight.grad = gradient
            for buffer in self.student.buffers():
                if buffer.is_floating_point():
                    torch.distributed.broadcast(buffer, 0)
        if self.settings.max_grad_norm:
            nn.utils.clip_grad_norm_(self.student.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _slope(self, theta: Tensor, train: dict[str, Any], validation: dict[str, Any]) -> Tensor:
        """Theta's gradient."""
        return theta_gradient(
            self._forward,
            dict(self.student.named_parameters()),
            Batch(**train),
            Batch(**validation),
            theta,
            look_ahead=self.settings.alpha,
            temperature=self.settings.temperature,
            reduce=sums_over_processes,
        )

    def _loss(self, theta: Tensor, train: dict[str, Any]) -> Told:
        """The student's."""
        batch = Batch(**train)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.student(**batch.features).logits
        return target_loss(logits, batch.team, theta, self.settings.temperature) * batch.share, {}, {}

    def _forward(self, weights: Weights, features: Mapping[str, Any]) -> Tensor:
        logits: Tensor = functional_call(self.student, dict(weights), kwargs=dict(features)).logits
        return logits

    def _batch(self, half: _Half) -> Batch:
        whole = half.rows(self.done)
        own = whole[self.process :: self.processes]
        rows = own or whole[:1]  # which counts for nothing: its share is 0
        columns = self.data[rows]
        examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        batch = {name: value.to(self.device) for name, value in dict(self.collate(examples)).items()}
        return Batch(batch, self.team[rows].to(self.device), len(own) / len(whole))

    def _set(self, theta: Tensor) -> None:
        with torch.no_grad():
            for weight, value in zip(self.theta, theta, strict=True):
                weight.copy_(value)

    def found(self) -> Found:
        theta = torch.stack(self.history)
        drawn = torch.tensor(self.drawn, dtype=torch.int64)
        return Found(self.names, theta, theta[self.snapshots].clone(), self.selected_at, drawn)

    # The checkpoint

    def _tensors(self) -> dict[str, Tensor]:
        """The student's, as they are."""
        named = [*self.student.named_parameters(), *self.student.named_buffers()]
        return {f"student.{name}": tensor for name, tensor in named}

    def save(self, path: Path) -> None:
        kept = {"generator": self.draws.get_extra_state(), "history": torch.stack(self.history), "slopes": self.slopes}
        kept["drawn"] = torch.tensor(self.drawn, dtype=torch.int64)
        for prefix, optimizer in (("optimizer", self.optimizer), ("theta_optimizer", self.theta_optimizer)):
            for place, state in optimizer.state_dict()["state"].items():
                kept |= {f"{prefix}.{place}.{key}": value for key, value in state.items() if value is not None}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in (kept | self._tensors()).items()}
        save_tensors(tensors, path, {"digest": self.digest})

    def load(self, path: Path) -> None:
        if not path.is_file():
            return
        tensors, facts = load_tensors(path)
        if facts.get("digest") != self.digest:
            return
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(tensors[name])
        self.draws.set_extra_state(tensors["generator"])
        self.history, self.slopes = list(tensors["history"]), tensors["slopes"]
        self.drawn = tensors["drawn"].tolist()
        self._set(self.history[-1])
        for prefix, optimizer in (("optimizer", self.optimizer), ("theta_optimizer", self.theta_optimizer)):
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                if name.startswith(f"{prefix}."):
                    _, place, key = name.split(".")
                    state.setdefault(int(place), {})[key] = tensor
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _obstacle(student: PreTrainedModel) -> str | None:
    """Why its steps cannot be captured."""
    if rank_and_number()[1] > 1:
        return "several processes share a step"
    return obstacle_to_capture(TaskLoss(), {"student": student})


class _Half:
    """Half of the data in batches of similar lengths; which, depends on the seed and the step alone."""

    def __init__(self, places: list[int], lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.places, self.batch_size, self.epoch = places, batch_size, -1
        self.batches = -(-len(places) // batch_size)
        own = [int(lengths[place]) for place in places]
        self.sampler = LengthGroupedSampler(own, batch_size, seed, epoch=lambda: self.epoch)

    def rows(self, step: int) -> list[int]:
        epoch, batch = divmod(step, self.batches)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = [self.places[place] for place in self.sampler]
        return self.order[batch * self.batch_size : (batch + 1) * self.batch_size]


def _logits(dataset: Dataset, name: str, student: PreTrainedModel) -> Tensor:
    """A teacher's, ``[N, C]``."""
    column, classes = name + LOGITS, student.config.num_labels
    logits = torch.from_numpy(np.stack(dataset.with_format("numpy")[column][:])).float()
    if logits.shape[1:] != (classes,):
        raise ValueError(f"dataset has {column!r} of shape {list(logits.shape)}; expected [N, {classes}], as student's")
    if (odd := ~logits.isfinite().all(1)).any():
        raise ValueError(
            f"dataset has NaN or infinity in {column!r}, row {int(odd.nonzero()[0])}; expected finite numbers"
        )
    return logits


def _check(dataset: Dataset, names: tuple[str, ...], settings: Settings) -> None:
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"names is {names!r}; expected two or more different teachers")
    for name in names:
        if name + LOGITS not in dataset.column_names:
            raise ValueError(f"dataset has no column {name + LOGITS!r}; expected one for each of {', '.join(names)}")
    if settings.drop >= len(names):
        raise ValueError(f"drop is {settings.drop}; expected fewer than the {len(names)} teachers")
    if len(dataset) < 2:
        raise ValueError(f"dataset has {len(dataset)} examples; expected two or more, for two halves")
