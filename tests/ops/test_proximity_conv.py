from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdistill import proximity_conv
from fastdistill.ops import reference
from tests import eager
from tests.accuracy import assert_accurate

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAMES = ("states", "proximity", "weight", "bias")
INF = math.inf


def make(
    batch: int = 3,
    length: int = 7,
    width: int = 5,
    channels: int = 6,
    taps: int = 3,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> list[Tensor]:
    """The first four arguments."""
    g = torch.Generator().manual_seed(0)
    shapes = (batch, length, width), (batch, length), (channels, width, taps), (channels,)
    tensors = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    tensors[1] = tensors[1].sigmoid()
    tensors[2] *= (width * taps) ** -0.5
    return [x.to(device, dtype) for x in tensors]


def padding(batch: int = 3, length: int = 7, device: str = "cpu") -> Tensor:
    """Of the first sentence all tokens, of the others fewer and fewer, at least one."""
    lengths = (length - torch.arange(batch) * 2).clamp(min=1)
    return (torch.arange(length) < lengths[:, None]).to(device)


def masks(length: int = 7) -> dict[str, Tensor | None]:
    right = padding(length=length)
    holes = right & (torch.arange(length) % 4 != 1)
    return {"none": None, "right": right, "left": right.flip(1), "holes": holes, "integers": right.long()}


def with_gradients(
    function: Any, inputs: list[Tensor | None], mask: Tensor | None = None, wanted: tuple[str, ...] = NAMES
) -> dict[str, Tensor]:
    """The output and, by name, the gradients that are wanted."""
    leaves = [None if x is None else x.detach().requires_grad_(n in wanted) for n, x in zip(NAMES, inputs, strict=True)]
    output = function(*leaves, mask)
    upstream = torch.linspace(-1, 2, max(output.numel(), 1), dtype=torch.float64)[: output.numel()].view(output.shape)
    named = {n: x for n, x in zip(NAMES, leaves, strict=True) if x is not None and x.requires_grad}
    grads = torch.autograd.grad(output, list(named.values()), upstream.to(output)) if named else ()
    return {"output": output.detach(), **dict(zip(named, grads, strict=True))}


def check(inputs: list[Tensor | None], mask: Tensor | None = None, wanted: tuple[str, ...] = NAMES) -> None:
    """Against plain PyTorch in float64."""
    mask = None if mask is None else mask.to(inputs[0].device)
    ours = with_gradients(proximity_conv, inputs, mask, wanted)
    wide = with_gradients(eager.proximity_conv, [None if x is None else x.double() for x in inputs], mask, wanted)
    plain = with_gradients(eager.proximity_conv, inputs, mask, wanted)
    for what, answer in wide.items():
        assert ours[what].dtype == plain[what].dtype and ours[what].is_contiguous()
        assert_accurate(ours[what], answer, plain[what], what)


# Values and gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taps", [1, 3, 5])
@pytest.mark.parametrize("mask", masks())
def test_every_dtype_and_mask(device: str, mask: str, taps: int, dtype: torch.dtype, nan_filled: None) -> None:
    inputs = make(taps=taps, dtype=dtype, device=device)
    check(inputs, masks()[mask])
    check([*inputs[:3], None], masks()[mask])


@pytest.mark.parametrize("width", [1, 16, 35, 70])
@pytest.mark.parametrize("channels", [1, 9, 130])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 2), (70, 5), (3, 90), (2, 300)])
def test_every_size(device: str, batch: int, length: int, channels: int, width: int, nan_filled: None) -> None:
    """One sentence to several blocks of them, less than a vector of channels to more than a block."""
    for taps in (1, 3, 7):
        inputs = make(batch, length, width, channels, taps, device=device)
        check(inputs)
        check(inputs, padding(batch, length))


def test_sums_of_many_sentences(device: str) -> None:
    check(make(5000, 2, 4, 3, dtype=torch.float32, device=device))


@pytest.mark.parametrize("mask", masks())
def test_gradcheck(mask: str) -> None:
    leaves = [x.requires_grad_() for x in make(length=7, channels=4, width=3)]
    torch.autograd.gradcheck(lambda *args: proximity_conv(*args, masks()[mask]), leaves)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_is_unpadded(device: str, side: str, nan_filled: None) -> None:
    """Whatever stands in the padding."""
    mask = masks()[side].to(device)
    inputs = make(device=device)
    inputs[0][~mask], inputs[1][~mask] = torch.nan, INF
    padded = with_gradients(proximity_conv, inputs, mask)
    for name in ("states", "proximity"):
        assert (padded[name][~mask] == 0).all()
    for i, real in enumerate(mask):
        alone = proximity_conv(inputs[0][i : i + 1, real], inputs[1][i : i + 1, real], *inputs[2:])
        torch.testing.assert_close(padded["output"][i : i + 1], alone)
    zeroed = [*(x.masked_fill(~(mask if x.dim() == 2 else mask[..., None]), 0) for x in inputs[:2]), *inputs[2:]]
    for name, answer in with_gradients(eager.proximity_conv, zeroed, mask).items():
        torch.testing.assert_close(padded[name], answer)


def test_a_sentence_of_padding_alone(device: str, nan_filled: None) -> None:
    mask = padding(device=device)
    mask[1] = False
    inputs = make(device=device)
    ours = with_gradients(proximity_conv, inputs, mask)
    assert (ours["output"][1] == -INF).all() and ours["output"][[0, 2]].isfinite().all()
    assert (ours["states"][1] == 0).all() and (ours["proximity"][1] == 0).all()

    def others(states: Tensor, proximity: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        output = eager.proximity_conv(states[[0, 2]], proximity[[0, 2]], weight, bias, mask[[0, 2]])
        return torch.stack([output[0], output.new_zeros(output.shape[1]), output[1]])

    for name, answer in with_gradients(others, inputs, mask).items():
        if name != "output":
            torch.testing.assert_close(ours[name], answer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equals_the_first_has_the_gradient(device: str, dtype: torch.dtype) -> None:
    """Small integers, of which every order of summing makes the same."""
    states, proximity = torch.ones(1, 6, 4), torch.ones(1, 6)
    weight = torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1).expand(3, 4, 3)
    inputs = [x.to(device, dtype) for x in (states, proximity, weight, torch.zeros(3))]
    mask = torch.tensor([[False, True, True, True, True, True]], device=device)
    for given, first in ((None, 0), (mask, 1)):
        # the filters of 1 make 12, at either end 8, those of -1 the negative of that, those of 0 nothing
        positions = torch.ops.fastdistill.proximity_conv(*inputs, given)[1]
        assert positions.tolist() == [[first + 1, first, first]]
        ours, expected = (with_gradients(f, inputs, given) for f in (proximity_conv, eager.proximity_conv))
        for name, answer in expected.items():
            torch.testing.assert_close(ours[name], answer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [6, 40])
def test_nan_spoils_what_it_reaches(device: str, channels: int, dtype: torch.dtype, nan_filled: None) -> None:
    inputs = make(4, 9, channels=channels, dtype=dtype, device=device)
    inputs[0][1, 4, 2] = inputs[1][2, 0] = torch.nan
    mask = padding(4, 9, device)
    mask[3, 4:] = False
    inputs[0][3, 4] = torch.nan  # padding
    output, positions = torch.ops.fastdistill.proximity_conv(*inputs, mask)
    assert output.isnan().all(1).tolist() == output.isnan().any(1).tolist() == [False, True, True, False]
    assert (positions[1] == 3).all() and (positions[2] == 0).all()  # the first whose n-gram has it
    inputs[2][channels - 1, 0, 0] = torch.nan
    assert proximity_conv(*inputs, mask)[0].isnan().tolist() == [False] * (channels - 1) + [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_infinite_values(device: str, dtype: torch.dtype) -> None:
    inputs = make(dtype=dtype, device=device)
    inputs[0][0, 3, 1], inputs[0][1, 2, 0], inputs[0][1, 2, 1] = INF, INF, -INF
    ours, expected = (function(*inputs[:3]) for function in (proximity_conv, eager.proximity_conv))
    assert torch.equal(ours.isnan(), expected.isnan()) and torch.equal(ours == INF, expected == INF)
    torch.testing.assert_close(ours, expected, equal_nan=True, rtol=4 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize("channels", [0, 4])
def test_no_sentences_or_channels(device: str, batch: int, channels: int, nan_filled: None) -> None:
    for mask in (None, padding(batch, 7, device)):
        ours = with_gradients(proximity_conv, make(batch, channels=channels, device=device), mask)
        assert ours["output"].shape == (batch, channels)
        for name, x in zip(NAMES, make(batch, channels=channels), strict=True):
            assert ours[name].shape == x.shape
            assert (ours[name] == 0).all() or batch * channels > 0


def test_any_layout(device: str) -> None:
    states, proximity, weight, bias = make(4, 6, 8, 5, device=device)
    strange: list[Tensor | None] = [
        states.transpose(0, 1).contiguous().transpose(0, 1),
        proximity.T.contiguous().T,
        weight.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        bias.repeat_interleave(2)[::2],
    ]
    mask = padding(4, 6, device).T.contiguous().T
    check(strange, mask)
    check(
        [states.mT.contiguous().mT, proximity[:1].expand(4, 6), weight[:, :1].expand(5, 8, 3), bias],
        mask[:1].expand(4, 6),
    )
    leaves = [x.requires_grad_() for x in (states, proximity, weight, bias)]
    ours = torch.autograd.grad(proximity_conv(*leaves).sum(), leaves)  # expanded from a number
    for value, answer in zip(ours, torch.autograd.grad(eager.proximity_conv(*leaves).sum(), leaves), strict=True):
        torch.testing.assert_close(value, answer)


@pytest.mark.parametrize("of", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_proximity_of_another_dtype(device: str, dtype: torch.dtype, of: torch.dtype) -> None:
    """Not rounded to that of the states."""
    inputs = make(dtype=dtype, device=device)
    inputs[1] = make(device=device)[1].to(of)
    ours = with_gradients(proximity_conv, inputs)
    assert ours["proximity"].dtype == of and ours["output"].dtype == dtype
    exact = with_gradients(eager.proximity_conv, [x.double() for x in inputs])
    limit = 4 * max(torch.finfo(dtype).eps, torch.finfo(of).eps if of != torch.float64 else 0)
    for name, answer in exact.items():
        assert (ours[name].double() - answer).norm() <= limit * answer.norm(), name


# Whose gradients are wanted -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(), *((name,) for name in NAMES), ("states", "weight"), ("proximity", "bias")])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_reach_only_who_asks(device: str, wanted: tuple[str, ...], bias: bool, nan_filled: None) -> None:
    inputs = make(device=device)
    check(inputs if bias else [*inputs[:3], None], padding(), wanted)


def test_backward_computes_what_is_wanted() -> None:
    inputs = make()
    output, positions = torch.ops.fastdistill.proximity_conv(*inputs, None)
    for which in range(4):
        wanted = [i == which for i in range(4)]
        grads = torch.ops.fastdistill.proximity_conv_backward(output, *inputs[:3], None, positions, *wanted)
        assert [x.numel() > 0 for x in grads] == wanted


def test_second_derivative_is_an_error() -> None:
    leaves = [x.requires_grad_() for x in make()]
    with pytest.raises(RuntimeError, match="proximity_conv cannot be differentiated twice"):
        torch.autograd.grad(proximity_conv(*leaves).sum() ** 2, leaves, create_graph=True)


# Under PyTorch's other machinery --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["none", "right", "integers"])
def test_opcheck(device: str, mask: str) -> None:
    given = masks()[mask]
    given = None if given is None else given.bool().to(device)
    inputs = make(dtype=torch.float32, device=device)
    ops = torch.ops.fastdistill
    forward, backward = ops.proximity_conv.default, ops.proximity_conv_backward.default
    output, positions = forward(*inputs, given)
    for wanted in ((True,) * 4, (True, False, True, False), (False,) * 4):
        torch.library.opcheck(backward, (output, *inputs[:3], given, positions, *wanted))
    leaves = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(forward, (*leaves, given))
    torch.library.opcheck(forward, (*leaves[:3], None, given))


@pytest.mark.slow
def test_compiles_whole(device: str) -> None:
    torch.compiler.reset()

    def network(*args: Tensor) -> Tensor:
        return proximity_conv(args[0].tanh(), *args[1:]).relu()

    whole = torch.compile(network, fullgraph=True, dynamic=True)
    for length in (4, 9):
        inputs = make(3, length, dtype=torch.float32, device=device)
        mask = padding(3, length, device).long()
        expected = with_gradients(network, inputs, mask)
        for name, value in with_gradients(whole, inputs, mask).items():
            torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("mask", ["none", "right"])
def test_autocast(device: str, mask: str) -> None:
    given = masks()[mask]
    given = None if given is None else given.to(device)
    inputs = make(4 if given is None else 3, 7, 16, 20, dtype=torch.float32, device=device)

    def under(function: Any) -> Any:
        def call(*args: Any) -> Tensor:
            with torch.autocast(device, dtype=torch.bfloat16):
                return function(*args)

        return call

    exact = with_gradients(eager.proximity_conv, [x.double() for x in inputs], given)
    ours, plain = (with_gradients(under(f), inputs, given) for f in (proximity_conv, eager.proximity_conv))
    assert ours["output"].dtype == torch.bfloat16
    for name, answer in exact.items():
        assert ours[name].dtype == plain[name].dtype
        difference, allowed = ((x[name].double() - answer).norm() for x in (ours, plain))
        assert difference <= 2 * allowed + 2 * torch.finfo(torch.bfloat16).eps * answer.norm(), name
    inputs[0] = inputs[0].bfloat16()
    torch.testing.assert_close(under(proximity_conv)(*inputs, given), ours["output"])


def test_formulas_of_the_reference() -> None:
    """The compiled kernel against what it stands for."""
    inputs, upstream = make(5, 11, 9, 7), torch.linspace(-2, 1, 35, dtype=torch.float64).view(5, 7)
    for mask in (None, padding(5, 11)):
        output, positions = torch.ops.fastdistill.proximity_conv(*inputs, mask)
        expected = reference.proximity_conv(*inputs, mask)
        torch.testing.assert_close((output, positions), expected)
        args = (upstream, *inputs[:3], mask, positions, True, True, True, True)
        torch.testing.assert_close(
            torch.ops.fastdistill.proximity_conv_backward(*args), reference.proximity_conv_backward(*args)
        )


def test_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in make(dtype=torch.bfloat16)]
        output = proximity_conv(*fake, mode.from_tensor(padding().long()))
        assert output.shape == (3, 6) and output.dtype == torch.bfloat16


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"states": [1.0]}, TypeError, "states is a list; expected a torch.Tensor"),
        ({"states": torch.zeros(3, 7, 5).long()}, TypeError, "states has dtype torch.int64"),
        ({"states": torch.zeros(7, 5)}, ValueError, r"states has shape \(7, 5\); expected \[batch, tokens, width\]"),
        ({"states": torch.zeros(3, 0, 5)}, ValueError, r"states has shape \(3, 0, 5\).*at least 1 token"),
        ({"states": torch.zeros(3, 7, 0)}, ValueError, r"states has shape \(3, 7, 0\).*1 wide"),
        ({"states": torch.zeros(3, 7, 4)}, ValueError, r"weight has shape \(6, 5, 3\); expected \[channels, 4, an odd"),
        ({"states": torch.zeros(3, 7, 5).half()}, TypeError, "weight has dtype torch.float32; expected torch.float16"),
        ({"proximity": None}, TypeError, "proximity is a NoneType"),
        ({"proximity": torch.zeros(3, 6)}, ValueError, r"proximity has shape \(3, 6\); expected \(3, 7\), batch and"),
        ({"proximity": torch.zeros(3, 7, 1)}, ValueError, r"proximity has shape \(3, 7, 1\)"),
        ({"proximity": torch.zeros(3, 7).int()}, TypeError, "proximity has dtype torch.int32"),
        ({"proximity": torch.zeros(3, 7, device="meta")}, ValueError, "proximity is on meta but states is on cpu"),
        ({"weight": None}, TypeError, "weight is a NoneType"),
        ({"weight": torch.zeros(6, 5)}, ValueError, r"weight has shape \(6, 5\)"),
        ({"weight": torch.zeros(6, 5, 2)}, ValueError, r"weight has shape \(6, 5, 2\).*an odd number of tokens"),
        ({"weight": torch.zeros(6, 5, 0)}, ValueError, r"weight has shape \(6, 5, 0\)"),
        ({"weight": torch.zeros(6, 5, 3, device="meta")}, ValueError, "weight is on meta"),
        ({"bias": 0.0}, TypeError, "bias is a float"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias has shape \(5,\); expected \(6,\) or None"),
        ({"bias": torch.zeros(6).double()}, TypeError, "bias has dtype torch.float64; expected torch.float32"),
        ({"bias": torch.zeros(6, device="meta")}, ValueError, "bias is on meta"),
        ({"attention_mask": [1]}, TypeError, "attention_mask is a list"),
        ({"attention_mask": torch.ones(3, 7)}, TypeError, "attention_mask has dtype torch.float32; expected one of"),
        ({"attention_mask": torch.ones(3, 1).bool()}, ValueError, r"attention_mask has shape \(3, 1\)"),
        ({"attention_mask": torch.ones(3, 7, device="meta").bool()}, ValueError, "attention_mask is on meta"),
    ],
)  # fmt: skip
def test_bad_arguments(changes: dict[str, Any], error: type, message: str) -> None:
    arguments = dict(zip(NAMES, make(dtype=torch.float32), strict=True))
    with pytest.raises(error, match=message):
        proximity_conv(**{**arguments, **changes})


def test_float64_is_left_alone_by_autocast() -> None:
    inputs = make(dtype=torch.float32)
    inputs[2] = inputs[2].double()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="weight has dtype torch.float64"):
        proximity_conv(*inputs)
