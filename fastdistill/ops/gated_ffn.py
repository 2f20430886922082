"""A transformer's feed-forward block with a gate on each neuron."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastdistill.ops.bias_act_gate import ACTIVATIONS, Activation, bias_act_gate
from fastdistill.ops.checks import FLOATING, check_choice, check_same_device, check_tensor


def gated_ffn(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    neuron_gate: Tensor | None = None,
    *,
    activation: Activation = "gelu",
) -> Tensor:
    r"""Linear, activation, gate, linear; with bias, activation and gate in one sweep between the two products.

    .. math::
        \mathrm{out} = W_{out} \left( g \odot \mathrm{act}(W_{in} x + b_{in}) \right) + b_{out}

    A gate of 1 on every neuron is what STARK (Yang et al. 2022, section 3.2) differentiates with respect to; with a
    gate per example, ``[B, I]``, one backward gives the gradients of every example.

    Args:
        x: ``[..., d]``; float32, float64, bfloat16 or float16.
        w_in, b_in: ``[I, d]`` and ``[I]`` or None, as of :class:`torch.nn.Linear`.
        w_out, b_out: ``[d_out, I]`` and ``[d_out]`` or None.
        neuron_gate: ``[I]``; or ``[B, I]`` for x ``[B, ..., d]``; or None for no gate. Any of those dtypes, each its
            own. Its gradient is exact wherever it is wanted, also where the gate is 0.
        activation: ``"gelu"`` (exact, by erf), ``"gelu_tanh"`` (its approximation by tanh), ``"relu"`` or ``"silu"``.

    Returns:
        ``[..., d_out]`` in x's dtype; under autocast in autocast's, in which the products then are, as in
        :func:`torch.nn.functional.linear`. From one product to the other it is float32 (float64 for float64).

    **Neurons that are off.** Where the gate needs no gradient (it does not require one, or none is being recorded), a
    neuron whose gate is 0 (for ``[B, I]``: in all examples) is left out of all arithmetic: its weights are not read,
    and their gradients are exactly 0. Where the gate needs one, every neuron is computed.

    Which neurons are on is found once for a gate, which on CUDA waits for the device; and the weights of a frozen layer
    are gathered once. Both are kept for as long as gate and weights are the same tensors (or the same parts of them),
    alive and not changed in place. A change that autograd does not count (through ``.data``, or by what replaces the
    storage of parameters) goes unnoticed: tell of it by :func:`torch.autograd.graph.increment_version`. Nothing is kept
    of what requires a gradient, which fused optimizers change uncounted, nor of tensors made in inference mode.

    Under torch.compile, for tensor subclasses and on the meta device the gate only multiplies, for no shape may depend
    on values: the result and its gradients are the same but where weights of neurons that are off are not finite.

    Differentiable once.

    Raises:
        TypeError: an argument of the wrong type or dtype; dtypes of x, weights and biases that differ (but under
            autocast only if one of them is float64).
        ValueError: shapes that do not fit, tensors on different devices, or an activation not named above.
    """
    _check(x, w_in, b_in, w_out, b_out, neuron_gate, activation)
    gate = neuron_gate
    if gate is not None and _may_skip(gate):
        kept, gate = _neurons_on(gate)
        if kept is not None:
            dtype = _product_dtype(w_in)
            w_in, w_out = _gather(w_in, kept, 0, dtype), _gather(w_out, kept, 1, dtype)
            b_in = None if b_in is None else _gather(b_in, kept, 0, b_in.dtype)
    return F.linear(bias_act_gate(F.linear(x, w_in), b_in, gate, activation), w_out, b_out)


def _check(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    neuron_gate: Tensor | None,
    activation: str,
) -> None:
    check_choice("activation", activation, ACTIVATIONS)
    check_tensor("x", x, FLOATING)
    if x.dim() == 0:
        raise ValueError("x has shape (); expected [..., d]")
    width = x.shape[-1]
    dtype = _product_dtype(x)
    for name, weight, size, of in (("w_in", w_in, width, "x"), ("w_out", w_out, None, "w_in")):
        check_tensor(name, weight, FLOATING)
        size = w_in.shape[0] if size is None else size
        if weight.dim() != 2 or weight.shape[1] != size:
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)}; expected [outputs, {size}], "
                f"{size} being {'the last dimension of x' if of == 'x' else 'the rows of w_in'}"
            )
    neurons = w_in.shape[0]
    for name, bias, size in (("b_in", b_in, neurons), ("b_out", b_out, w_out.shape[0])):
        if bias is not None:
            check_tensor(name, bias, FLOATING)
            if bias.shape != (size,):
                raise ValueError(f"{name} has shape {tuple(bias.shape)}; expected ({size},) or None")
    if neuron_gate is not None:
        check_tensor("neuron_gate", neuron_gate, FLOATING)
        per_example = x.dim() > 1 and neuron_gate.shape == (x.shape[0], neurons)
        if neuron_gate.shape != (neurons,) and not per_example:
            examples = f" or ({x.shape[0]}, {neurons})" if x.dim() > 1 else ", x having one dimension"
            raise ValueError(f"neuron_gate has shape {tuple(neuron_gate.shape)}; expected ({neurons},){examples}")
    for name, tensor in (("w_in", w_in), ("b_in", b_in), ("w_out", w_out), ("b_out", b_out)):
        if tensor is not None and _product_dtype(tensor) != dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected {x.dtype}, that of x")
        if tensor is not None:
            check_same_device(name, tensor, "x", x)
    if neuron_gate is not None:
        check_same_device("neuron_gate", neuron_gate, "x", x)


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matrix product takes x in: autocast leaves only float64 alone."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


# Neurons that are off -------------------------------------------------------------------------------------------------


def _may_skip(gate: Tensor) -> bool:
    if gate.requires_grad and torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or gate.is_meta:
        return False
    return type(gate) in (Tensor, torch.nn.Parameter)


_Value = TypeVar("_Value")


class _Cache:
    """What was last computed from a tensor, for as long as that is alive and has not changed. A part of another tensor
    (a view) may be a new object in each call: the tensor that it is of is what counts as alive."""

    def __init__(self) -> None:
        self.entries = WeakTensorKeyDictionary()

    def get(self, tensor: Tensor, what: tuple[Any, ...], of: object, compute: Callable[[], _Value]) -> _Value:
        """``compute()``, or what it returned when called for the same ``tensor``, ``what`` and ``of``, the last being
        one particular object. Of calls that differ only in ``of`` and in the tensor's values, the last is kept."""
        with torch.inference_mode(False), torch.no_grad():  # what is kept may be used in a later call that records
            whole = tensor if tensor._base is None else tensor._base
            if whole.requires_grad or tensor.is_inference():
                return compute()
            values = self.entries.get(whole)
            if values is None:
                values = self.entries[whole] = {}
            key = (*what, tensor.storage_offset(), tensor.shape, tensor.stride())
            state = (tensor._version, tensor.data_ptr(), tensor.dtype)
            found = values.get(key)
            if found is None or found[0] != state or found[1] is not of:
                found = values[key] = (state, of, compute())
            value: _Value = found[2]
            return value


_ON = _Cache()
_GATHERED = _Cache()


def _neurons_on(gate: Tensor) -> tuple[Tensor | None, Tensor]:
    """(indices of neurons that are on, their gates), or (None, the gate) if all are."""

    def find() -> tuple[Tensor, Tensor] | None:
        on = gate != 0
        indices = (on.any(0) if gate.dim() == 2 else on).nonzero().squeeze(1)
        return None if len(indices) == gate.shape[-1] else (indices, gate.index_select(-1, indices))

    return _ON.get(gate, (), None, find) or (None, gate)


def _gather(weight: Tensor, kept: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    def select() -> Tensor:
        return weight.index_select(dim, kept).to(dtype)

    if weight.requires_grad and torch.is_grad_enabled():
        return select()
    return _GATHERED.get(weight, (dim, dtype), kept, select)
