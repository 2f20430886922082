from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastdistill
from fastdistill.ops import accumulate_sensitivity_, reference
from fastdistill.ops.native import NATIVE
from tests.accuracy import assert_accurate

module = sys.modules["fastdistill.ops.accumulate_sensitivity"]  # the name in the package is the function
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OP = torch.ops.fastdistill.accumulate_sensitivity_.default


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.dim() > 1 else x


def gapped(x: Tensor) -> Tensor:
    """The same values in a tensor whose elements do not lie side by side."""
    return torch.stack([x, x.new_full(x.shape, -77)], -1)[..., 0]


def shifted(x: Tensor) -> Tensor:
    """The same values one element off the address where an allocation starts."""
    return torch.cat([x.new_full((1,), -77), x.flatten()])[1:].view(x.shape)


LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (Tensor.clone, transposed, gapped, shifted)


def plain(total: Tensor, grad: Tensor, weight: Tensor | None) -> Tensor:
    """What a user would write."""
    return total + (grad if weight is None else grad * weight).abs()


def tensors(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], seed: int = 0, device: str = "cpu"
) -> list[Tensor]:
    """A total, a gradient and a weight."""
    generator = torch.Generator().manual_seed(seed)
    total, *others = (torch.randn(shape, generator=generator, dtype=torch.float64).to(d).to(device) for d in dtypes)
    return [total.abs(), *others]


def check(
    shapes: list[tuple[int, ...]],
    dtypes: list[tuple[torch.dtype, ...]],
    layouts: list[Any],
    weighted: bool,
    seed: int,
    implementation: Callable[..., None],
    device: str,
) -> None:
    """Against the formula in the documented precision to the last bit, and against float64 by the rule for error."""
    columns: list[list[Tensor]] = [[], [], []]
    expected, exact, eager = [], [], []
    for i, shape in enumerate(shapes):
        group = [layout(x) for layout, x in zip(layouts[i], tensors(shape, dtypes[i], seed + i, device), strict=True)]
        for column, x in zip(columns, group, strict=True):
            column.append(x)
        used = group if weighted else [*group[:2], None]
        wide = torch.float64 if any(x is not None and x.dtype == torch.float64 for x in used) else torch.float32
        expected.append(plain(*(x if x is None else x.to(wide) for x in used)).to(group[0].dtype))
        exact.append(plain(*(x if x is None else x.double() for x in used)))
        eager.append(plain(*used))
    totals, grads, weights = columns
    implementation(totals, grads, weights if weighted else None)
    for total, bits, oracle, ordinary in zip(totals, expected, exact, eager, strict=True):
        assert torch.equal(total, bits)
        assert_accurate(total, oracle, ordinary if ordinary.dtype == total.dtype else bits)


IMPLEMENTATIONS = [
    pytest.param(accumulate_sensitivity_, id="op"),
    pytest.param(reference.accumulate_sensitivity_, id="reference"),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(deadline=None, max_examples=60)
@given(data=st.data(), weighted=st.booleans(), seed=st.integers(0, 1000))
def test_any_shapes_dtypes_and_layouts(
    data: st.DataObject, weighted: bool, seed: int, implementation: Callable[..., None]
) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(0, 21), max_size=3).map(tuple), max_size=6))
    dtype = st.tuples(st.sampled_from(FLOATING[:2]), st.sampled_from(FLOATING), st.sampled_from(FLOATING))
    layout = st.tuples(*[st.sampled_from(LAYOUTS)] * 3)
    dtypes = data.draw(st.lists(dtype, min_size=len(shapes), max_size=len(shapes)))
    layouts = data.draw(st.lists(layout, min_size=len(shapes), max_size=len(shapes)))
    check(shapes, dtypes, layouts, weighted, seed, implementation, "cpu")


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("grad", FLOATING, ids=str)
@pytest.mark.parametrize("total", FLOATING[:2], ids=str)
def test_sizes_around_vectors_and_blocks(total: torch.dtype, grad: torch.dtype, weighted: bool, device: str) -> None:
    sizes = [1, 2, 15, 16, 17, 31, 33, 511, 512, 513, 4095, 4096, 4097, 70_001]
    shapes = [(size,) for size in sizes]
    for weight in FLOATING if weighted else FLOATING[:1]:
        for layout in (Tensor.clone, shifted):
            check(
                shapes, [(total, grad, weight)] * len(shapes), [(layout,) * 3] * len(shapes), weighted, 1,
                accumulate_sensitivity_, device,
            )  # fmt: skip


def test_every_element_once(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 3000, (700,), generator=generator).tolist()
    totals = [torch.zeros(size, device=device) for size in sizes]
    ones = [torch.ones(size, device=device) for size in sizes]
    for calls in (1, 2):
        accumulate_sensitivity_(totals, ones, ones)
        assert all(bool((total == calls).all()) for total in totals)


def test_is_the_gradient_of_a_gate_on_every_weight(device: str) -> None:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).double().to(device)
    parameters = dict(layers.named_parameters())
    totals = [torch.zeros_like(p) for p in parameters.values()]
    expected = [torch.zeros_like(p) for p in parameters.values()]
    for _ in range(3):
        x = torch.randn(4, 5, dtype=torch.float64, device=device)
        layers.zero_grad()
        layers(x).square().sum().backward()
        accumulate_sensitivity_(totals, [p.grad for p in parameters.values()], list(parameters.values()))
        gates = {name: torch.ones_like(p, requires_grad=True) for name, p in parameters.items()}
        gated = {name: p.detach() * gates[name] for name, p in parameters.items()}
        loss = torch.func.functional_call(layers, gated, x).square().sum()
        for total, gate_grad in zip(expected, torch.autograd.grad(loss, list(gates.values())), strict=True):
            total += gate_grad.abs()
    for total, wanted in zip(totals, expected, strict=True):
        torch.testing.assert_close(total, wanted, rtol=1e-12, atol=1e-14)


def test_gradients_that_are_none_add_nothing(device: str) -> None:
    totals = [torch.zeros(3, device=device) for _ in range(3)]
    weights = [torch.full((3,), -2.0, device=device) for _ in range(3)]
    accumulate_sensitivity_(totals, [None, torch.ones(3, device=device), None], weights)
    assert [total.tolist() for total in totals] == [[0] * 3, [2] * 3, [0] * 3]
    accumulate_sensitivity_(totals, [None] * 3, weights)
    accumulate_sensitivity_(totals, [None] * 3)
    assert [total.tolist() for total in totals] == [[0] * 3, [2] * 3, [0] * 3]


def test_nothing_to_do(device: str) -> None:
    accumulate_sensitivity_([], [])
    accumulate_sensitivity_([], [], [])
    empty = torch.zeros(0, 3, device=device)
    accumulate_sensitivity_([empty], [empty.clone()], [empty.clone()])
    assert empty.shape == (0, 3)


def test_nan_and_infinity_stay_where_they_are(device: str) -> None:
    totals = [torch.zeros(600, device=device), torch.zeros(600, device=device)]
    grads = [torch.ones(600, device=device), torch.ones(600, device=device)]
    weights = [torch.ones(600, device=device), torch.ones(600, device=device)]
    grads[0][5] = weights[0][599] = totals[1][3] = torch.nan
    grads[1][20], weights[1][20] = -torch.inf, 0.0
    weights[1][30] = -torch.inf
    accumulate_sensitivity_(totals, grads, weights)
    assert totals[0].isnan().nonzero().flatten().tolist() == [5, 599]
    assert totals[1].isnan().nonzero().flatten().tolist() == [3, 20]
    assert totals[1][30] == torch.inf
    assert int((torch.cat(totals) == 1).sum()) == 1200 - 5


def test_only_the_total_is_written(device: str) -> None:
    memory = torch.zeros(6, 10, device=device)
    grad, weight = torch.randn(4, 5, device=device), torch.randn(4, 5, device=device)
    kept = grad.clone(), weight.clone()
    accumulate_sensitivity_([memory[1:5, ::2]], [grad], [weight])
    expected = torch.zeros(6, 10, device=device)
    expected[1:5, ::2] = (grad * weight).abs()
    assert torch.equal(memory, expected)
    assert torch.equal(grad, kept[0]) and torch.equal(weight, kept[1])


@pytest.mark.skipif(NATIVE.cpu is None, reason=NATIVE.why_no_cpu)
@pytest.mark.parametrize("layout", [
    Tensor.clone, transposed, lambda x: x[:, :, None].contiguous(memory_format=torch.channels_last)
], ids=["contiguous", "transposed", "channels_last"])  # fmt: skip
def test_equal_dense_layouts_are_not_copied(layout: Callable[[Tensor], Tensor]) -> None:
    total, grad, weight = (layout(x) for x in tensors((6, 5, 4), FLOATING[:1] * 3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        accumulate_sensitivity_([total], [grad], [weight])
    assert {event.name for event in profile.events()} == {"fastdistill::accumulate_sensitivity_"}


@pytest.mark.skipif(NATIVE.cpu is None, reason=NATIVE.why_no_cpu)
def test_ordinary_calls_are_checked_in_one_pass(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(module, "_op", None)  # what Python calls after its own checks
    monkeypatch.setattr(module, "_check_column", None)
    total, grad = torch.zeros(3, 4, device=device), torch.full((3, 4), -2.0, device=device)
    parameter = torch.nn.Parameter(torch.ones(3, 4, device=device, dtype=torch.bfloat16))
    accumulate_sensitivity_([total, total.clone()], (grad, None), [parameter, grad])
    accumulate_sensitivity_([total.mT], [grad.mT])
    assert torch.equal(total, torch.full_like(total, 4))


def test_dispatch_modes_see_the_op(device: str) -> None:
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    total, grad = torch.zeros(3, device=device), torch.ones(3, device=device)
    with Watch():
        accumulate_sensitivity_([total], [grad])
    assert seen == [OP] and total.tolist() == [1, 1, 1]


def test_nothing_is_recorded_for_autograd(device: str) -> None:
    total = torch.zeros(3, device=device)
    weight = torch.nn.Parameter(torch.ones(3, device=device))
    grad = torch.ones(3, device=device, requires_grad=True)
    accumulate_sensitivity_([total], [grad], [weight])
    assert not total.requires_grad and total.tolist() == [1, 1, 1]
    assert weight.grad is None and torch.is_grad_enabled()


def test_autograd_notices_the_change(device: str) -> None:
    total = torch.ones(3, device=device)
    loss = (total * torch.ones(3, device=device, requires_grad=True)).sum()
    accumulate_sensitivity_([total], [torch.ones(3, device=device)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode(device: str) -> None:
    with torch.inference_mode():
        total = torch.zeros(3, device=device)
        accumulate_sensitivity_([total], [torch.ones(3, device=device)], [torch.full((3,), 2.0, device=device)])
        assert total.tolist() == [2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("weights", [True, False])
def test_opcheck(weights: bool, device: str) -> None:
    groups = [tensors(shape, FLOATING[:1] * 3, device=device) for shape in ((3, 4), (5,), (0,))]
    totals, grads, factors = (list(column) for column in zip(*groups, strict=True))
    torch.library.opcheck(OP, (totals, grads, factors if weights else None))
    torch.library.opcheck(OP, ([], [], None))


@pytest.mark.slow
def test_compiles_whole(device: str) -> None:
    @torch.compile(fullgraph=True, dynamic=True)
    def step(totals: list[Tensor], x: Tensor, weights: list[Tensor]) -> Tensor:
        grads: list[Tensor | None] = [x * w for w in weights]
        accumulate_sensitivity_(totals, [*grads[:-1], None], weights)
        return totals[0] * 2

    for size in (4, 7):
        weights = [torch.nn.Parameter(torch.randn(3, size, device=device)) for _ in range(3)]
        totals = [torch.zeros(3, size, device=device) for _ in range(3)]
        x = torch.randn(3, size, device=device)
        doubled = step(totals, x, weights)
        for total, weight in zip(totals[:-1], weights, strict=False):
            torch.testing.assert_close(total, (x * weight * weight).abs().detach())
        assert not totals[-1].any()
        assert torch.equal(doubled, totals[0] * 2)


def test_public_names() -> None:
    assert fastdistill.accumulate_sensitivity_ is accumulate_sensitivity_
    assert "accumulate_sensitivity_" in fastdistill.__all__


a, b, c = torch.zeros(4, 3), torch.ones(4, 3), torch.ones(4, 3)
ERRORS: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
    ("totals is a tensor", (a, [b]), TypeError, r"totals is a Tensor; expected a list or tuple of tensors"),
    ("grads is a tensor", ([a], b), TypeError, r"grads is a Tensor; expected a list or tuple"),
    ("weights is a generator", ([a], [b], iter([c])), TypeError, r"weights is a list_iterator; expected a list"),
    ("fewer grads", ([a], []), ValueError, r"grads has length 0, totals 1; expected the same length"),
    ("more weights", ([a], [b], [c, c]), ValueError, r"weights has length 2, totals 1; expected the same length"),
    ("total is None", ([None], [b]), TypeError, r"totals\[0\] is a NoneType; expected a torch.Tensor"),
    ("weight is None", ([a], [b], [None]), TypeError, r"weights\[0\] is a NoneType; expected a torch.Tensor"),
    ("grad is a number", ([a], [1.0]), TypeError, r"grads\[0\] is a float; expected a torch.Tensor"),
    ("16-bit total", ([a.bfloat16()], [b]), TypeError,
     r"totals\[0\] has dtype torch.bfloat16; expected one of torch.float32, torch.float64"),
    ("integer grad", ([a], [b.int()]), TypeError, r"grads\[0\] has dtype torch.int32; expected one of"),
    ("complex weight", ([a], [b], [c.cfloat()]), TypeError, r"weights\[0\] has dtype torch.complex64; expected one of"),
    ("grad's shape", ([a.clone(), a], [b, b[:2]]), ValueError,
     r"grads\[1\] has shape \(2, 3\), totals\[1\] \(4, 3\); expected the same"),
    ("weight's shape", ([a], [b], [c.mT]), ValueError,
     r"weights\[0\] has shape \(3, 4\), totals\[0\] \(4, 3\); expected the same"),
    ("grad's device", ([a], [b.to("meta")]), ValueError,
     r"grads\[0\] is on meta but totals\[0\] is on cpu; expected the same device"),
    ("total's device", ([a, a.to("meta")], [b, b]), ValueError,
     r"totals\[1\] is on meta but totals\[0\] is on cpu; expected the same device"),
    ("sparse grad", ([a], [b.to_sparse()]), ValueError,
     r"grads\[0\] has layout torch.sparse_coo; expected torch.strided"),
    ("total requires a gradient", ([a.clone().requires_grad_()], [b]), ValueError, r"totals\[0\] requires a gradient"),
    ("expanded total", ([torch.zeros(3).expand(4, 3)], [b]), ValueError,
     r"totals\[0\] has strides \(0, 1\) for shape \(4, 3\)"),
    ("overlapping total", ([torch.zeros(5).as_strided((3, 3), (1, 1))], [torch.ones(3, 3)]), ValueError,
     r"totals\[0\] has strides \(1, 1\) for shape \(3, 3\); expected every element in memory of its own"),
    ("windows as a total", ([torch.zeros(9).unfold(0, 4, 2)], [torch.ones(3, 4)]), ValueError,
     r"totals\[0\] has strides \(2, 1\) for shape \(3, 4\)"),
    ("same total twice", ([a, a.view(4, 3)], [b, c]), ValueError,
     r"totals\[0\] and totals\[1\] are in the same memory"),
    ("total is a grad", ([a, b], [c, b]), ValueError, r"totals\[1\] and grads\[1\] are in the same memory"),
    ("total is another's weight", ([a, b], [c, c], [b, c]), ValueError,
     r"totals\[1\] and weights\[0\] are in the same memory"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, error, message", [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_wrong_input_says_what(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    before = a.clone()
    with pytest.raises(error, match=message):
        accumulate_sensitivity_(*arguments)
    assert torch.equal(a, before)


def test_is_refused_within_transforms() -> None:
    totals, grads = torch.zeros(3, 4), torch.ones(3, 4)
    with pytest.raises(NotImplementedError, match="accumulate_sensitivity_ writes in place"):
        torch.vmap(lambda total, grad: accumulate_sensitivity_([total], [grad]))(totals, grads)
    assert not totals.any()
