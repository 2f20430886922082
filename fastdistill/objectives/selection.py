"""Which examples a student learns from: the ones it is least certain of, batch by batch or epoch by epoch."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import TrainerCallback

from fastdistill.ops import select_uncertain
from fastdistill.ops.checks import check_choice, check_number
from fastdistill.ops.select_uncertain import STRATEGIES
from fastdistill.training.checks import own_columns
from fastdistill.training.sampling import lengths_of

if TYPE_CHECKING:
    from fastdistill.objectives.dekd import DeKD

Strategy = Literal["entropy", "least_confidence", "margin", "random"]

EXAMPLE = "example"
"""The dataset column that holds an example's number, 0 to N-1, for a choice made over the whole data."""

LENGTH = "length"


def select(
    logits: Tensor, ratio: float, strategy: Strategy = "entropy", *, generator: torch.Generator | None = None
) -> Tensor:
    """The max(1, round(N·ratio)) examples that a strategy chooses of N, as int64 indices.

    Args:
        logits: ``[N, C]``.
        ratio: in (0, 1].
        strategy: "entropy", "least_confidence" and "margin" are the kinds of `fastdistill.uncertainty`, and give the
            most uncertain first; "random" gives any, in any order, whatever the logits are.
        generator: for "random" only; on the logits' device.

    Raises ValueError for a ratio or strategy out of its range. Nothing waits for the device.
    """
    check_choice("strategy", strategy, STRATEGIES)
    if strategy != "random":
        return select_uncertain(logits, ratio, strategy)
    check_ratio(ratio)
    order = torch.randperm(len(logits), generator=generator, device=logits.device)
    return order[: max(1, round(len(logits) * ratio))]


def check_ratio(ratio: float) -> None:
    check_number("ratio", ratio, above=0)
    if ratio > 1:
        raise ValueError(f"ratio is {ratio!r}; expected a number > 0 and <= 1")


class Chosen(nn.Module):
    """A choice of examples that lasts an epoch: a flag for each, saved with the weights."""

    flags: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("flags", torch.zeros(0, dtype=torch.bool), persistent=False)

    def choose(self, number: int, indices: Tensor) -> None:
        """Of `number` examples choose those, and no others."""
        self.flags = torch.zeros(number, dtype=torch.bool, device=indices.device)
        self.flags[indices] = True

    def among(self, examples: Tensor) -> Tensor:
        """The places in a batch of those that are chosen; it waits for the device, to know how many they are.

        On the CPU it raises ValueError for a number that no example has."""
        if not len(self.flags):
            raise ValueError(
                "no examples are chosen yet; give the trainer callbacks=[SelectEachEpoch(objective)], "
                "or call objective.choose(logits) before each epoch"
            )
        number = len(self.flags)
        if examples.device.type == "cpu" and len(unknown := examples[(examples < 0) | (examples >= number)]):
            raise ValueError(f"{EXAMPLE} holds {int(unknown[0])}; expected numbers from 0 to {number - 1}")
        return self.flags[examples].nonzero().squeeze(1)

    def get_extra_state(self) -> Tensor:  # a buffer would have to have the checkpoint's size already
        return self.flags

    def set_extra_state(self, state: Tensor) -> None:
        self.flags = state.to(self.flags.device)


class SelectEachEpoch(TrainerCallback):
    """Before each epoch, chooses its examples by what the student then says to all of the training data.

    For a `DeKD` with ``select_per="epoch"``, on a dataset with the column "example". The student is in eval mode.
    Processes share the work. A run resumed within an epoch goes on with that epoch's choice.

    Raises ValueError where "example" does not number the examples from 0.
    """

    def __init__(self, objective: DeKD) -> None:
        if objective.select_per != "epoch":
            raise ValueError(f"objective selects per {objective.select_per!r}; expected select_per='epoch'")
        self.objective = objective

    def on_epoch_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        epoch = state.epoch or 0.0
        if epoch % 1:  # resumed within it
            return
        dataset, collate = train_dataloader.dataset, train_dataloader.collate_fn
        if self.objective.strategy == "random":
            logits = torch.empty(len(dataset), 1, device=args.device)  # the number of rows is all that it takes
        else:
            unused = set(own_columns(self.objective)) - {EXAMPLE}
            logits = predict(model, dataset, collate, args.per_device_eval_batch_size, unused)
        generator = torch.Generator(args.device).manual_seed(args.seed + int(epoch))
        self.objective.choose(logits, generator)


@torch.no_grad()
def predict(model: nn.Module, dataset: Any, collate: Any, batch_size: int, unused: Collection[str] = ()) -> Tensor:
    """A classifier's logits ``[N, C]`` on all of a dataset, by the number in its column "example".

    It sees neither that column nor "labels" nor "length" nor the `unused`. Batches are of similar length, where lengths
    are known; processes share the work."""
    from accelerate import PartialState  # type: ignore[import-untyped]
    from accelerate.utils import gather_object, reduce, send_to_device  # type: ignore[import-untyped]

    if hasattr(dataset, "select_columns"):  # what is not read need not be decoded
        dataset = dataset.select_columns([column for column in dataset.column_names if column not in unused])
    processes, device, number = PartialState(), next(model.parameters()).device, len(dataset)
    lengths = lengths_of(dataset, LENGTH) or [0] * number
    order = sorted(range(number), key=lengths.__getitem__, reverse=True)
    ours = Subset(dataset, order[processes.process_index :: processes.num_processes])
    # A generator of its own: the global one's numbers must not depend on whether this was done.
    loader = DataLoader(ours, batch_size, collate_fn=collate, generator=torch.Generator())
    found: list[tuple[Tensor, Tensor]] = []
    training = model.training
    model.eval()
    for batch in loader:
        batch = send_to_device(dict(batch), device)
        features = {name: value for name, value in batch.items() if name not in (EXAMPLE, "labels", LENGTH, *unused)}
        found.append((batch[EXAMPLE], model(**features).logits.float()))
    model.train(training)
    classes = max(gather_object([said.shape[-1] for _, said in found[:1]]))  # a process may have had no examples
    logits, times = torch.zeros(number, classes, device=device), torch.zeros(number, device=device)
    for examples, said in found:
        inside = (examples >= 0) & (examples < number)
        logits[examples[inside]] = said[inside]
        times[examples[inside]] += 1
    if processes.num_processes > 1:  # each has its own rows, and zeros for the others
        logits, times = reduce(logits, "sum"), reduce(times, "sum")
    if not bool((times == 1).all()):
        raise ValueError(f"the column {EXAMPLE!r} does not number the examples; expected 0 to {number - 1}, once each")
    return logits
