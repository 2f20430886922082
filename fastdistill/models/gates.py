"""Gates on the attention heads and feed-forward neurons of a transformer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdistill.models.architectures import blocks
from fastdistill.models.gated_layers import GatedLayer
from fastdistill.models.hooks import hooked, recomputed_within, whole

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
    3.2). With attention of any kind. Units whose gates are 0 and take no gradient are not computed, neither they nor
    their rows and columns of the linear maps, so that a masked model is as fast as a pruned one (not in compiled and
    exported models; heads: not with eager attention, and not with a cache); gates that take one are in the kernels that
    are faster than multiplications, as `fastdistill.doctor` says. Layers without heads or neurons have gates without
    elements. Of grouped queries the heads are those of query, and of a gated feed-forward network a neuron is the
    product that the second linear map is given.
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
            heads, neurons = partial(_given, gates, "heads", place), partial(_given, gates, "neurons", place)
            leave.enter_context(GatedLayer(block, place, heads, neurons).changed())
        yield gates


def _given(gates: Gates, units: str, place: int, values: Tensor) -> Tensor:
    gate: Tensor = getattr(gates, units)[place]
    return gate
