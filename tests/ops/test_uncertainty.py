from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdistill import hidden_entropy, select_uncertain, uncertainty
from fastdistill.ops import reference
from tests import eager
from tests.accuracy import assert_accurate
from tests.ops.uncertain import DTYPES, INF, KINDS, make

WIDTHS = [2, 3, 7, 16, 17, 32, 33, 100, 129, 1024, 1025, 2049, 4099]


def with_gradient(function: Any, logits: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    value = function(logits, *options)
    upstream = torch.linspace(0.5, 2, max(value.numel(), 1), dtype=torch.float64)[: value.numel()].view(value.shape)
    return value.detach(), torch.autograd.grad(value, logits, upstream.to(value))[0]


@pytest.mark.parametrize("classes", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_and_width(device: str, classes: int, dtype: torch.dtype, kind: str, nan_filled: None) -> None:
    for normalize in (True, False):
        logits = make(37, classes, device=device, dtype=dtype)
        ours = with_gradient(uncertainty, logits, kind, normalize)
        assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert ours[1].dtype == dtype
        exact = with_gradient(eager.uncertainty, logits.double(), kind, normalize)
        plain = with_gradient(eager.uncertainty, logits, kind, normalize)
        for what, *values in zip(("value", "gradient"), ours, exact, plain, strict=True):
            assert_accurate(*values, what=what)


@settings(deadline=None, max_examples=60)
@given(
    leading=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    classes=st.integers(2, 80),
    kind=st.sampled_from(KINDS),
    normalize=st.booleans(),
    layout=st.sampled_from(["contiguous", "sliced", "transposed", "expanded"]),
)
def test_any_shape_and_layout(leading: list[int], classes: int, kind: str, normalize: bool, layout: str) -> None:
    logits = make(*leading, classes)
    if layout == "sliced":
        logits = torch.cat([logits, logits], -1)[..., :classes]
    elif layout == "transposed":
        logits = logits.movedim(-1, 0).contiguous().movedim(0, -1)
    elif layout == "expanded" and logits.numel():
        logits = logits.reshape(-1, classes)[0].expand(logits.shape)
    ours = with_gradient(uncertainty, logits, kind, normalize)
    for value, expected in zip(ours, with_gradient(eager.uncertainty, logits, kind, normalize), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("classes", [2, 50, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_close_to_certainty_nothing_is_lost(device: str, classes: int, dtype: torch.dtype, nan_filled: None) -> None:
    """Against closed forms for two possible classes, down to where subtracting from 1 would give 0."""
    height = torch.arange(1.0, 81.0, dtype=torch.float64, device=device)
    logits = torch.full((80, classes), -INF, dtype=dtype, device=device)
    logits[:, classes // 2], logits[:, -1] = height.to(dtype), 0
    if classes == 2:
        logits[:, 0] = 0
        logits[:, 1] = height.to(dtype)
    other = torch.sigmoid(-height)
    expected = {"entropy": (-height).exp().log1p() + height * other, "least_confidence": other, "margin": 2 * other}
    for kind in KINDS:
        value, grad = with_gradient(uncertainty, logits, kind, False)
        limit = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(value.double(), expected[kind], rtol=limit, atol=0)
        slope = {"entropy": -height * other * (1 - other), "least_confidence": -other * (1 - other)}
        slope["margin"] = 2 * slope["least_confidence"]
        upstream = torch.linspace(0.5, 2, 80, dtype=torch.float64, device=device).to(value).double()
        largest = grad.gather(1, logits.argmax(1, keepdim=True))[:, 0].double()
        torch.testing.assert_close(largest, upstream * slope[kind], rtol=limit, atol=0)


@pytest.mark.parametrize("classes", [2, 30, 40, 5000])
@pytest.mark.parametrize("kind", KINDS)
def test_from_certain_to_uniform(device: str, classes: int, kind: str) -> None:
    logits = torch.zeros(2, classes, device=device)
    logits[0, 1:] = -INF
    torch.testing.assert_close(uncertainty(logits, kind), torch.tensor([0.0, 1.0], device=device))
    most = {"entropy": math.log(classes), "least_confidence": 1 - 1 / classes, "margin": 1.0}[kind]
    torch.testing.assert_close(uncertainty(logits, kind, normalize=False)[1].item(), most, rtol=1e-6, atol=0)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [2, 5, 40])
def test_gradcheck(classes: int, kind: str, normalize: bool) -> None:
    logits = make(3, classes, scale=1.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: uncertainty(x, kind, normalize), logits)


def test_reference_gradients_are_autograds() -> None:
    for kind in KINDS:
        logits = make(7, 6)
        upstream = torch.linspace(0.5, 2, 7, dtype=torch.float64)
        _, expected = with_gradient(eager.uncertainty, logits, kind, True)
        torch.testing.assert_close(reference.uncertainty_backward(upstream, logits, kind, True), expected)


@pytest.mark.parametrize("classes", [6, 60])
def test_of_equals_the_lower_index_is_the_larger(device: str, classes: int, nan_filled: None) -> None:
    logits = torch.full((4, classes), -30.0, dtype=torch.float64, device=device)
    tops = [(1, 3), (0, classes - 1), (2, 5), (1, 2)]
    for row, (first, second) in enumerate(tops):
        logits[row, first] = logits[row, second] = 1.0
    logits[2, 4] = 2.0  # alone at the top, before the two
    logits[3, :] = 1.0  # everything
    _, grad = with_gradient(uncertainty, logits, "least_confidence", False)
    assert grad.argmin(1).tolist() == [1, 0, 4, 0]
    _, grad = with_gradient(uncertainty, logits, "margin", False)
    assert grad.argmin(1).tolist() == [1, 0, 4, 0]
    assert grad.argmax(1).tolist() == [3, classes - 1, 2, 1]
    torch.testing.assert_close(grad.sum(1), torch.zeros(4, dtype=torch.float64, device=device))


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "kind"), [*zip([(5, 7), (7,), (2, 3, 40)], KINDS, strict=True), ((0, 4), "margin")])
def test_opcheck(device: str, shape: tuple[int, ...], kind: str) -> None:
    logits = make(*shape, device=device)
    torch.library.opcheck(torch.ops.fastdistill.uncertainty.default, (logits.requires_grad_(), kind, True))
    args = (torch.ones(shape[:-1], dtype=torch.float64, device=device), logits.detach(), kind, True)
    torch.library.opcheck(torch.ops.fastdistill.uncertainty_backward.default, args)
    if logits.numel():
        rows = logits.numel() // shape[-1]
        torch.library.opcheck(torch.ops.fastdistill.select_uncertain.default, (logits.detach(), (rows + 1) // 2, kind))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "backend"), [("entropy", "inductor"), ("least_confidence", "aot_eager"), ("margin", "aot_eager")]
)
def test_compiles_whole(device: str, kind: str, backend: str) -> None:
    torch.compiler.reset()

    def regularised(logits: Tensor, kind: str) -> Tensor:
        return uncertainty(logits * 2, kind) * 3

    def chosen(logits: Tensor) -> Tensor:
        return select_uncertain(logits * 2, 0.5, kind) + 1

    whole = torch.compile(regularised, fullgraph=True, dynamic=True, backend=backend)
    choice = torch.compile(chosen, fullgraph=True, dynamic=True, backend=backend)
    for rows in (4, 7):
        logits = make(rows, 9, device=device, dtype=torch.float32)
        plain = with_gradient(regularised, logits, kind)
        for value, expected in zip(with_gradient(whole, logits, kind), plain, strict=True):
            torch.testing.assert_close(value, expected)
        assert torch.equal(choice(logits), chosen(logits))


def test_autocast_computes_in_float32(device: str) -> None:
    logits = make(8, 33, device=device, dtype=torch.bfloat16)
    with torch.autocast(device, dtype=torch.bfloat16):
        value = uncertainty(logits)
    assert value.dtype == torch.float32
    assert torch.equal(value, uncertainty(logits))


def test_gradients_reach_only_who_asks(device: str) -> None:
    logits = make(6, 50, device=device).requires_grad_()
    for _ in range(2):
        uncertainty(logits).mean().backward()
    expected = torch.autograd.grad(eager.uncertainty(logits).mean(), logits)[0]
    torch.testing.assert_close(logits.grad, 2 * expected)
    with torch.no_grad():
        assert not uncertainty(logits).requires_grad
    assert not uncertainty(logits.detach()).requires_grad
    assert not select_uncertain(logits, 0.5).requires_grad


def test_second_derivative_is_an_error() -> None:
    logits = make(6, 5).requires_grad_()
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(uncertainty(logits).sum() ** 2, logits, create_graph=True)


@pytest.mark.parametrize("classes", [6, 60, 3000])
@pytest.mark.parametrize("kind", KINDS)
def test_minus_infinity_is_no_probability(device: str, classes: int, kind: str, nan_filled: None) -> None:
    """Wherever the classes that are left stand: also after a block of nothing but -inf."""
    few = make(5, 4, device=device)
    for start in (0, classes // 2 - 2, classes - 4):
        masked = torch.full((5, classes), -INF, dtype=torch.float64, device=device)
        masked[:, start : start + 4] = few
        value, grad = with_gradient(uncertainty, masked, kind, False)
        expected = with_gradient(uncertainty, few, kind, False)
        torch.testing.assert_close(value, expected[0])
        torch.testing.assert_close(grad[:, start : start + 4], expected[1])
        assert grad.count_nonzero() == grad[:, start : start + 4].count_nonzero()


EVERYWHERE, TWO = slice(None), slice(2)
POISONS = [(math.nan, 0), (math.nan, -1), (math.nan, EVERYWHERE), (INF, 0), (INF, -1), (INF, TWO), (-INF, EVERYWHERE)]


@pytest.mark.parametrize("classes", [2, 6, 60, 3000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_spoils_only_its_row(
    device: str, classes: int, dtype: torch.dtype, kind: str, nan_filled: None
) -> None:
    for poison, place in POISONS:
        logits = make(4, classes, device=device, dtype=dtype)
        logits[1, place] = poison
        value, grad = with_gradient(uncertainty, logits, kind, True)
        for spoilt in (value.isnan(), grad.isnan().all(-1), grad.isnan().any(-1)):
            assert spoilt.tolist() == [False, True, False, False], (poison, place)


PLACES = {2: [0, 1], 3: [0, 1, 2], 16: [0, 7, 15], 17: [0, 9, 16], 40: [0, 31, 39], 2500: [0, 300, 2047, 2499]}


@pytest.mark.parametrize("classes", PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_logit_anywhere(device: str, classes: int, dtype: torch.dtype, kind: str, nan_filled: None) -> None:
    for logit in (math.nan, INF, -INF, 0.0, -0.0, 9.0, 20.0, 5e4, -5e4):
        check_logit(logit, PLACES[classes], classes, kind, device, dtype)


def check_logit(logit: float, places: list[int], classes: int, kind: str, device: str, dtype: torch.dtype) -> None:
    """Beside ordinary logits, beside zeros of either sign, beside its equals but one, and beside nothing but -inf."""
    rows = torch.cat([make(len(places), classes), torch.zeros(len(places), classes).fill_(-0.0)])
    rows = torch.cat([rows, torch.full((len(places), classes), logit), torch.full((len(places), classes), -INF)])
    for row, place in zip(rows, places * 4, strict=True):
        row[place] = logit
    rows[2 * len(places) : 3 * len(places), classes // 2] = 1.0
    rows[3 * len(places) :, 1] = 0.5
    logits = rows.to(device, dtype)
    value, grad = with_gradient(uncertainty, logits, kind, False)
    exact = reference.uncertainty(logits.double(), kind, False)
    ordinary = reference.uncertainty(logits, kind, False)
    assert torch.equal(value.isnan(), exact.isnan())
    assert torch.equal(grad.isnan().any(-1), exact.isnan()) and torch.equal(grad.isnan().all(-1), exact.isnan())
    assert not (value < 0).any()
    known = ~exact.isnan()
    assert_accurate(value[known], exact[known], ordinary[known])


@pytest.mark.parametrize("classes", [2, 50, 3000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_16_bit_logits_close_to_certainty(device: str, classes: int, dtype: torch.dtype, kind: str) -> None:
    """Each value as precise as float32's exponentials of a few dozen are, wherever the two possible classes are."""
    height = torch.arange(1.0, 65.0, device=device).to(dtype)
    for place in sorted({0, classes // 3, classes - 2}):
        logits = torch.full((64, classes), -INF, dtype=dtype, device=device)
        logits[:, place], logits[:, place + 1] = height, 0
        exact = reference.uncertainty(logits.double(), kind, False)
        torch.testing.assert_close(uncertainty(logits, kind, False).double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("classes", [4, 90, 3000])
@pytest.mark.parametrize("size", [1e4, 1e30, 3e37])
@pytest.mark.parametrize("kind", KINDS)
def test_huge_logits(device: str, classes: int, size: float, kind: str) -> None:
    logits = make(8, classes, device=device, dtype=torch.float32) * (size / 3)
    value, grad = with_gradient(uncertainty, logits, kind, False)
    torch.testing.assert_close(value, torch.zeros_like(value))
    assert grad.isfinite().all()


@pytest.mark.parametrize("classes", [4, 90, 3000])
@pytest.mark.parametrize("offset", [-1e6, -300.0, 300.0, 1e6])
@pytest.mark.parametrize("kind", KINDS)
def test_a_common_offset_changes_nothing(device: str, classes: int, offset: float, kind: str) -> None:
    logits = make(8, classes, device=device, dtype=torch.float32).mul(16).round().div(16)
    plain = with_gradient(uncertainty, logits, kind, True)
    for value, expected in zip(with_gradient(uncertainty, logits + offset, kind, True), plain, strict=True):
        torch.testing.assert_close(value, expected, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("classes", [1500, 5000])
@pytest.mark.parametrize("kind", KINDS)
def test_rising_and_falling_rows(device: str, classes: int, kind: str) -> None:
    """The largest logit so far changes all the time, or never again."""
    slope = torch.linspace(0, 40, classes, dtype=torch.float64, device=device)
    logits = torch.stack([slope, slope.flip(0), slope * 30, slope.flip(0) * 30, slope.sin(), slope * 0.001])
    ours = with_gradient(uncertainty, logits, kind, False)
    expected = with_gradient(eager.uncertainty, logits, kind, False)
    for value, exact in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5)])
def test_no_rows(device: str, shape: tuple[int, ...]) -> None:
    value, grad = with_gradient(uncertainty, make(*shape, device=device), "entropy", True)
    assert value.shape == shape[:-1] and grad.shape == shape


# Hidden states --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_hidden_entropy(device: str, dtype: torch.dtype, normalize: bool) -> None:
    states = make(5, 6, 48, device=device, dtype=dtype)
    ours = with_gradient(hidden_entropy, states, normalize)
    assert ours[0].shape == (5,) and ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    def mean(states: Tensor) -> Tensor:
        return eager.uncertainty(states, "entropy", normalize).mean(-1)

    for value, exact, plain in zip(
        ours, with_gradient(mean, states.double()), with_gradient(mean, states), strict=True
    ):
        assert_accurate(value, exact, plain)


def test_layers_of_one_example_rank_as_by_hand() -> None:
    flat, peaked = torch.zeros(1, 8), torch.tensor([[5.0] + [0.0] * 7])
    middle = torch.tensor([[1.0] + [0.0] * 7])
    entropies = hidden_entropy(torch.stack([peaked, flat, middle]))
    assert entropies.argsort(descending=True).tolist() == [1, 2, 0] and entropies[1] == 1


# Errors ---------------------------------------------------------------------------------------------------------------

LOGITS = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: uncertainty([[0.0, 1.0]]), TypeError, "logits is a list"),
        (lambda: uncertainty(LOGITS.long()), TypeError, "logits has dtype torch.int64"),
        (lambda: uncertainty(torch.zeros(4, 1)), ValueError, r"logits has shape \(4, 1\); expected a last dim"),
        (lambda: uncertainty(torch.zeros(())), ValueError, r"logits has shape \(\)"),
        (lambda: uncertainty(LOGITS, "confidence"), ValueError, "kind is 'confidence'; expected one of 'entropy'"),
        (lambda: uncertainty(LOGITS, normalize=1), TypeError, "normalize is 1; expected a bool"),
        (lambda: hidden_entropy(LOGITS), ValueError, r"hidden_states has shape \(4, 3\); expected \[layers"),
        (lambda: hidden_entropy(torch.zeros(2, 3, 4, 5)), ValueError, "hidden_states has shape"),
        (lambda: hidden_entropy(torch.zeros(2, 0, 4)), ValueError, "at least one example"),
        (lambda: hidden_entropy(torch.zeros(2, 3, 1)), ValueError, r"hidden_states has shape \(2, 3, 1\)"),
        (lambda: hidden_entropy(torch.zeros(2, 3, 4, dtype=torch.int32)), TypeError, "hidden_states has dtype"),
        (lambda: hidden_entropy(torch.zeros(2, 3, 4), None), TypeError, "normalize is None"),
        (lambda: select_uncertain(torch.zeros(0, 3), 0.5), ValueError, r"logits has shape \(0, 3\); expected at least"),
        (lambda: select_uncertain(torch.zeros(4, 1), 0.5), ValueError, "logits has shape"),
        (lambda: select_uncertain(torch.zeros(2, device="meta").expand(1 << 32, 2), 0.5), ValueError,
         "logits has 4294967296 rows; expected fewer than 2"),
        (lambda: select_uncertain(LOGITS, 0.0), ValueError, "ratio is 0.0; expected a finite number > 0"),
        (lambda: select_uncertain(LOGITS, -0.5), ValueError, "ratio is -0.5"),
        (lambda: select_uncertain(LOGITS, 1.01), ValueError, "ratio is 1.01; expected a number > 0 and <= 1"),
        (lambda: select_uncertain(LOGITS, math.nan), ValueError, "ratio is nan"),
        (lambda: select_uncertain(LOGITS, "half"), TypeError, "ratio is 'half'"),
        (lambda: select_uncertain(LOGITS, True), TypeError, "ratio is True"),
        (lambda: select_uncertain(LOGITS, 0.5, "random"), ValueError, "kind is 'random'"),
    ],
)  # fmt: skip
def test_bad_arguments(call: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
