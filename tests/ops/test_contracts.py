"""What every op promises alike, whatever the layout of its inputs: opcheck, compilation, torch.vmap, refusals."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdistill
from fastdistill.ops import ActiveNeurons
from fastdistill.ops.library import OPS
from fastdistill.ops.native import NATIVE
from tests.ops.operands import OPERANDS, Drawn, draw

ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
LAYOUTS = ("contiguous", "transposed", "expanded", "sliced")


# The operators --------------------------------------------------------------------------------------------------------


def has_gradient(op: str) -> bool:
    return not op.endswith("_") and op not in ("scale_rows", "select_uncertain")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "grad"), [(op, grad) for op in OPS for grad in {False, has_gradient(op)}])
def test_opcheck(op: str, grad: bool, layout: str) -> None:
    """Autograd and compilation in one layout; sizes and strides, which are what compilation goes by, in every one."""
    checks = ALL_CHECKS if layout == "contiguous" else ("test_schema", "test_faketensor")
    for args in OPERANDS[op](Drawn(layout, grad)):
        torch.library.opcheck(getattr(torch.ops.fastdistill, op).default, args, test_utils=checks)


# The functions --------------------------------------------------------------------------------------------------------

LABELS = torch.tensor([0, 1, 2, 3, 4, 0])
W_IN, B_IN, W_OUT = draw(16, 8), draw(16), draw(4, 16)


def attend(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    return fastdistill.gated_attention(query, key, value, gate).transpose(1, 2).flatten(2)


def accumulate(grad: Tensor) -> Tensor:
    total = torch.zeros_like(grad, memory_format=torch.contiguous_format)
    fastdistill.accumulate_sensitivity_([total], [grad])
    return total


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "gated_attention": (attend, [(4, 2, 9, 8), (4, 2, 11, 8), (4, 2, 11, 8), (4, 2)]),
    "gated_attention, gates of heads": (attend, [(4, 2, 9, 8), (4, 2, 11, 8), (4, 2, 11, 8), (2,)]),
    "gated_attention, grouped heads": (attend, [(4, 4, 9, 8), (4, 2, 11, 8), (4, 2, 11, 8), (4,)]),
    "gated_ffn": (
        lambda x, gate: fastdistill.gated_ffn(x, W_IN, B_IN, W_OUT, None, gate),
        [(4, 5, 8), (4, 16)],
    ),
    "kd_ce_loss": (
        lambda student, teacher: fastdistill.kd_ce_loss(student, teacher, LABELS[:4], temperature=2.0),
        [(4, 5), (4, 5)],
    ),
    "proximity_conv": (fastdistill.proximity_conv, [(4, 7, 5), (4, 7), (6, 5, 3), (6,)]),
    "dropout_add_layer_norm": (
        fastdistill.dropout_add_layer_norm,
        [(4, 3, 20), (4, 3, 20), (20,), (20,)],
    ),
    "dkd_loss": (
        lambda student, teacher: fastdistill.dkd_loss(student, teacher, LABELS[:4], temperature=2.0),
        [(4, 5), (4, 5)],
    ),
    "uncertainty": (fastdistill.uncertainty, [(4, 3, 5)]),
    "hidden_entropy": (fastdistill.hidden_entropy, [(4, 3, 5)]),
    "select_uncertain": (lambda logits: fastdistill.select_uncertain(logits, 0.5), [(8, 5)]),
    "accumulate_sensitivity_": (accumulate, [(4, 5)]),
}
DIFFERENTIABLE = [name for name in FUNCTIONS if name not in ("select_uncertain", "accumulate_sensitivity_")]


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], grad: bool) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(grad) for x in inputs]
    output = function(*leaves)
    if not grad:
        return [output]
    upstream = torch.linspace(0.5, 2, output.numel()).view(output.shape)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "dynamic", "backend"), [("contiguous", True, "aot_eager"), ("transposed", False, "inductor")]
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_whole(name: str, layout: str, dynamic: bool, backend: str) -> None:
    """In one layout by Inductor, which asserts sizes and strides (test_opcheck compares them in every layout); nothing
    around the op would take a compiler of C++."""
    torch.compiler.reset()
    function, shapes = FUNCTIONS[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
    inputs = [draw(*shape, layout=layout) for shape in shapes]
    for grad in {False, name in DIFFERENTIABLE}:
        for x, y in zip(with_gradients(compiled, inputs, grad), with_gradients(function, inputs, grad), strict=True):
            torch.testing.assert_close(x, y)


def test_attention_of_contiguous_inputs_compiles() -> None:
    torch.compiler.reset()
    query = torch.randn(4, 2, 9, 8)
    compiled = torch.compile(lambda q: fastdistill.gated_attention(q, q, q) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(query), fastdistill.gated_attention(query, query, query) * 2)


# torch.vmap and torch.func --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("compiled", [False, True])
def test_vmap_is_a_loop(name: str, compiled: bool) -> None:
    torch.compiler.reset()
    function, shapes = FUNCTIONS[name]
    inputs = [draw(3, *shape) for shape in shapes]

    def loop(*args: Tensor) -> Tensor:
        return torch.stack([function(*slices) for slices in zip(*args, strict=True)])

    batched: Any = torch.vmap(function)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        if compiled:
            batched = torch.compile(batched, backend="aot_eager")
        for x, y in zip(with_gradients(batched, inputs, True), with_gradients(loop, inputs, True), strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_vmap_over_one_argument(name: str, which: int) -> None:
    """The others, and their gradients, are of all of the batch."""
    function, shapes = FUNCTIONS[name]
    if which >= len(shapes):
        pytest.skip("no such argument")
    inputs = [draw(*((3,) if i == which else ()), *shape) for i, shape in enumerate(shapes)]

    def loop(*args: Tensor) -> Tensor:
        return torch.stack([function(*(args[:which]), part, *args[which + 1 :]) for part in args[which]])

    batched = torch.vmap(function, tuple(0 if i == which else None for i in range(len(shapes))))
    for x, y in zip(with_gradients(batched, inputs, True), with_gradients(loop, inputs, True), strict=True):
        torch.testing.assert_close(x, y)


def test_a_mask_that_wants_a_gradient_is_refused_under_vmap_too() -> None:
    query, mask = draw(3, 2, 2, 5, 8).requires_grad_(), draw(3, 5, 5).requires_grad_()
    with pytest.raises(ValueError, match=r"attn_mask requires a gradient.*attn_mask.detach\(\)"):
        torch.vmap(lambda q, m: fastdistill.gated_attention(q, q, q, None, m))(query, mask)


@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "jacrev", "vmap of grad", "gate"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_torch_func_derivatives_are_refused(name: str, transform: str) -> None:
    function, shapes = FUNCTIONS[name]
    inputs = [draw(*shape) for shape in shapes]

    def scalar(x: Tensor) -> Tensor:
        return function(*inputs[:-1], x).sum() if transform == "gate" else function(x, *inputs[1:]).sum()

    x = inputs[-1] if transform == "gate" else inputs[0]
    derive: dict[str, Callable[[], Any]] = {
        "grad": lambda: torch.func.grad(scalar)(x),
        "gate": lambda: torch.func.grad(scalar)(x),
        "vjp": lambda: torch.func.vjp(scalar, x)[1](torch.tensor(1.0)),
        "jvp": lambda: torch.func.jvp(scalar, (x,), (x,)),
        "jacrev": lambda: torch.func.jacrev(scalar)(x),
        "vmap of grad": lambda: torch.vmap(torch.func.grad(scalar))(x[None]),
    }
    own = NATIVE.cpu or transform == "jvp"
    said = r"cannot be differentiated by torch.func.*expected torch.autograd.grad" if own else "functorch"
    with pytest.raises(RuntimeError, match=said):
        derive[transform]()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_is_refused(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    inputs = [draw(*shape) for shape in shapes]
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="differentiated|jvp"):
        function(torch.autograd.forward_ad.make_dual(inputs[0], inputs[0]), *inputs[1:])


# Tensors of other kinds -----------------------------------------------------------------------------------------------


def odd_tensors() -> dict[str, Callable[[Tensor], Tensor]]:
    ragged = [torch.zeros(2, 5), torch.zeros(3, 5)]
    return {
        "sparse COO": lambda x: x.to_sparse(),
        "sparse CSR": lambda x: x.flatten(0, -2).to_sparse_csr(),
        "MKL-DNN": lambda x: x.to_mkldnn(),
        "nested": lambda x: torch.nested.nested_tensor(ragged),
        "nested, jagged": lambda x: torch.nested.nested_tensor(ragged, layout=torch.jagged),
        "float8": lambda x: x.to(torch.float8_e4m3fn),
        "complex": lambda x: x.to(torch.complex64),
        "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
        "a list": lambda x: x.tolist(),
        "text": lambda x: "text",
        "NumPy": lambda x: x.numpy(),
    }


def calls() -> dict[str, Callable[[Callable[[Tensor], Any]], Any]]:
    """By function and argument, a call in which that argument is made odd."""
    x, q, logits, weight, norm = draw(4, 5), draw(4, 2, 3, 8), draw(4, 5), draw(5, 5), draw(5)
    states, taps = draw(4, 5, 6), draw(4, 6, 3)
    found: dict[str, Callable[[Callable[[Tensor], Any]], Any]] = {
        "kd_ce_loss: student_logits": lambda odd: fastdistill.kd_ce_loss(odd(logits), logits),
        "kd_ce_loss: teacher_logits": lambda odd: fastdistill.kd_ce_loss(logits, odd(logits)),
        "kd_ce_loss: labels": lambda odd: fastdistill.kd_ce_loss(logits, logits, odd(logits)),
        "dkd_loss: student_logits": lambda odd: fastdistill.dkd_loss(odd(logits), logits, LABELS[:4]),
        "dkd_loss: teacher_logits": lambda odd: fastdistill.dkd_loss(logits, odd(logits), LABELS[:4]),
        "dkd_loss: labels": lambda odd: fastdistill.dkd_loss(logits, logits, odd(logits)),
        "uncertainty: logits": lambda odd: fastdistill.uncertainty(odd(logits)),
        "hidden_entropy: hidden_states": lambda odd: fastdistill.hidden_entropy(odd(draw(2, 4, 5))),
        "select_uncertain: logits": lambda odd: fastdistill.select_uncertain(odd(logits), 0.5),
        "gated_attention: query": lambda odd: fastdistill.gated_attention(odd(q), q, q),
        "gated_attention: key": lambda odd: fastdistill.gated_attention(q, odd(q), q),
        "gated_attention: value": lambda odd: fastdistill.gated_attention(q, q, odd(q)),
        "gated_attention: head_gate": lambda odd: fastdistill.gated_attention(q, q, q, odd(draw(4, 2))),
        "gated_attention: attn_mask": lambda odd: fastdistill.gated_attention(q, q, q, None, odd(draw(3, 3))),
        "gated_ffn: x": lambda odd: fastdistill.gated_ffn(odd(x), weight, None, weight, None),
        "gated_ffn: w_in": lambda odd: fastdistill.gated_ffn(x, odd(weight), None, weight, None),
        "gated_ffn: b_in": lambda odd: fastdistill.gated_ffn(x, weight, odd(weight), weight, None),
        "gated_ffn: w_out": lambda odd: fastdistill.gated_ffn(x, weight, None, odd(weight), None),
        "gated_ffn: b_out": lambda odd: fastdistill.gated_ffn(x, weight, None, weight, odd(weight)),
        "gated_ffn: w_gate": lambda odd: fastdistill.gated_ffn(x, weight, None, weight, None, w_gate=odd(weight)),
        "gated_ffn: b_gate": lambda odd: fastdistill.gated_ffn(
            x, weight, None, weight, None, w_gate=weight, b_gate=odd(weight)
        ),
        "gated_ffn: neuron_gate": lambda odd: fastdistill.gated_ffn(x, weight, None, weight, None, odd(x)),
        "dropout_add_layer_norm: x": lambda odd: fastdistill.dropout_add_layer_norm(odd(x), x, norm),
        "dropout_add_layer_norm: residual": lambda odd: fastdistill.dropout_add_layer_norm(x, odd(x), norm),
        "dropout_add_layer_norm: weight": lambda odd: fastdistill.dropout_add_layer_norm(x, x, odd(x)),
        "dropout_add_layer_norm: bias": lambda odd: fastdistill.dropout_add_layer_norm(x, x, norm, odd(x)),
        "proximity_conv: states": lambda odd: fastdistill.proximity_conv(odd(states), x, taps),
        "proximity_conv: proximity": lambda odd: fastdistill.proximity_conv(states, odd(x), taps),
        "proximity_conv: weight": lambda odd: fastdistill.proximity_conv(states, x, odd(taps)),
        "proximity_conv: bias": lambda odd: fastdistill.proximity_conv(states, x, taps, odd(x)),
        "proximity_conv: attention_mask": lambda odd: fastdistill.proximity_conv(states, x, taps, None, odd(x)),
        "ActiveNeurons: neuron_gate": lambda odd: ActiveNeurons(odd(x)),
        "accumulate_sensitivity_: totals": lambda odd: fastdistill.accumulate_sensitivity_([odd(x)], [x]),
        "accumulate_sensitivity_: grads": lambda odd: fastdistill.accumulate_sensitivity_([x.clone()], [odd(x)]),
        "accumulate_sensitivity_: weights": lambda odd: fastdistill.accumulate_sensitivity_([x.clone()], [x], [odd(x)]),
    }
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", odd_tensors())
@pytest.mark.parametrize("call", calls())
def test_odd_tensors_are_refused_by_name(call: str, kind: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{call.split(': ')[1]}.*expected"):
        calls()[call](odd_tensors()[kind])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_meta_tensors_have_shapes(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    if name == "gated_ffn":
        weights = [w.to("meta") for w in (W_IN, B_IN, W_OUT)]
        function = lambda x, gate: fastdistill.gated_ffn(x, *weights, None, gate)  # noqa: E731
    if name == "kd_ce_loss":
        function = lambda s, t: fastdistill.kd_ce_loss(s, t, LABELS[:4].to("meta"))  # noqa: E731
    if name == "dkd_loss":
        function = lambda s, t: fastdistill.dkd_loss(s, t, LABELS[:4].to("meta"))  # noqa: E731
    inputs = [draw(*shape) for shape in shapes]
    on_meta = function(*(x.to("meta") for x in inputs))
    expected = FUNCTIONS[name][0](*inputs)
    assert on_meta.is_meta and on_meta.shape == expected.shape and on_meta.dtype == expected.dtype
