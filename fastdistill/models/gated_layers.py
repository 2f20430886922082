"""A layer that computes its heads and neurons under gates, and of closed ones nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations
from transformers.pytorch_utils import Conv1D

from fastdistill.models.architectures import Block
from fastdistill.models.attention import IMPLEMENTATION, gated_if_faster, gates_heads, head_gate
from fastdistill.models.gated_values import activated, multiplied, noted
from fastdistill.models.hooks import forward_changed, is_plain
from fastdistill.models.narrowing import channels, heads_known, made_up
from fastdistill.ops import gate_rules
from fastdistill.ops.active_neurons import ActiveNeurons
from fastdistill.ops.bias_act_gate import Activation
from fastdistill.ops.checks import FLOATING
from fastdistill.ops.library import followed

GateOf = Callable[[Tensor], Tensor]
"""The gates of a layer's heads, or neurons, for values with an example a row."""


@dataclass
class _Open:
    """Units that are computed where others are closed."""

    number: int
    """Of those with a gate that is not 0: others are computed beside them to fill up groups."""
    gate: Tensor
    rows: list[Tensor]
    """Of each of the linear maps whose rows are the units'."""
    columns: Tensor
    known: dict[str, int]
    """What the attention module knows of its heads."""


class GatedLayer:
    """What the linear maps, the activation and the attention of a layer compute under its gates.

    Units whose gates are 0 and take no gradient are left out of all products, as `fastdistill.prune` would, where that
    pays (`worth_leaving_out`), and the others' gates multiply the columns of the output projection. Otherwise neurons
    are gated by the sweep of their activation (`neurons_by_kernel`), and heads by attention (`heads_by_kernel`), or by
    multiplications in front of the output projections. These alone are in compiled, traced and exported models and
    under torch.func, where nothing may depend on what gates hold.

    Heads are left out where attention is PyTorch's or ours, which give no weights of attention, without a cache of
    keys and values, which may be of other gates, and where all linear maps are plain ones.

    Args:
        ones: the gates are ones: nothing is multiplied by them, and they get their gradients.
    """

    def __init__(self, block: Block, place: int, heads: GateOf, neurons: GateOf, *, ones: bool = False) -> None:
        self.block, self.attention, self.size, self.ones = block, block.attention, block.head_size, ones
        self.heads, self.neurons = block.heads, block.neurons
        self.head_gate, self.neuron_gate = heads, neurons
        self.names = f"gates.heads[{place}]", f"gates.neurons[{place}]"
        self.plain_heads = not ones and not block.names.relative and _plain(*block.head_in, block.head_out)
        self.plain_neurons = not ones and _plain(*block.neuron_in, block.neuron_out)
        self.activation = _activation(block)
        self.found: dict[str, tuple[Tensor, int, _Open]] = {}
        self.open_heads: _Open | None = None
        self.open_neurons: _Open | None = None
        self.within = self.heads_done = self.neurons_done = False

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Within it the layer computes so."""
        block = self.block
        with ExitStack() as leave:

            def change(module: nn.Module, by: Callable[..., Any]) -> None:
                leave.enter_context(forward_changed(module, by))

            if self.heads:
                leave.enter_context(head_gate(self.attention, self._gate_of_attention))
                change(self.attention, self._attend)
                change(block.head_out, self._project_heads)
                for number, linear in enumerate(block.head_in if self.plain_heads else []):
                    change(linear, partial(self._head_rows, number, linear))
            if self.neurons:
                change(block.neuron_out, self._project_neurons)
                for number, linear in enumerate(block.neuron_in if self.plain_neurons else []):
                    change(linear, partial(self._neuron_rows, number, linear))
                if self.activation is not None:
                    change(self.activation[0], self._activate)
            yield

    # Heads

    def _attend(self, forward: Any, *inputs: Any, **others: Any) -> Any:
        if followed():
            return forward(*inputs, **others)
        given = [*inputs, *others.values()]
        self.heads_done, self.open_heads = False, self._find_heads(given)
        if self.open_heads is None:
            with gated_if_faster(self.attention, next(x for x in given if isinstance(x, Tensor)).device):
                return forward(*inputs, **others)
        before = {name: getattr(self.attention, name) for name in self.open_heads.known}
        vars(self.attention).update(self.open_heads.known)
        self.within = True
        try:
            return forward(*inputs, **others)
        finally:
            self.within = False
            vars(self.attention).update(before)

    def _find_heads(self, given: list[Any]) -> _Open | None:
        implementation = getattr(getattr(self.attention, "config", None), "_attn_implementation", None)
        if not self.plain_heads or implementation not in ("sdpa", IMPLEMENTATION):
            return None
        tensors = [x for x in given if isinstance(x, Tensor)]
        if any(x.dim() == 4 and x.shape[1] != 1 for x in tensors):  # a mask of each head
            return None
        if any(hasattr(x, "get_seq_length") for x in given):
            return None
        x = tensors[0]
        return self._find("heads", self.head_gate(x), x, self.heads)

    def _gate_of_attention(self, query: Tensor) -> Tensor | None:
        if self.ones and not (torch.is_grad_enabled() and gate_rules.heads_by_kernel(query)):
            return None
        if followed():
            return self.head_gate(query)
        if self.open_heads is not None:
            return None
        self.heads_done = True
        return self.head_gate(query)

    def _head_rows(self, number: int, linear: Any, forward: Any, x: Tensor) -> Any:
        if followed() or not self.within or self.open_heads is None:
            return forward(x)
        return _with_rows(linear, self.open_heads.rows[number], x)

    def _project_heads(self, forward: Any, contexts: Tensor) -> Any:
        if contexts.shape[-1] != self.heads * self.size:
            assert self.open_heads is not None
            if not self.open_heads.number:
                contexts = torch.zeros_like(contexts)
            return _with_columns(self.block.head_out, self.open_heads, contexts, self.size)
        by_attention = gates_heads(self.attention) and not self.ones if followed() else self.heads_done
        if by_attention or (self.ones and not torch.is_grad_enabled()):
            return forward(contexts)
        gate = self.head_gate(contexts)
        return forward(noted(contexts, gate) if self.ones else multiplied(contexts, self.names[0], gate, self.size))

    # Neurons

    def _neuron_rows(self, number: int, linear: Any, forward: Any, x: Tensor) -> Any:
        if followed():
            return forward(x)
        self.open_neurons = self._find("neurons", self.neuron_gate(x), x, self.neurons)
        return forward(x) if self.open_neurons is None else _with_rows(linear, self.open_neurons.rows[number], x)

    def _activate(self, forward: Any, h: Tensor) -> Any:
        assert self.activation is not None
        if followed() or h.shape[-1] != self.neurons or not gate_rules.neurons_by_kernel(h):
            return forward(h)
        gate = self.neuron_gate(h)
        if not _fits(gate, len(h), self.neurons) or (self.ones and not torch.is_grad_enabled()):
            return forward(h)  # what is wrong is said later
        self.neurons_done = True
        return activated(h, gate, self.activation[1])

    def _project_neurons(self, forward: Any, neurons: Tensor) -> Any:
        if neurons.shape[-1] != self.neurons:
            assert self.open_neurons is not None
            return _with_columns(self.block.neuron_out, self.open_neurons, neurons, 1)
        if not followed():
            done, self.neurons_done = self.neurons_done, False
            if done or (self.ones and not torch.is_grad_enabled()):
                return forward(neurons)
        gate = self.neuron_gate(neurons)
        return forward(noted(neurons, gate) if self.ones else multiplied(neurons, self.names[1], gate, 1))

    # Both

    def _find(self, kind: str, gate: Tensor, x: Tensor, units: int) -> _Open | None:
        """What is to be computed of the layer, found anew if the gate is another or was changed; None for all."""
        if (gate.requires_grad and torch.is_grad_enabled()) or not _fits(gate, len(x), units):
            return None
        rows, kept = x.shape[:-1].numel(), self.found.get(kind)
        if not gate_rules.worth_leaving_out(rows, units, 0, x.device):
            return None
        version = -1 if gate.is_inference() else gate._version
        if kept is None or kept[0] is not gate or kept[1] != version or version < 0:
            find = self._open_heads if kind == "heads" else self._open_neurons
            kept = self.found[kind] = gate, version, find(gate.detach())
        found = kept[2]
        return found if gate_rules.worth_leaving_out(rows, units, found.gate.shape[-1], x.device) else None

    def _open_heads(self, gate: Tensor) -> _Open:
        block, on = self.block, gate != 0
        heads = (on if on.dim() == 1 else on.any(0)).nonzero().squeeze(1)
        number = len(heads)
        if not number:
            heads = heads.new_zeros(1)  # attention of none is not computed by all modules: of one, and not looked at
        own = made_up(heads, block).to(gate.device)
        per_group = block.heads // block.groups
        groups = (own // per_group).unique()
        rows = [
            channels(linear, groups, block.groups, rows=True)[1]
            if is_shared
            else channels(linear, own, block.heads, block.names.head_parts, rows=True)[1]
            for linear, is_shared in block.head_rows()
        ]
        columns = channels(block.head_out, own, block.heads, rows=False)[1]
        known = heads_known(self.attention, len(own), len(own) // len(groups), self.size)
        return _Open(number, gate.index_select(-1, own), rows, columns, known)

    def _open_neurons(self, gate: Tensor) -> _Open:
        active, parts = ActiveNeurons(gate), self.block.names.neuron_parts
        rows = [channels(linear, active.indices, self.neurons, parts, rows=True)[1] for linear in self.block.neuron_in]
        return _Open(len(active.indices), active.gate, rows, active.indices, {})


def _fits(gate: Tensor, batch: int, units: int) -> bool:
    """Whether it is of a shape and kind that can be looked at."""
    return (
        type(gate) in (Tensor, nn.Parameter)
        and gate.device.type in ("cpu", "cuda")
        and gate.dtype in FLOATING
        and tuple(gate.shape) in ((units,), (batch, units))
    )


def _plain(*linears: Any) -> bool:
    return all(is_plain(linear, nn.Linear, Conv1D) for linear in linears)


def _activation(block: Block) -> tuple[nn.Module, Activation] | None:
    """The module between a layer's linear maps, and what `bias_act_gate` calls it; None where it is not known."""
    parent = block.layer.get_submodule(block.names.neuron_in[0].rpartition(".")[0])
    found = [(module, name) for module in parent.children() if (name := _name(module)) is not None]
    return found[0] if len(found) == 1 else None


def _name(module: Any) -> Activation | None:
    kind = type(module)
    if not is_plain(module, kind):
        return None
    if kind is nn.ReLU:
        return "relu" if not module.inplace else None
    if kind in (nn.SiLU, activations.SiLUActivation):
        return "silu"
    if kind is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if kind is activations.NewGELUActivation or (kind is activations.GELUTanh and isinstance(module.act, partial)):
        return "gelu_tanh"
    return "gelu" if kind is activations.GELUActivation and module.act is F.gelu else None


def _with_rows(linear: Any, rows: Tensor, x: Tensor) -> Tensor:
    bias = None if linear.bias is None else linear.bias.index_select(0, rows)
    if isinstance(linear, Conv1D):
        return F.linear(x, linear.weight.index_select(1, rows).T, bias)
    return F.linear(x, linear.weight.index_select(0, rows), bias)


def _with_columns(linear: Any, units: _Open, values: Tensor, size: int) -> Tensor:
    weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
    weight, gate = weight.index_select(1, units.columns), units.gate
    if gate.dim() == 1:  # less to multiply than the values
        weight = (weight * gate.repeat_interleave(size)).to(weight.dtype)
    else:
        values = multiplied(values, "gate", gate, size)
    return F.linear(values, weight, linear.bias)
