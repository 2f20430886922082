"""The gradients of gates that are not there: in front of every head and neuron, and 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdistill.models.architectures import blocks
from fastdistill.models.gated_layers import GatedLayer
from fastdistill.models.hooks import hooked, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class UnitValues:
    r"""Stands for gates of a model's heads, then neurons, in its last forward pass, layer by layer.

    A gate of one that multiplies a unit's values :math:`x` has the gradient :math:`\sum x\,\partial L/\partial x`: it
    is had without the multiplications, forward or backward, as the backward pass comes by. Of neurons it is summed by
    the backward sweep of their activation, of heads by that of `gated_attention`, where these are faster
    (`fastdistill.ops.gate_rules`).
    """

    def __init__(self, units: list[int]) -> None:
        self.units = units
        self._gates: list[Tensor | None] = [None for _ in units]

    def clear(self) -> None:
        """Before another forward pass."""
        self._gates = [None for _ in self.units]

    def gate(self, place: int, values: Tensor) -> Tensor:
        """Of each example, ``[B, units]``; the same where a layer is applied again."""
        gate = self._gates[place]
        if gate is None:
            dtype = torch.promote_types(values.dtype, torch.float32)
            gate = values.new_ones(len(values), self.units[place], dtype=dtype).requires_grad_()
            self._gates[place] = gate
        return gate

    def gradients(self, outputs: Tensor, grad_output: Tensor | None = None, *, retain_graph: bool = False) -> Tensor:
        """Every example's, ``[B, all units]``, summed in float32, or in float64 for values of that."""
        gates = [gate for gate in self._gates if gate is not None]
        if not outputs.requires_grad or not gates:
            return outputs.new_zeros(len(outputs) if outputs.dim() else 1, 0)
        return torch.cat(
            torch.autograd.grad(outputs, gates, grad_output, retain_graph=retain_graph, materialize_grads=True), 1
        )


@contextmanager
def unit_values(model: PreTrainedModel) -> Iterator[UnitValues]:
    """Within it each of the model's heads and neurons has a gate that `UnitValues` gives the gradient of.
    Compiled models run uncompiled: between two outputs of a graph that was compiled there is no gradient.

    Raises ValueError for an unknown architecture, and for a model within `fastdistill.gate`.
    """
    model = whole(model)
    layers = blocks(model)
    values = UnitValues([*(block.heads for block in layers), *(block.neurons for block in layers)])
    with ExitStack() as leave:
        leave.enter_context(torch.compiler.set_stance("force_eager"))
        leave.enter_context(hooked(model, "gate"))  # whose multiplications it stands for
        for place, block in enumerate(layers):
            heads, neurons = partial(values.gate, place), partial(values.gate, len(layers) + place)
            leave.enter_context(GatedLayer(block, place, heads, neurons, ones=True).changed())
        yield values
