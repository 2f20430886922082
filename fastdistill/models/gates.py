"""Gates on the attention heads and feed-forward neurons of a transformer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastdistill.models.architectures import blocks
from fastdistill.models.attention import gates_heads, head_gate
from fastdistill.models.hooks import hooked, inputs_changed, recomputed_within, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Gates:
    """Factors of a model's heads and neurons, one tensor a layer; tensors and lists may be replaced at any time.

    ``heads[l]`` is ``[H]``, or ``[B, H]`` for one that differs by example, and ``neurons[l]`` ``[I]`` or ``[B, I]``.
    They begin as ones that require a gradient.
    """

    def __init__(self, heads: list[Tensor], neurons: list[Tensor]) -> None:
        self.heads, self.neurons = heads, neurons

    @property
    def tensors(self) -> list[Tensor]:
        """All of them: heads, then neurons."""
        return [*self.heads, *self.neurons]

    def per_example(self, batch_size: int) -> None:
        """Ones that require a gradient for each of `batch_size` examples: each example's own gradient is then had
        from one backward pass of their sum."""
        self.heads[:] = [_ones(gate, batch_size) for gate in self.heads]
        self.neurons[:] = [_ones(gate, batch_size) for gate in self.neurons]


def _ones(like: Tensor, *batch: int) -> Tensor:
    return torch.ones(*batch, like.shape[-1], device=like.device, dtype=like.dtype, requires_grad=True)


@contextmanager
def gate(model: PreTrainedModel) -> Iterator[Gates]:
    r"""Put gates into a model, which leave it as it was at the end of the ``with`` block.

    .. code-block:: python

        with fastdistill.gate(model) as gates:
            model(**batch, labels=labels).loss.backward()
            gates.heads[0].grad

    A head's gate :math:`\xi` multiplies its context, after softmax·V and before the output projection, and a neuron's
    gate :math:`\nu` the neuron after its activation, before the second linear map (STARK, Yang et al. 2022, section
    3.2). With attention of any kind; with ``attn_implementation="fastdistill"`` heads whose gate is 0 and takes no
    gradient are not computed. Layers without heads or neurons have gates without elements. Of grouped queries the heads
    are those of query, and of a gated feed-forward network a neuron is the product that the second linear map is given.
    A layer that is applied again and again (ALBERT) has one gate for all applications.

    Args:
        model: of a known architecture, with any head.

    Raises ValueError for an unknown architecture, and in the model's forward for a gate of another shape. With gradient
    checkpointing, backward() must be within the block: RuntimeError otherwise.
    """
    model = whole(model)
    layers = blocks(model)

    def ones(size: int, weight: Tensor) -> Tensor:
        return torch.ones(size, device=weight.device, dtype=weight.dtype, requires_grad=True)

    gates = Gates(
        [ones(block.heads, next(block.layer.parameters())) for block in layers],
        [ones(block.neurons, next(block.layer.parameters())) for block in layers],
    )
    with ExitStack() as leave:
        leave.enter_context(hooked(model, "gate"))
        leave.enter_context(recomputed_within(model, "gate"))
        for place, block in enumerate(layers):
            if block.heads:
                leave.enter_context(head_gate(block.attention, partial(_head_gate, gates, place)))
                change = partial(_gate_heads, gates, place, block.head_size, block.attention)
                leave.enter_context(inputs_changed(block.head_out, change))
            if block.neurons:
                leave.enter_context(inputs_changed(block.neuron_out, partial(_gate_neurons, gates, place)))
        yield gates


def _head_gate(gates: Gates, place: int) -> Tensor:
    return gates.heads[place]


def _gate_heads(gates: Gates, place: int, size: int, attention: nn.Module, contexts: Tensor) -> tuple[Tensor]:
    """For the output projection, unless the attention has done it."""
    if gates_heads(attention):
        return (contexts,)
    return (_multiply(contexts, f"gates.heads[{place}]", gates.heads[place], size),)


def _gate_neurons(gates: Gates, place: int, neurons: Tensor) -> tuple[Tensor]:
    return (_multiply(neurons, f"gates.neurons[{place}]", gates.neurons[place], 1),)


def _multiply(values: Tensor, name: str, gate: Tensor, size: int) -> Tensor:
    """Of ``[B, ..., units * size]`` each unit's `size` values times its gate, in the values' dtype."""
    gate = check_gate(name, gate, values.shape[0], values.shape[-1] // size)
    if gate.dim() == 2:
        gate = gate.view(gate.shape[0], *[1] * (values.dim() - 2), -1)
    gated: Tensor = (values.unflatten(-1, (-1, size)) * gate.unsqueeze(-1)).flatten(-2)
    return gated.to(values.dtype)


def check_gate(name: str, gate: Tensor, batch_size: int, units: int) -> Tensor:
    if tuple(gate.shape) not in ((units,), (batch_size, units)):
        raise ValueError(f"{name} has shape {tuple(gate.shape)}; expected ({units},) or ({batch_size}, {units})")
    return gate
