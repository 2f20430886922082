"""gated_ffn with w_gate: SwiGLU and GeGLU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import gated_ffn
from fastdistill.ops import ActiveNeurons
from tests import eager
from tests.accuracy import assert_accurate
from tests.ops.ffn import ACTIVATIONS, DTYPES, GATES, make

NAMES = ("x", "w_in", "b_in", "w_out", "b_out", "neuron_gate", "w_gate", "b_gate")
WEIGHTS = ("w_in", "b_in", "w_gate", "b_gate")  # a row of each is a neuron's


def inputs(*shape: int, neurons: int = 37, bias: bool = True, **options: Any) -> dict[str, Tensor | None]:
    made = make(*shape, neurons=neurons, bias=bias, **options)
    g = torch.Generator().manual_seed(1)
    w_gate = torch.randn(made[1].shape, generator=g, dtype=torch.float64).to(made[1])
    b_gate = torch.randn(neurons, generator=g, dtype=torch.float64).to(made[1]) if bias else None
    return dict(zip(NAMES, (*made, w_gate, b_gate), strict=True))


def call(function: Any, given: dict[str, Any], **options: Any) -> Tensor:
    *first, w_gate, b_gate = given.values()
    out: Tensor = function(*first, w_gate=w_gate, b_gate=b_gate, **options)
    return out


def with_gradients(
    function: Any, given: dict[str, Any], but: tuple[str, ...] = (), **options: Any
) -> dict[str, Tensor]:
    """The output and, by name, the gradients of all inputs but those named."""
    leaves = {name: x if x is None else x.detach().requires_grad_(name not in but) for name, x in given.items()}
    out = call(function, leaves, **options)
    wanted = {name: x for name, x in leaves.items() if x is not None and x.requires_grad}
    upstream = torch.linspace(0.5, 2, max(out.numel(), 1), dtype=torch.float64)[: out.numel()].view(out.shape)
    grads = torch.autograd.grad(out, list(wanted.values()), upstream.to(out))
    return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


def check(given: dict[str, Any], but: tuple[str, ...] = (), function: Any = gated_ffn, **options: Any) -> None:
    ours, plain = (with_gradients(f, given, but, **options) for f in (function, eager.gated_ffn))
    wide = {name: x if x is None else x.double() for name, x in given.items()}
    for what, exact in with_gradients(eager.gated_ffn, wide, but, **options).items():
        assert ours[what].dtype == plain[what].dtype
        assert_accurate(ours[what], exact, plain[what], what)


def by_active(*args: Any, **options: Any) -> Tensor:
    *first, gate = args
    return gated_ffn(*first, ActiveNeurons(gate), **options)


def gathered(x: Tensor, w_in: Tensor, b_in: Any, w_out: Tensor, b_out: Any, gate: Tensor, **options: Any) -> Tensor:
    active = ActiveNeurons(gate)
    w_gate, b_gate = active.gather_rows(options.pop("w_gate"), options.pop("b_gate"))
    weights = active.gather(w_in, b_in, w_out)
    return gated_ffn(x, *weights, b_out, active.gate, w_gate=w_gate, b_gate=b_gate, **options)


# not relu of half precision, which of numbers about 0 may take others for positive than plain PyTorch does
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("activation", "dtype"), [(a, d) for a in ACTIVATIONS for d in DTYPES if a != "relu" or d.itemsize > 2]
)
def test_every_dtype_and_activation(
    device: str, activation: str, dtype: torch.dtype, gate: str, nan_filled: None
) -> None:
    for bias in (True, False):
        given = inputs(3, 7, 16, gate=gate, bias=bias, dtype=dtype, device=device)
        check(given, activation=activation)
        if gate != "none":
            check(given, ("neuron_gate",), by_active, activation=activation)


@pytest.mark.parametrize("missing", ["b_in", "b_out", "b_gate"])
def test_each_bias_may_be_missing(device: str, missing: str) -> None:
    check({**inputs(3, 5, 8, device=device), missing: None}, activation="silu")


@pytest.mark.parametrize("shape", [(8,), (0, 8), (1, 8), (2, 130, 8), (3, 2, 5, 8)])
def test_every_shape(device: str, shape: tuple[int, ...], nan_filled: None) -> None:
    for gate in GATES[: 2 if len(shape) == 1 else 3]:
        check(inputs(*shape, gate=gate, device=device), activation="silu")


@pytest.mark.parametrize("gate", GATES)
def test_gradcheck(gate: str) -> None:
    given = inputs(2, 3, 4, neurons=5, out=2, gate=gate)
    assert gate == "none" or (given["neuron_gate"] == 0).any()
    leaves = [x if x is None else x.requires_grad_() for x in given.values()]
    torch.autograd.gradcheck(
        lambda *args: call(gated_ffn, dict(zip(NAMES, args, strict=True)), activation="silu"), leaves
    )


# Neurons that are off -------------------------------------------------------------------------------------------------


def off(given: dict[str, Any]) -> Tensor:
    return (given["neuron_gate"] == 0).view(-1, 37).all(0)


def spoil(given: dict[str, Any], which: Tensor) -> None:
    for name in WEIGHTS:
        given[name][which] = math.nan
    given["w_out"][:, which] = math.nan


@pytest.mark.parametrize("gate", GATES[1:])
@pytest.mark.parametrize("function", [by_active, gathered])
def test_neurons_that_are_off_are_left_out(device: str, function: Any, gate: str) -> None:
    given = inputs(3, 5, 8, gate=gate, device=device)
    which = off(given)
    assert 0 < which.sum() < 37
    expected = with_gradients(eager.gated_ffn, given, ("neuron_gate",), activation="silu")
    spoil(given, which)
    ours = with_gradients(function, given, ("neuron_gate",), activation="silu")
    for what, value in expected.items():
        torch.testing.assert_close(ours[what], value, rtol=1e-10, atol=1e-12)
    for grad in (*(ours[name] for name in WEIGHTS), ours["w_out"].T):
        assert (grad[which] == 0).all() and (grad[~which] != 0).all()


def test_of_many_rows_on_cpu_neurons_that_are_off_are_left_out() -> None:
    given = inputs(4, 400, 8)
    check(given, ("neuron_gate",))
    spoil(given, off(given))
    assert call(gated_ffn, given).isfinite().all()


@pytest.mark.parametrize("gate", GATES[1:])
def test_of_a_closed_gate_the_gradient_is_the_slope(device: str, gate: str) -> None:
    """The output is linear in the gate."""
    given = inputs(3, 5, 8, gate=gate, device=device)
    grad = with_gradients(gated_ffn, given)["neuron_gate"]
    closed = tuple((given["neuron_gate"] == 0).nonzero()[0])
    before = call(eager.gated_ffn, given)
    given["neuron_gate"][closed] = 1
    upstream = torch.linspace(0.5, 2, before.numel(), dtype=torch.float64).view(before.shape).to(before)
    slope = ((call(eager.gated_ffn, given) - before) * upstream).sum()
    torch.testing.assert_close(grad[closed], slope)


# With the rest of PyTorch ---------------------------------------------------------------------------------------------


def test_compiles_whole(device: str) -> None:
    torch.compiler.reset()
    given = inputs(3, 5, 8, dtype=torch.float32, device=device)
    compiled = torch.compile(gated_ffn, fullgraph=True, backend="aot_eager")
    ours, plain = (with_gradients(f, given, activation="silu") for f in (compiled, gated_ffn))
    for what, value in plain.items():
        torch.testing.assert_close(ours[what], value)


def test_autocast(device: str) -> None:
    given = inputs(3, 5, 8, dtype=torch.float32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        ours, plain = (with_gradients(f, given, activation="silu") for f in (gated_ffn, eager.gated_ffn))
    wide = {name: x if x is None else x.double() for name, x in given.items()}
    exact = with_gradients(eager.gated_ffn, wide, activation="silu")
    assert ours["out"].dtype == torch.bfloat16 and ours["w_gate"].dtype == torch.float32
    for what, value in exact.items():
        error, allowed = (torch.linalg.vector_norm(y[what].double() - value) for y in (ours, plain))
        assert error <= 2 * allowed + 2 * torch.finfo(torch.bfloat16).eps * torch.linalg.vector_norm(value)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"w_gate": None}, ValueError, "b_gate is given without w_gate; expected None"),
        ({"w_gate": [0.0]}, TypeError, "w_gate is a list"),
        ({"w_gate": torch.zeros(36, 8)}, ValueError, r"w_gate has shape \(36, 8\); expected \(37, 8\), that of w_in"),
        ({"w_gate": torch.zeros(37, 8).double()}, TypeError, "w_gate has dtype torch.float64; expected torch.float32"),
        ({"w_gate": torch.zeros(37, 8, device="meta")}, ValueError, "w_gate is on meta"),
        ({"b_gate": torch.zeros(8)}, ValueError, r"b_gate has shape \(8,\); expected \(37,\) or None"),
        ({"b_gate": torch.zeros(37).half()}, TypeError, "b_gate has dtype torch.float16"),
        ({"b_gate": torch.zeros(37, device="meta")}, ValueError, "b_gate is on meta"),
        ({"b_gate": torch.zeros(37).long()}, TypeError, "b_gate has dtype torch.int64"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(gated_ffn, {**inputs(3, 5, 8, dtype=torch.float32), **changes})
