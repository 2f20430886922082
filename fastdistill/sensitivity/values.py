"""What heads and neurons give on, and from it the gradients of gates that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdistill.models.architectures import blocks
from fastdistill.models.hooks import hooked, inputs_changed, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class UnitValues:
    r"""The values of a model's heads, then neurons, in its last forward pass, layer by layer.

    A gate of one that multiplies a unit's values :math:`x` has the gradient :math:`\sum x\,\partial L/\partial x`: it
    is had without the multiplications, forward or backward.
    """

    def __init__(self, units: list[int]) -> None:
        self.units = units
        self._seen: list[list[Tensor]] = [[] for _ in units]

    def clear(self) -> None:
        """Before another forward pass."""
        for seen in self._seen:
            seen.clear()

    def see(self, place: int, values: Tensor) -> tuple[Tensor]:
        if not torch.is_grad_enabled():
            return (values,)
        if not values.requires_grad:  # nothing before it takes a gradient
            values = values.detach().requires_grad_()
        self._seen[place].append(values)  # several where a layer is applied again
        return (values,)

    def gradients(self, outputs: Tensor, grad_output: Tensor | None = None, *, retain_graph: bool = False) -> Tensor:
        """Every example's, ``[B, all units]``, summed in float32, or in float64 for values of that."""
        flat = [values for seen in self._seen for values in seen]
        if not outputs.requires_grad or not flat:
            return outputs.new_zeros(len(outputs) if outputs.dim() else 1, 0)
        grads = iter(torch.autograd.grad(outputs, flat, grad_output, retain_graph=retain_graph, materialize_grads=True))
        found = []
        for seen, units in zip(self._seen, self.units, strict=True):
            if units:
                found.append(reduce(torch.add, [_by_unit(values, next(grads), units) for values in seen]))
        return torch.cat(found, 1)


def _by_unit(values: Tensor, grad: Tensor, units: int) -> Tensor:
    dtype = torch.promote_types(values.dtype, torch.float32)
    product = values.detach().to(dtype) * grad.to(dtype)
    size = product.shape[-1] // units
    return product.view(len(product), -1, units, size).sum((1, 3))


@contextmanager
def unit_values(model: PreTrainedModel) -> Iterator[UnitValues]:
    """Within it what the model's heads and neurons give to the output projections is kept, a forward pass long.
    Compiled models run uncompiled: between two outputs of a graph that was compiled there is no gradient.

    Raises ValueError for an unknown architecture, and for a model within `fastdistill.gate`.
    """
    model = whole(model)
    layers = blocks(model)
    modules = [*(block.head_out for block in layers), *(block.neuron_out for block in layers)]
    values = UnitValues([*(block.heads for block in layers), *(block.neurons for block in layers)])
    with ExitStack() as leave:
        leave.enter_context(torch.compiler.set_stance("force_eager"))
        leave.enter_context(hooked(model, "gate"))  # whose multiplications it stands for
        for place, module in enumerate(modules):
            if values.units[place]:
                leave.enter_context(inputs_changed(module, partial(values.see, place)))
        yield values
