"""A transformer's feed-forward block with a gate on each neuron."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.ops.active_neurons import ActiveNeurons
from fastdistill.ops.bias_act_gate import ACTIVATIONS, Activation, bias_act_gate
from fastdistill.ops.checks import FLOATING, autocast_dtype, check_choice, check_same_device, check_tensor, is_floating

GATHER_ROWS = 16
"""To gather a neuron's weights, and spread their gradients, costs no more than multiplying this many rows by them."""


def gated_ffn(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    neuron_gate: Tensor | ActiveNeurons | None = None,
    *,
    activation: Activation = "gelu",
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
) -> Tensor:
    r"""Linear, activation, gate, linear; with bias, activation and gate in one sweep between the two products.

    .. math::
        \mathrm{out} = W_{out} \left( g \odot \mathrm{act}(W_{in} x + b_{in}) \right) + b_{out}

    or, with ``w_gate``, as in Llama and Gemma (Shazeer 2020: SwiGLU with ``"silu"``, GeGLU with ``"gelu"`` or
    ``"gelu_tanh"``; transformers' ``gate_proj`` is ``w_gate``, ``up_proj`` ``w_in``, ``down_proj`` ``w_out``)

    .. math::
        \mathrm{out} = W_{out} \left(
            g \odot \mathrm{act}(W_{gate} x + b_{gate}) \odot (W_{in} x + b_{in}) \right) + b_{out}

    A gate of 1 on every neuron is what STARK (Yang et al. 2022, section 3.2) differentiates with respect to; with a
    gate per example, ``[B, I]``, one backward gives the gradients of every example.

    Args:
        x: ``[..., d]``; float32, float64, bfloat16 or float16.
        w_in, b_in: ``[I, d]`` and ``[I]`` or None, as of :class:`torch.nn.Linear`.
        w_out, b_out: ``[d_out, I]`` and ``[d_out]`` or None.
        neuron_gate: ``[I]``; or ``[B, I]`` for x ``[B, ..., d]``; or None for no gate. Any of those dtypes, each its
            own. Its gradient is exact wherever it is wanted, also where the gate is 0. Or :class:`ActiveNeurons`.
        activation: ``"gelu"`` (exact, by erf), ``"gelu_tanh"`` (its approximation by tanh), ``"relu"`` or ``"silu"``.
        w_gate, b_gate: like ``w_in`` and ``b_in``; without ``w_gate`` no ``b_gate`` either.

    Returns:
        ``[..., d_out]`` in x's dtype; under autocast in autocast's, in which the products then are, as in
        :func:`torch.nn.functional.linear`. From one product to the other it is float32 (float64 for float64), but for
        the two factors of a block with ``w_gate``, which are rounded before they are multiplied.

    **Neurons that are off.** Those that :class:`ActiveNeurons` leaves out are in no arithmetic: their weights are not
    read, and get gradients of 0. A tensor multiplies, and nothing waits for the device to look at it; the gradients of
    weights under a gate of 0 are 0, too. On CPU, where looking costs nothing, a tensor that needs no gradient does as
    ActiveNeurons, in each call, if x has so many rows that it pays. The result is the same but where weights of neurons
    that are off are not finite.

    Sums are in a fixed order, but for those of PyTorch's matrix products on CPU, whose last digits may depend on the
    number of threads, as they seldom do where sizes are multiples of 16.

    Differentiable once, and not by torch.func; torch.vmap calls it once for each example of its batch.

    Raises:
        TypeError: an argument of the wrong type or dtype; dtypes of x, weights and biases that differ (but under
            autocast only if one of them is float64).
        ValueError: shapes that do not fit, tensors on different devices, an activation not named above, or ``b_gate``
            without ``w_gate``.
    """
    weights = (w_in, b_in, w_out, b_out, w_gate, b_gate)
    if not _fits(x, *weights, neuron_gate, activation):
        _explain(x, *weights, neuron_gate, activation)
    active = neuron_gate if isinstance(neuron_gate, ActiveNeurons) else _worth_finding(x, neuron_gate)
    gate = neuron_gate
    if active is not None:
        w_in, b_in, w_out = active.gather(w_in, b_in, w_out)
        if w_gate is not None:
            w_gate, b_gate = active.gather_rows(w_gate, b_gate)
        gate = active.gate
    if w_gate is None:
        return F.linear(bias_act_gate(F.linear(x, w_in), b_in, gate, activation), w_out, b_out)
    factor = bias_act_gate(F.linear(x, w_gate), b_gate, gate, activation)
    return F.linear(factor * F.linear(x, w_in, b_in), w_out, b_out)


def _worth_finding(x: Tensor, gate: Tensor | None) -> ActiveNeurons | None:
    """The neurons that are on, where computing no others pays."""
    if gate is None or not gate.is_cpu or (gate.requires_grad and torch.is_grad_enabled()):
        return None
    rows = x.shape[:-1].numel()
    if rows < GATHER_ROWS:
        return None
    if torch.compiler.is_compiling() or type(gate) not in (Tensor, torch.nn.Parameter):
        return None  # no shape may depend on values; nor under torch.vmap
    if torch._C._are_functorch_transforms_active():
        return None
    active = ActiveNeurons(gate)
    kept = len(active.indices)
    return active if rows * (active.neurons - kept) > GATHER_ROWS * kept else None


def _fits(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    neuron_gate: Tensor | ActiveNeurons | None,
    activation: str,
) -> bool:
    if not (activation in ACTIVATIONS and is_floating(x) and is_floating(w_in) and is_floating(w_out)):
        return False
    shape, of_in, of_out, dtype, device = x.shape, w_in.shape, w_out.shape, x.dtype, x.device
    if not (
        len(shape) > 0
        and len(of_in) == 2
        and len(of_out) == 2
        and of_in[1] == shape[-1]
        and of_out[1] == of_in[0]
        and w_in.device == device
        and w_out.device == device
        and (b_in is None or (is_floating(b_in) and b_in.shape == of_in[:1] and b_in.device == device))
        and (b_out is None or (is_floating(b_out) and b_out.shape == of_out[:1] and b_out.device == device))
        and (w_gate is not None or b_gate is None)
        and (w_gate is None or (is_floating(w_gate) and w_gate.shape == of_in and w_gate.device == device))
        and (b_gate is None or (is_floating(b_gate) and b_gate.shape == of_in[:1] and b_gate.device == device))
    ):
        return False
    if not (
        w_in.dtype is dtype
        and w_out.dtype is dtype
        and (b_in is None or b_in.dtype is dtype)
        and (b_out is None or b_out.dtype is dtype)
        and (w_gate is None or w_gate.dtype is dtype)
        and (b_gate is None or b_gate.dtype is dtype)
    ) and not _autocast_makes_equal(x, w_in, b_in, w_out, b_out, w_gate, b_gate):
        return False
    gate, neurons = neuron_gate, of_in[0]
    if isinstance(gate, ActiveNeurons):
        if gate.neurons != neurons:
            return False
        gate = gate.gate
        neurons = gate.shape[-1]
    return gate is None or (
        is_floating(gate)
        and (gate.shape == (neurons,) or (len(shape) > 1 and gate.shape == (shape[0], neurons)))
        and gate.device == device
    )


def _autocast_makes_equal(x: Tensor, *weights: Tensor | None) -> bool:
    """The dtypes in which matrix products take them: autocast leaves only float64 alone."""
    if autocast_dtype(x.device) is None:
        return False
    return all(tensor is None or tensor.dtype != torch.float64 for tensor in (x, *weights))


def _explain(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    neuron_gate: Tensor | ActiveNeurons | None,
    activation: str,
) -> None:
    check_choice("activation", activation, ACTIVATIONS)
    check_tensor("x", x, FLOATING)
    if x.dim() == 0:
        raise ValueError("x has shape (); expected [..., d]")
    for name, weight, of in (("w_in", w_in, "x"), ("w_out", w_out, "w_in")):
        check_tensor(name, weight, FLOATING)
        size = x.shape[-1] if of == "x" else w_in.shape[0]
        if weight.dim() != 2 or weight.shape[1] != size:
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)}; expected [outputs, {size}], "
                f"{size} being {'the last dimension of x' if of == 'x' else 'the rows of w_in'}"
            )
    if w_gate is not None:
        check_tensor("w_gate", w_gate, FLOATING)
        if w_gate.shape != w_in.shape:
            raise ValueError(f"w_gate has shape {tuple(w_gate.shape)}; expected {tuple(w_in.shape)}, that of w_in")
    for name, bias, of_weight in (("b_in", b_in, w_in), ("b_out", b_out, w_out), ("b_gate", b_gate, w_gate)):
        if bias is not None:
            if of_weight is None:
                raise ValueError(f"{name} is given without w_gate; expected None")
            check_tensor(name, bias, FLOATING)
            if bias.shape != of_weight.shape[:1]:
                raise ValueError(f"{name} has shape {tuple(bias.shape)}; expected ({len(of_weight)},) or None")
    named = {"w_in": w_in, "b_in": b_in, "w_out": w_out, "b_out": b_out, "w_gate": w_gate, "b_gate": b_gate}
    for name, tensor in named.items():
        if tensor is not None:
            if tensor.dtype != x.dtype and not _autocast_makes_equal(x, tensor):
                raise TypeError(f"{name} has dtype {tensor.dtype}; expected {x.dtype}, that of x")
            check_same_device(name, tensor, "x", x)
    if neuron_gate is not None:
        _explain_gate(neuron_gate, x, w_in.shape[0])


def _explain_gate(neuron_gate: Tensor | ActiveNeurons, x: Tensor, neurons: int) -> None:
    examples = f" or ({x.shape[0]}, {neurons})" if x.dim() > 1 else ", x having one dimension"
    if isinstance(neuron_gate, ActiveNeurons):
        gate = neuron_gate.gate.new_empty(*neuron_gate.gate.shape[:-1], neuron_gate.neurons)
    else:
        gate = neuron_gate
    check_tensor("neuron_gate", gate, FLOATING)
    if gate.shape != (neurons,) and not (x.dim() > 1 and gate.shape == (x.shape[0], neurons)):
        raise ValueError(f"neuron_gate has shape {tuple(gate.shape)}; expected ({neurons},){examples}")
    check_same_device("neuron_gate", gate, "x", x)
