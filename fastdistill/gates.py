"""Gates on the attention heads and feed-forward neurons of an encoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastdistill.architectures import blocks, hooked
from fastdistill.attention import IMPLEMENTATION, head_gate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Gates:
    """Factors of a model's heads and neurons, one tensor a layer, which may be replaced or changed at any time.

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
    gradient are not computed. Layers without heads or neurons have gates without elements.

    Args:
        model: a BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, MPNet, DistilBERT or ViT, with any head.

    Raises ValueError for an unknown architecture, and in the model's forward for a gate of another shape.
    """
    layers = blocks(model)

    def ones(size: int, weight: Tensor) -> Tensor:
        return torch.ones(size, device=weight.device, dtype=weight.dtype, requires_grad=True)

    gates = Gates(
        [ones(block.heads, next(block.layer.parameters())) for block in layers],
        [ones(block.neurons, next(block.layer.parameters())) for block in layers],
    )
    skips = getattr(model.config, "_attn_implementation", None) == IMPLEMENTATION and model._supports_attention_backend
    with ExitStack() as leave:
        leave.enter_context(hooked(model, "gate"))
        for place, block in enumerate(layers):
            if block.heads and skips:
                leave.enter_context(head_gate(block.attention, partial(gates.heads.__getitem__, place)))
            elif block.heads:
                hook = partial(_multiply, gates.heads, place, "heads", block.head_size)
                leave.callback(block.head_out.register_forward_pre_hook(hook).remove)
            if block.neurons:
                hook = partial(_multiply, gates.neurons, place, "neurons", 1)
                leave.callback(block.neuron_out.register_forward_pre_hook(hook).remove)
        yield gates


def _multiply(
    gates: list[Tensor], place: int, kind: str, size: int, module: nn.Module, inputs: tuple[Tensor]
) -> Tensor:
    """Of ``[B, ..., units * size]`` each unit's `size` values times its gate."""
    values = inputs[0]
    gate = check_gate(f"gates.{kind}[{place}]", gates[place], len(values), values.shape[-1] // size)
    if gate.dim() == 2:
        gate = gate.view(len(gate), *[1] * (values.dim() - 2), -1)
    gated: Tensor = (values.unflatten(-1, (-1, size)) * gate.unsqueeze(-1)).flatten(-2)
    return gated


def check_gate(name: str, gate: Tensor, batch_size: int, units: int) -> Tensor:
    if tuple(gate.shape) not in ((units,), (batch_size, units)):
        raise ValueError(f"{name} has shape {tuple(gate.shape)}; expected ({units},) or ({batch_size}, {units})")
    return gate
