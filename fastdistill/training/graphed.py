"""Forward and backward passes as CUDA graphs, which leave gradients where optimizers look for them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.cuda_graphs import GraphedStep, Graphs

Told = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]
"""Of a micro-batch what it adds to the step's loss, and what is logged and looked at of it, by name."""


class GraphedBackward:
    """A loss and its gradients by `GraphedStep`, as ``loss.backward()`` would leave them.

    All graphs write gradients to the same buffers, one for each weight that has one. After a replay they are the
    weights' ``grad`` or, where there is one already, are added to it. (By `torch.autograd.grad`, since ``backward``
    adds up on the stream that a weight was first used on.)

    Args:
        loss_of: gives of the inputs the loss, and what else is told, as tensors without gradients.
        weights: that learn, or do not (``requires_grad``) and then have no gradient.
        others: of models that are run, too. Where any of these or of the weights lies elsewhere than before, or begins
            or ceases to learn, a step is another.
        graphs: capture it.
        name: what a line on stderr calls it.
    """

    def __init__(
        self,
        loss_of: Callable[..., Told],
        weights: Sequence[nn.Parameter],
        others: Iterable[Tensor],
        graphs: Graphs,
        name: str = "training",
    ) -> None:
        self.loss_of, self.weights, self.others = loss_of, weights, list(others)
        self.buffers: list[Tensor | None] = [None for _ in weights]
        self.step = GraphedStep(self._run, graphs, name)

    def __call__(self, *inputs: Any, state: Hashable = ()) -> Told | None:
        """None where the caller is to compute it: see `GraphedStep`."""
        for weight, buffer in zip(self.weights, self.buffers, strict=True):
            if buffer is not None and weight.grad is not None and weight.grad.data_ptr() == buffer.data_ptr():
                weight.grad = weight.grad.clone()  # of the micro-batch before, which is not to be written over
        lies = tuple((one.data_ptr(), one.requires_grad) for one in (*self.weights, *self.others))
        found = self.step(*inputs, state=(state, lies))
        if found is None:
            return None
        told, places = found
        self._hand_on(places)
        return told

    def _run(self, *inputs: Any) -> tuple[Told, tuple[int, ...]]:
        """What is told, and which weights have a gradient in their buffers."""
        loss, *others = self.loss_of(*inputs)
        learning = [place for place, weight in enumerate(self.weights) if weight.requires_grad]
        found = torch.autograd.grad(loss, [self.weights[place] for place in learning], allow_unused=True)
        gradients = {place: one.contiguous() for place, one in zip(learning, found, strict=True) if one is not None}
        for place in gradients:
            if self.buffers[place] is None:
                self.buffers[place] = torch.empty_like(self.weights[place], memory_format=torch.contiguous_format)
        torch._foreach_copy_([self.buffers[place] for place in gradients], list(gradients.values()))  # type: ignore[misc]
        return (loss.detach(), *others), tuple(gradients)  # type: ignore[return-value]

    def _hand_on(self, places: Iterable[int]) -> None:
        sums, more = [], []
        for place in places:
            weight, buffer = self.weights[place], self.buffers[place]
            assert buffer is not None
            if weight.grad is None:
                weight.grad = buffer
            else:
                sums.append(weight.grad)
                more.append(buffer)
        if sums:
            torch._foreach_add_(sums, more)
