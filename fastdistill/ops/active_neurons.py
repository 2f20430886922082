"""The neurons of a feed-forward block that are on, found once."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.ops.checks import FLOATING, check_tensor

MULTIPLE = 16
"""Of what matrix products are fast at: there are so many of them, or a multiple."""


class ActiveNeurons:
    """The neurons of a feed-forward block that are on under a gate, found once: :func:`fastdistill.gated_ffn` takes
    them in the place of the gate, and computes no others.

    Weights that train are gathered in each call. Those of a frozen layer can be gathered once, as a narrower layer::

        active = ActiveNeurons(neuron_gate)
        weights = active.gather(w_in, b_in, w_out)
        out = gated_ffn(x, *weights, b_out, active.gate)

    and of a block with ``w_gate`` its rows by :meth:`gather_rows`, too.

    Attributes:
        indices: ``[K]`` int64, of the neurons whose gate is not 0 (for ``[B, I]``: in any example), filled up to a
            multiple of 16, at which products are fast, by repeating the first.
        gate: ``[K]`` or ``[B, K]``, their gates; 0 for what fills up.
        neurons: I.

    All of them are copies: what becomes of the gate or of weights later goes unnoticed.

    Args:
        neuron_gate: ``[I]`` or ``[B, I]``, of a floating dtype. On CUDA this waits for the device, once.

    Raises:
        TypeError: a gate of the wrong type or dtype.
        ValueError: another shape, or a gate that requires a gradient, which those that are off would not get.
    """

    def __init__(self, neuron_gate: Tensor) -> None:
        check_tensor("neuron_gate", neuron_gate, FLOATING)
        if neuron_gate.dim() not in (1, 2):
            raise ValueError(f"neuron_gate has shape {tuple(neuron_gate.shape)}; expected [I] or [B, I]")
        if neuron_gate.requires_grad and torch.is_grad_enabled():
            raise ValueError("neuron_gate requires a gradient, also where it is 0; expected neuron_gate.detach()")
        with torch.inference_mode(False), torch.no_grad():  # may be used in a call that records
            on = neuron_gate != 0
            indices = (on if on.dim() == 1 else on.any(0)).nonzero().squeeze(1)
            count = len(indices)
            self.indices = torch.cat([indices, indices[:1].expand(-count % MULTIPLE)])
            self.gate = neuron_gate.index_select(-1, self.indices)
            self.gate[..., count:] = 0
            self.neurons = neuron_gate.shape[-1]

    def gather(self, w_in: Tensor, b_in: Tensor | None, w_out: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The weights of these neurons: ``[K, d]``, ``[K]`` and ``[d_out, K]``. Differentiable."""
        return *self.gather_rows(w_in, b_in), w_out.index_select(1, self.indices)

    def gather_rows(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Of ``w_in`` and ``b_in``, or ``w_gate`` and ``b_gate``: ``[K, d]`` and ``[K]``. Differentiable."""
        return weight.index_select(0, self.indices), None if bias is None else bias.index_select(0, self.indices)
