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

ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
LAYOUTS = ("contiguous", "transposed", "expanded", "sliced")


def draw(*shape: int, layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers with the strides that the name of the layout says."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)
    if layout == "transposed":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "expanded":
        return x[:1].expand(shape)
    if layout == "sliced":
        return torch.nn.functional.pad(x, (2, 3))[..., 2:-3]
    return x


# The operators --------------------------------------------------------------------------------------------------------


def operands(op: str, layout: str, grad: bool) -> list[tuple[Any, ...]]:
    """Arguments for the operator; of those that can have a gradient all want one, or none."""

    def leaf(*shape: int) -> Tensor:
        return draw(*shape, layout=layout).requires_grad_(grad)

    def plain(*shape: int) -> Tensor:
        return draw(*shape, layout=layout)

    if op == "kd_ce_loss":
        labels = torch.tensor([[0, 1, -100], [2, 3, 4]])
        options = (2.0, 1.0, 0.5, "reverse_kl", True, -100, 0.1, "mean", grad, grad)
        few = (leaf(2, 3, 5), leaf(2, 3, 5), labels, *options)
        return [
            few,
            (*few, True),
            (leaf(6, 70), leaf(6, 70), None, 2.0, 1.0, 0.0, "forward_kl", True, -100, 0.0, "none", grad, grad),
        ]
    if op == "dkd_loss":
        labels = torch.tensor([[0, 1, -100], [2, 3, 4]])
        options = (2.0, 0.7, 3.0, 0.5, "reverse_kl", True, -100, 0.1, "mean", grad, grad)
        few = (leaf(2, 3, 5), leaf(2, 3, 5), labels, *options)
        many = (leaf(6, 70), leaf(6, 70), labels.view(6), 2.0, 1.0, 8.0, 0.0, "forward_kl", True, -100, 0.0, "none")
        return [few, (*few, True), (*many, grad, grad), (*many, grad, grad, True)]
    if op == "scale_rows":
        return [(plain(5, 7), torch.tensor(2.0)), (plain(5, 7), draw(5))]
    if op == "scale_rows_":
        if layout == "expanded":  # cannot be written to
            return []
        return [(plain(5, 7), torch.tensor(2.0)), (plain(5, 7), draw(5))]
    if op in ("gated_attention", "gated_attention_backward"):
        mask = torch.arange(20) < torch.tensor([20, 7])[:, None, None, None]
        found = []
        for heads, groups, gate in ((3, 3, None), (3, 3, leaf(3)), (3, 3, leaf(2, 3)), (4, 2, leaf(4))):
            gate_grad = grad and gate is not None
            options = (mask if grad else None, None, 0.0, False, 0.3, gate_grad)
            args = (leaf(2, heads, 9, 8), leaf(2, groups, 20, 8), leaf(2, groups, 20, 8), gate, *options)
            if op == "gated_attention_backward":
                args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
                output, ungated, logsumexp = torch.ops.fastdistill.gated_attention(*args)
                args = (plain(2, heads, 9, 8), *args[:6], ungated if gate_grad else output, logsumexp, *args[6:])
            found.append(args)
        return found
    if op == "bias_act_gate":
        return [
            (leaf(4, 3, 20), leaf(20), leaf(20), "gelu"),
            (leaf(4, 3, 20), leaf(20), leaf(4, 20), "silu"),
            (leaf(4, 20), None, None, "relu"),
        ]
    if op == "bias_act_gate_backward":
        return [
            (plain(4, 3, 20), plain(4, 3, 20), plain(20), plain(20), "gelu", grad, grad),
            (plain(4, 3, 20), plain(4, 3, 20), plain(20), plain(4, 20), "gelu_tanh", grad, grad),
            (plain(4, 20), plain(4, 20), None, None, "relu", False, False),
        ]
    if op in ("proximity_conv", "proximity_conv_backward"):
        mask = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
        found = []
        for bias, given in ((None, None), (leaf(6), mask)):
            args = (leaf(3, 7, 5), leaf(3, 7), leaf(6, 5, 3), bias, given)
            if op == "proximity_conv_backward":
                args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
                output, positions = torch.ops.fastdistill.proximity_conv(*args)
                args = (output, *args[:3], given, positions, True, grad, grad, bias is not None)
            found.append(args)
        return found
    if op == "uncertainty":
        return [(leaf(4, 3, 5), "entropy", True), (leaf(4, 70), "margin", False)]
    if op == "uncertainty_backward":
        return [(draw(4, 3), plain(4, 3, 5), "entropy", True), (draw(4), plain(4, 70), "least_confidence", False)]
    if op == "select_uncertain":
        return [(plain(4, 3, 5), 5, "entropy"), (plain(9, 70), 2, "margin")]
    assert op == "accumulate_sensitivity_"
    return [
        ([draw(4, 5), draw(3)], [plain(4, 5), plain(3)], [plain(4, 5), plain(3)]),
        ([draw(4, 5)], [plain(4, 5)], None),
    ]


def has_gradient(op: str) -> bool:
    return not op.endswith("_") and op not in ("scale_rows", "select_uncertain")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "grad"), [(op, grad) for op in OPS for grad in {False, has_gradient(op)}])
def test_opcheck(op: str, grad: bool, layout: str) -> None:
    """Autograd and compilation in one layout: test_compiles_whole has them in every one."""
    checks = ALL_CHECKS if layout == "contiguous" else ("test_schema", "test_faketensor")
    for args in operands(op, layout, grad):
        torch.library.opcheck(getattr(torch.ops.fastdistill, op).default, args, test_utils=checks)


# The functions --------------------------------------------------------------------------------------------------------

LABELS = torch.tensor([0, 1, 2, 3, 4, 0])
OTHER = draw(6, 5).flip(0)
W_IN, B_IN, W_OUT = draw(16, 8), draw(16), draw(4, 16)
GATE = torch.tensor([1.0, 0.0] * 8)


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
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "grad"), [(name, grad) for name in FUNCTIONS for grad in {False, name in DIFFERENTIABLE}]
)
def test_compiles_whole(name: str, grad: bool, layout: str, dynamic: bool) -> None:
    """In one layout by Inductor, which asserts sizes and strides (test_opcheck compares them in every layout); nothing
    around the op would take a compiler of C++."""
    torch.compiler.reset()
    function, shapes = FUNCTIONS[name]
    backend = "inductor" if layout == "transposed" and not dynamic else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
    inputs = [draw(*shape, layout=layout) for shape in shapes]
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
    x, q, logits, weight = draw(4, 5), draw(4, 2, 3, 8), draw(4, 5), draw(5, 5)
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
