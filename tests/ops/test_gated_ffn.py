from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdistill import gated_ffn
from fastdistill.ops import ActiveNeurons, reference
from fastdistill.ops.bias_act_gate import bias_act_gate
from tests import eager
from tests.ops.ffn import ACTIVATIONS, DTYPES, GATES, NAMES, by_active, check, make, with_gradients

# Values and gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_dtype_and_activation(
    device: str, activation: str, dtype: torch.dtype, gate: str, nan_filled: None
) -> None:
    for bias in (True, False):
        inputs = make(3, 7, 16, gate=gate, bias=bias, dtype=dtype, device=device)
        check(inputs, activation=activation)
        if gate != "none":
            check(inputs, NAMES[:5], by_active, activation=activation)


@pytest.mark.parametrize("neurons", [1, 7, 16, 33, 1025, 2100])
@pytest.mark.parametrize("shape", [(1, 8), (5, 8), (2, 70, 8), (130, 1, 8), (3, 2, 65, 8)])
def test_every_size(device: str, shape: tuple[int, ...], neurons: int, nan_filled: None) -> None:
    """One row to several runs of rows, less than a vector of neurons to several blocks."""
    for gate in GATES:
        inputs = make(*shape, neurons=neurons, out=3, gate=gate, device=device)
        check(inputs)
        _, _, bias, _, _, gates = (None if x is None else x.float() for x in inputs)
        h, upstream = torch.randn(2, *shape[:-1], neurons, dtype=torch.bfloat16, device=device)
        for op, args in (("bias_act_gate", ()), ("bias_act_gate_backward", (True, gate != "none"))):
            args = (*(() if op == "bias_act_gate" else (upstream,)), h, bias, gates, "gelu", *args)
            ours, expected = getattr(torch.ops.fastdistill, op)(*args), getattr(reference, op)(*args)
            torch.testing.assert_close(ours, expected, rtol=2**-7, atol=1e-4)


def test_sums_of_many_rows(device: str) -> None:
    check(make(3000, 4, neurons=40, dtype=torch.float32, device=device))
    check(make(2, 3000, 4, neurons=40, gate="per example", dtype=torch.float32, device=device))


def test_one_vector(device: str) -> None:
    inputs = make(16, device=device)
    assert gated_ffn(*inputs).shape == (6,)
    check(inputs)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_gradcheck(activation: str, gate: str) -> None:
    inputs = make(2, 3, 4, neurons=5, out=2, gate=gate)
    assert gate == "none" or (inputs[5] == 0).any()
    leaves = [x if x is None else x.requires_grad_() for x in inputs]
    torch.autograd.gradcheck(lambda *args: gated_ffn(*args, activation=activation), leaves)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_formulas_of_the_reference(activation: str) -> None:
    """Values and slopes against PyTorch's own, and the compiled kernel against both, to the last digits."""
    z = torch.cat(
        [torch.linspace(-12, 12, 4001, dtype=torch.float64), torch.tensor([-0.0, 1e4, -1e4])]
    ).requires_grad_()
    value = eager.ACTIVATIONS[activation](z)
    slope = torch.autograd.grad(value.sum(), z)[0]
    z = z.detach()
    ones = torch.ones_like(z)
    ops = torch.ops.fastdistill
    for forward, backward in (
        (reference.bias_act_gate, reference.bias_act_gate_backward),
        (ops.bias_act_gate, ops.bias_act_gate_backward),
    ):
        torch.testing.assert_close(forward(z, None, None, activation), value, rtol=1e-13, atol=2e-15)
        grad = backward(ones, z, None, None, activation, False, False)[0]
        torch.testing.assert_close(grad, slope, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_huge_and_not_finite_pre_activations(device: str, activation: str, dtype: torch.dtype) -> None:
    huge = [1e4, -1e4, 6e4, -6e4, math.inf, -math.inf, math.nan, 0.0, 1.0]
    h = torch.tensor(huge, device=device).to(dtype).requires_grad_()
    exact = h.detach().double().requires_grad_()
    ours, expected = bias_act_gate(h, None, None, activation), eager.ACTIVATIONS[activation](exact)
    torch.testing.assert_close(ours.double(), expected.to(dtype).double(), equal_nan=True, rtol=1e-2, atol=1e-6)
    slopes = [torch.autograd.grad(value.sum(), of)[0].double() for value, of in ((ours, h), (expected, exact))]
    torch.testing.assert_close(*slopes, equal_nan=True, rtol=1e-2, atol=1e-6)


# Whose gradients are wanted -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(), ("x",), ("neuron_gate",), ("x", "neuron_gate"), ("b_in",), ("w_out", "b_out")])
@pytest.mark.parametrize("gate", GATES[1:])
def test_gradients_reach_only_who_asks(wanted: tuple[str, ...], gate: str) -> None:
    check(make(4, 5, 8, gate=gate), wanted)


def test_backward_computes_what_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.fastdistill.bias_act_gate_backward.default:
                seen.append(args[-2:])
            return func(*args, **(kwargs or {}))

    with Watch():
        for wanted in (("x",), ("neuron_gate",), ("x", "b_in"), NAMES):
            with_gradients(gated_ffn, make(4, 5, 8), wanted)
    assert seen == [(False, False), (False, True), (True, False), (True, True)]
    with Watch():
        with_gradients(gated_ffn, make(4, 5, 8, bias=False), ("x", "neuron_gate"))
    assert seen[-1] == (False, True)


def test_per_example_gradients_of_frozen_weights(device: str) -> None:
    """One backward gives what a loop over examples does; also where gates are 0."""
    inputs = make(4, 5, 8, gate="per example", dtype=torch.float32, device=device)
    together = with_gradients(gated_ffn, inputs, ("neuron_gate",))["neuron_gate"]
    upstream = torch.linspace(0.5, 2, 4 * 5 * 6, dtype=torch.float64).view(4, 5, 6).to(together)
    assert (inputs[5] == 0).any() and (together[inputs[5] == 0] != 0).all()
    for i in range(4):
        gate = inputs[5][i].clone().requires_grad_()
        out = eager.gated_ffn(inputs[0][i], *inputs[1:5], gate)
        torch.testing.assert_close(together[i], torch.autograd.grad(out, gate, upstream[i])[0])


def test_is_the_same_again(device: str) -> None:
    inputs = make(3, 300, 8, neurons=1500, gate="per example", dtype=torch.float32, device=device)
    first, again = (with_gradients(gated_ffn, inputs) for _ in range(2))
    for what in first:
        assert torch.equal(first[what], again[what]), what


def test_second_derivative_is_an_error() -> None:
    x, *rest = make(3, 4)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(gated_ffn(x.requires_grad_(), *rest).sum() ** 2, x, create_graph=True)


# Under PyTorch's other machinery --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gate", "shape"),
    [("none", (5, 9)), ("shared", (3, 4, 20)), ("shared", (7,)), ("per example", (3, 4, 20)), ("per example", (0, 4)),
     ("per example", (2, 0, 3))],
)  # fmt: skip
def test_opcheck(device: str, gate: str, shape: tuple[int, ...]) -> None:
    h, bias = torch.randn(shape, device=device), torch.randn(shape[-1], device=device)
    gates = {"none": None, "shared": bias.flip(0), "per example": torch.randn(shape[0], shape[-1], device=device)}[gate]
    op, backward = torch.ops.fastdistill.bias_act_gate.default, torch.ops.fastdistill.bias_act_gate_backward.default
    torch.library.opcheck(
        backward, (torch.randn(shape, device=device), h, bias, gates, "silu", True, gates is not None)
    )
    leaves = [None if x is None else x.requires_grad_() for x in (h, bias, gates)]
    torch.library.opcheck(op, (*leaves, "gelu"))
    torch.library.opcheck(op, (h, None, leaves[2], "relu"))


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [NAMES[:5], NAMES])
def test_compiles_whole(device: str, wanted: tuple[str, ...]) -> None:
    torch.compiler.reset()

    def block(*args: Tensor | None) -> Tensor:
        return gated_ffn(*args, activation="gelu_tanh") + args[0]

    backend = "aot_eager" if wanted == NAMES else "inductor"
    whole = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)
    for length in (4, 7):
        inputs = make(3, length, 8, out=8, gate="per example", dtype=torch.float32, device=device)
        plain = with_gradients(block, inputs, wanted)
        for what, value in with_gradients(whole, inputs, wanted).items():
            torch.testing.assert_close(value, plain[what], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_autocast(device: str, gate: str) -> None:
    inputs = make(3, 5, 16, gate=gate, dtype=torch.float32, device=device)

    def under(function: Any) -> Any:
        def call(*args: Any) -> Tensor:
            with torch.autocast(device, dtype=torch.bfloat16):
                return function(*args)

        return call

    for wanted in (NAMES, NAMES[:5], ()):
        ours, plain = (with_gradients(under(f), inputs, wanted) for f in (gated_ffn, eager.gated_ffn))
        exact = with_gradients(eager.gated_ffn, [None if x is None else x.double() for x in inputs], wanted)
        assert ours["out"].dtype == torch.bfloat16
        for what, answer in exact.items():
            assert ours[what].dtype == plain[what].dtype
            difference, allowed = ((x[what].double() - answer).norm() for x in (ours, plain))
            assert difference <= 2 * allowed + 2 * torch.finfo(torch.bfloat16).eps * answer.norm(), what
    inputs[0] = inputs[0].bfloat16()
    with torch.autocast(device, dtype=torch.bfloat16):
        gated_ffn(*inputs)


def test_gates_of_another_dtype(device: str) -> None:
    inputs = make(3, 5, 16, gate="per example", dtype=torch.bfloat16, device=device)
    inputs[5] = inputs[5].float()
    ours = with_gradients(gated_ffn, inputs)
    assert ours["out"].dtype == torch.bfloat16 and ours["neuron_gate"].dtype == torch.float32
    exact = with_gradients(eager.gated_ffn, [x.double() for x in inputs])
    plain = with_gradients(eager.gated_ffn, [x.bfloat16() for x in inputs])
    error, allowed = ((x["neuron_gate"].double() - exact["neuron_gate"]).norm() for x in (ours, plain))
    assert error <= 2 * allowed


@pytest.mark.parametrize("gate", GATES[1:])
def test_any_layout(device: str, gate: str) -> None:
    inputs = make(4, 6, 8, gate=gate, device=device)
    inputs[0] = inputs[0].transpose(0, 1).contiguous().transpose(0, 1)
    inputs[1], inputs[3] = inputs[1].T.contiguous().T, inputs[3].repeat(1, 2)[:, :37]
    inputs[2] = inputs[2].repeat_interleave(2)[::2]
    inputs[5] = inputs[5].mT.contiguous().mT if gate == "per example" else inputs[5].repeat_interleave(2)[::2]
    check(inputs)
    check(inputs, NAMES[:5])
    h = torch.randn(4, 6, 37, dtype=torch.float64, device=device).transpose(0, 1)
    torch.testing.assert_close(
        bias_act_gate(h, inputs[2], None, "silu"), bias_act_gate(h.contiguous(), inputs[2], None, "silu")
    )
    upstream = torch.ones((), dtype=torch.float64, device=device).expand(h.shape)
    backward = torch.ops.fastdistill.bias_act_gate_backward
    ours = backward(upstream, h, inputs[2], None, "silu", True, False)
    expected = reference.bias_act_gate_backward(upstream, h, inputs[2], None, "silu", True, False)
    for value, answer in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, answer)


@pytest.mark.parametrize("shape", [(0, 8), (0, 5, 8), (3, 0, 8), (3, 5, 0)])
@pytest.mark.parametrize("gate", GATES)
def test_nothing_to_compute(device: str, gate: str, shape: tuple[int, ...], nan_filled: None) -> None:
    inputs = make(*shape, gate=gate, device=device)
    check(inputs)
    check(inputs, NAMES[:5])
    check(make(*shape, neurons=0, gate=gate, device=device))


@pytest.mark.slow
def test_active_neurons_compile_whole(device: str) -> None:
    torch.compiler.reset()
    inputs = make(3, 5, 8, dtype=torch.float32, device=device)
    active = ActiveNeurons(inputs[5])

    def block(*args: Any) -> Tensor:
        return gated_ffn(*args[:5], active) * 2

    whole = torch.compile(block, fullgraph=True, dynamic=True)
    for length in (5, 9):
        inputs[0] = make(3, length, 8, dtype=torch.float32, device=device)[0]
        expected = with_gradients(block, inputs, NAMES[:5])
        for what, value in with_gradients(whole, inputs, NAMES[:5]).items():
            torch.testing.assert_close(value, expected[what], rtol=1e-4, atol=1e-5)


def test_fake_and_meta_tensors() -> None:
    with FakeTensorMode():
        assert gated_ffn(*make(3, 5, 8, device="meta")).shape == (3, 5, 6)
    with FakeTensorMode() as mode:
        fake = [
            mode.from_tensor(x) for x in (torch.zeros(3, 5, 8), torch.zeros(7, 8), torch.zeros(6, 7), torch.zeros(7))
        ]
        assert gated_ffn(fake[0], fake[1], None, fake[2], None, fake[3]).shape == (3, 5, 6)
    assert gated_ffn(*make(3, 5, 8, device="meta")).shape == (3, 5, 6)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"activation": "tanh"}, ValueError, "activation is 'tanh'; expected one of 'gelu', 'gelu_tanh'"),
        ({"x": [1.0]}, TypeError, "x is a list; expected a torch.Tensor"),
        ({"x": torch.zeros(3, 8).long()}, TypeError, "x has dtype torch.int64"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x has shape \(\)"),
        ({"x": torch.zeros(3, 7)}, ValueError, r"w_in has shape \(37, 8\); expected \[outputs, 7\].*dimension of x"),
        ({"w_in": None}, TypeError, "w_in is a NoneType"),
        ({"w_in": torch.zeros(8)}, ValueError, r"w_in has shape \(8,\)"),
        ({"w_in": torch.zeros(37, 8).double()}, TypeError, "w_in has dtype torch.float64; expected torch.float32"),
        ({"w_in": torch.zeros(37, 8, device="meta")}, ValueError, "w_in is on meta but x is on cpu"),
        ({"b_in": torch.zeros(36)}, ValueError, r"b_in has shape \(36,\); expected \(37,\) or None"),
        ({"b_in": 0.0}, TypeError, "b_in is a float"),
        ({"b_in": torch.zeros(37).half()}, TypeError, "b_in has dtype torch.float16; expected torch.float32"),
        ({"w_out": torch.zeros(37, 6)}, ValueError, r"w_out has shape \(37, 6\); expected .*37\].*rows of w_in"),
        ({"w_out": torch.zeros(6, 37).bfloat16()}, TypeError, "w_out has dtype torch.bfloat16"),
        ({"b_out": torch.zeros(37)}, ValueError, r"b_out has shape \(37,\); expected \(6,\)"),
        ({"b_out": torch.zeros(6, dtype=torch.int32)}, TypeError, "b_out has dtype torch.int32"),
        ({"neuron_gate": torch.ones(37).bool()}, TypeError, "neuron_gate has dtype torch.bool"),
        ({"neuron_gate": torch.ones(36)}, ValueError, r"neuron_gate has shape \(36,\); expected \(37,\) or \(3, 37\)"),
        ({"neuron_gate": torch.ones(5, 37)}, ValueError, r"neuron_gate has shape \(5, 37\)"),
        ({"neuron_gate": torch.ones(1, 37)}, ValueError, r"neuron_gate has shape \(1, 37\)"),
        ({"neuron_gate": torch.ones(1, 37), "x": torch.zeros(8)}, ValueError, r"\(37,\), x having one dimension"),
        ({"neuron_gate": torch.ones(37, device="meta")}, ValueError, "neuron_gate is on meta but x is on cpu"),
        ({"neuron_gate": ActiveNeurons(torch.ones(36))}, ValueError, r"neuron_gate has shape \(36,\)"),
        ({"neuron_gate": ActiveNeurons(torch.ones(2, 37))}, ValueError, r"neuron_gate has shape \(2, 37\)"),
        ({"neuron_gate": [1.0]}, TypeError, "neuron_gate is a list"),
    ],
)  # fmt: skip
def test_bad_arguments(changes: dict[str, Any], error: type, message: str) -> None:
    arguments = dict(zip(NAMES, make(3, 5, 8, dtype=torch.float32), strict=True))
    with pytest.raises(error, match=message):
        gated_ffn(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("gate", "error", "message"),
    [
        ([1.0], TypeError, "neuron_gate is a list"),
        (torch.ones(3).bool(), TypeError, "neuron_gate has dtype torch.bool"),
        (torch.ones(()), ValueError, r"neuron_gate has shape \(\); expected \[I\] or \[B, I\]"),
        (torch.ones(2, 3, 4), ValueError, r"neuron_gate has shape \(2, 3, 4\)"),
        (torch.ones(3, requires_grad=True), ValueError, r"neuron_gate requires a gradient.*neuron_gate.detach\(\)"),
    ],
)
def test_bad_gates_of_active_neurons(gate: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        ActiveNeurons(gate)


def test_float64_is_left_alone_by_autocast() -> None:
    inputs = make(3, 5, 8, dtype=torch.float32)
    inputs[1] = inputs[1].double()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="w_in has dtype torch.float64"):
        gated_ffn(*inputs)


def test_bad_activation_of_the_op() -> None:
    h = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="activation is 'tanh'; expected"):
        bias_act_gate(h, None, None, "tanh")
