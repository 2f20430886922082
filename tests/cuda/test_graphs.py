"""Every op captured in a CUDA graph, forward alone and with its gradients by autograd, replayed on other values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import (
    accumulate_sensitivity_,
    gated_attention,
    gated_ffn,
    hidden_entropy,
    kd_ce_loss,
    proximity_conv,
    select_uncertain,
    uncertainty,
)
from fastdistill.ops import ActiveNeurons

pytestmark = pytest.mark.gpu

Function = Callable[..., Any]
Inputs = dict[str, Tensor]


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def logits(rows: int, classes: int) -> Inputs:
    student, teacher = normal(rows, classes), normal(rows, classes)
    return {"student": student, "teacher": teacher, "labels": torch.randint(classes, (rows,), device="cuda")}


def attention(batch: int, heads: int, tokens: int, size: int, *gate: int) -> Inputs:
    q, k, v = (normal(batch, tokens, heads, size).transpose(1, 2) for _ in range(3))
    return {"query": q, "key": k, "value": v, **({"gate": torch.rand(gate, device="cuda")} if gate else {})}


def padded(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, lengths: Tensor) -> Tensor:
    mask = (torch.arange(query.shape[2], device="cuda") < lengths[:, None])[:, None, None]
    return gated_attention(query, key, value, gate, attn_mask=mask)


def ffn(*gate: int) -> Inputs:
    return {
        "x": normal(8, 16, 64), "w_in": normal(256, 64, scale=0.1), "b_in": normal(256),
        "w_out": normal(64, 256, scale=0.06), "b_out": normal(64), "gate": normal(*gate),
    }  # fmt: skip


def convolution() -> Inputs:
    return {
        "states": normal(8, 30, 72), "proximity": torch.rand(8, 30, device="cuda"),
        "weight": normal(48, 72, 3, scale=0.07), "bias": normal(48),
        "attention_mask": torch.arange(30, device="cuda") < lengths(8, 30)[:, None],
    }  # fmt: skip


def kd(student: Tensor, teacher: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return kd_ce_loss(student, teacher, labels, temperature=2.0, **options)


def lengths(batch: int, tokens: int) -> Tensor:
    return torch.randint(1, tokens + 1, (batch,), device="cuda")


# name -> function, its inputs at random, and which of them want a gradient
CASES: dict[str, tuple[Function, Callable[[], Inputs], tuple[str, ...]]] = {
    "kd_ce_loss, 2 classes": (kd, lambda: logits(32, 2), ("student",)),
    "kd_ce_loss, 1000 classes": (kd, lambda: logits(32, 1000), ("student", "teacher")),
    "kd_ce_loss, 30522 classes": (kd, lambda: logits(64, 30522), ("student",)),
    "kd_ce_loss, by row": (
        lambda **inputs: kd(**inputs, reduction="none"), lambda: logits(64, 8192), ("student", "teacher"),
    ),
    "uncertainty": (uncertainty, lambda: {"logits": normal(64, 3)}, ("logits",)),
    "uncertainty, 30522 classes": (uncertainty, lambda: {"logits": normal(64, 30522)}, ("logits",)),
    "margin": (lambda logits: uncertainty(logits, "margin"), lambda: {"logits": normal(64, 100)}, ("logits",)),
    "hidden_entropy": (hidden_entropy, lambda: {"hidden_states": normal(8, 16, 64)}, ("hidden_states",)),
    "select_uncertain": (lambda logits: select_uncertain(logits, 0.3), lambda: {"logits": normal(5000, 3)}, ()),
    "gated_attention": (gated_attention, lambda: attention(4, 6, 100, 64), ("query", "key", "value")),
    "gated_attention, gates": (
        lambda query, key, value, gate: gated_attention(query, key, value, gate),
        lambda: attention(4, 6, 100, 64, 6), ("query", "key", "value", "gate"),
    ),
    "gated_attention, fixed gates, long": (
        lambda query, key, value, gate: gated_attention(query, key, value, gate),
        lambda: attention(2, 6, 500, 128, 6), ("query", "key", "value"),
    ),
    "gated_attention, gates by example, padding": (
        padded, lambda: attention(4, 6, 100, 32, 4, 6) | {"lengths": lengths(4, 100)},
        ("query", "key", "value", "gate"),
    ),
    "gated_ffn": (gated_ffn, lambda: ffn(256), ("x", "w_in", "b_in", "w_out", "b_out", "gate")),
    "gated_ffn, gates by example": (gated_ffn, lambda: ffn(8, 256), ("x", "gate")),
    "proximity_conv": (proximity_conv, convolution, ("states", "proximity", "weight", "bias")),
}  # fmt: skip


def inputs_of(function: Function, made: Inputs) -> tuple[tuple[Any, ...], Inputs]:
    """gated_ffn takes its inputs by position."""
    return (tuple(made.values()), {}) if function in (gated_ffn, hidden_entropy, uncertainty) else ((), made)


def forward(function: Function, inputs: Inputs) -> list[Tensor]:
    positional, named = inputs_of(function, inputs)
    with torch.no_grad():
        return [function(*positional, **named)]


def with_gradients(function: Function, inputs: Inputs, wanted: tuple[str, ...]) -> list[Tensor]:
    positional, named = inputs_of(function, inputs)
    output = function(*positional, **named)
    weights = torch.arange(output.numel(), device="cuda", dtype=output.dtype).view_as(output).remainder(7)
    return [output.detach(), *torch.autograd.grad(output, [inputs[name] for name in wanted], weights)]


def check(run: Callable[[], list[Tensor]], fill: Callable[[], None]) -> None:
    """What a graph computes from other values than those that it was captured with is what the op computes."""
    stream = torch.cuda.Stream()  # as CUDA graphs are to be warmed up
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        fill()
        graph.replay()
        replayed = [x.clone() for x in captured]
        for value, expected in zip(replayed, run(), strict=True):
            torch.testing.assert_close(value, expected)


def filler(made: Inputs, make: Callable[[], Inputs]) -> Callable[[], None]:
    def fill() -> None:
        with torch.no_grad():
            for name, other in make().items():
                made[name].copy_(other)

    return fill


@pytest.mark.parametrize("case", CASES)
def test_forward(case: str) -> None:
    function, make, _ = CASES[case]
    torch.manual_seed(0)
    made = make()
    check(lambda: forward(function, made), filler(made, make))


@pytest.mark.parametrize("case", [name for name, (_, _, wanted) in CASES.items() if wanted])
def test_with_gradients(case: str) -> None:
    function, make, wanted = CASES[case]
    torch.manual_seed(0)
    made = {name: x.requires_grad_(name in wanted) for name, x in make().items()}
    check(lambda: with_gradients(function, made, wanted), filler(made, make))


@pytest.mark.parametrize("wanted", [(), ("x",), ("x", "w_in", "b_in", "w_out", "b_out")], ids=len)
def test_gated_ffn_with_neurons_off(wanted: tuple[str, ...]) -> None:
    """Which neurons are on is found before the capture; all else may change."""
    torch.manual_seed(0)
    made = {name: x.requires_grad_(name in wanted) for name, x in ffn(256).items() if name != "gate"}
    gate = normal(256)
    gate[::2] = 0
    active = ActiveNeurons(gate)

    def run() -> list[Tensor]:
        output = gated_ffn(*made.values(), active)
        if not wanted:
            return [output]
        grad_output = torch.arange(output.numel(), device="cuda", dtype=output.dtype).view_as(output).remainder(7)
        return [output.detach(), *torch.autograd.grad(output, [made[name] for name in wanted], grad_output)]

    check(run, filler(made, lambda: {name: x for name, x in ffn(256).items() if name != "gate"}))


def test_accumulate_sensitivity() -> None:
    shapes = [(1000,), (5,), (70, 1001)]
    grads, weights = ([normal(*shape) for shape in shapes] for _ in range(2))
    totals, expected = ([torch.zeros(shape, device="cuda") for shape in shapes] for _ in range(2))
    accumulate_sensitivity_(totals, grads, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        accumulate_sensitivity_(totals, grads, weights)
    for total in totals:
        total.zero_()
    for _ in range(3):
        for tensor in (*grads, *weights):
            tensor.normal_()
        graph.replay()
        accumulate_sensitivity_(expected, grads, weights)
        for total, wanted in zip(totals, expected, strict=True):
            assert torch.equal(total, wanted)
