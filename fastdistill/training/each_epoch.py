"""Before each epoch of a training: which examples a student learns from, by what it then says to all of them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import TrainerCallback

from fastdistill.models.inputs import inputs_of
from fastdistill.models.packed import packed_forward
from fastdistill.objectives.dekd import DeKD
from fastdistill.objectives.selection import EXAMPLE
from fastdistill.training.checks import own_columns
from fastdistill.training.sampling import lengths_of

LENGTH = "length"


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
        features = {name: value for name, value in batch.items() if name not in (EXAMPLE, LENGTH, *unused)}
        found.append((batch[EXAMPLE], packed_forward(model, inputs_of(model, features)).logits.float()))
    model.train(training)
    classes = max(gather_object([one.shape[-1] for _, one in found[:1]]))  # a process may have had no examples
    logits, times = torch.zeros(number, classes, device=device), torch.zeros(number, device=device)
    for examples, outputs in found:
        inside = (examples >= 0) & (examples < number)
        logits[examples[inside]] = outputs[inside]
        times[examples[inside]] += 1
    if processes.num_processes > 1:  # each has its own rows, and zeros for the others
        logits, times = reduce(logits, "sum"), reduce(times, "sum")
    if not bool((times == 1).all()):
        raise ValueError(f"the column {EXAMPLE!r} does not number the examples; expected 0 to {number - 1}, once each")
    return logits
