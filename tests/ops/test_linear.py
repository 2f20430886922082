from __future__ import annotations

from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.ops import linear as module
from fastdistill.ops.linear import by_onednn, linear, pack_weight, packs_bf16
from tests.accuracy import assert_accurate

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


def gradients(function: Any, *inputs: Tensor | None) -> list[Tensor]:
    """The result, and the gradients to the inputs."""
    given = [x if x is None else x.detach().requires_grad_() for x in inputs]
    found = function(*given)
    upstream = torch.linspace(-1, 2, found.numel(), dtype=torch.float64).view(found.shape).to(found)
    return [found, *torch.autograd.grad(found, [x for x in given if x is not None], upstream)]


@pytest.mark.parametrize("shape", [(70, 24), (3, 25, 24), (1, 64, 24), (2, 5, 8, 24)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_accuracy(shape: tuple[int, ...], has_bias: bool, onednn: Mock) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*of, generator=g) for of in (shape, (40, 24), (40,)))
    inputs = (x, weight, bias if has_bias else None)
    ours, plain = gradients(linear, *inputs), gradients(F.linear, *inputs)
    exact = gradients(F.linear, *(None if each is None else each.double() for each in inputs))
    assert onednn.call_count == 2  # the result, and the gradient to x
    for what, *values in zip(("value", "x", "weight", "bias"), ours, exact, plain, strict=False):
        assert_accurate(*values, what=what)
    with torch.no_grad():
        for packed in (None, pack_weight(weight, 64)):
            assert_accurate(linear(*inputs, packed), exact[0], plain[0])


def test_gradients_of_some(onednn: Mock) -> None:
    x, weight, bias = torch.randn(64, 8), torch.randn(5, 8, requires_grad=True), torch.randn(5)
    linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 8))
    inner = x.clone().requires_grad_()
    linear(inner, weight.detach(), None).sum().backward()
    torch.testing.assert_close(inner.grad, weight.detach().sum(0).expand(64, 8))
    expanded = linear(inner, weight, bias)
    torch.autograd.grad(expanded, inner, torch.ones(1, 1).expand(64, 5))


def test_what_pytorch_computes(onednn: Mock) -> None:
    x, weight, bias = torch.randn(64, 8), torch.randn(5, 8), torch.randn(5)
    linear(x.double(), weight.double(), bias.double())
    linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    linear(x[:0], weight, bias)
    linear(x[:, :0], weight[:, :0], bias)  # of a layer whose units are all pruned
    assert pack_weight(weight[:, :0], 64) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        linear(x, weight, bias)
    with torch.autograd.forward_ad.dual_level():
        dual = linear(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), weight, bias)
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, weight.sum(1).expand(64, 5))
    by_example = torch.func.vmap(lambda one: linear(one, weight, bias))(x.view(2, 32, 8))
    torch.testing.assert_close(by_example.view(64, 5), F.linear(x, weight, bias))
    torch.jit.trace(lambda one: linear(one, weight, bias), x, check_trace=False)
    torch.compile(lambda one: linear(one, weight, bias), backend="eager", fullgraph=True)(x)
    assert not onednn.called
    linear(x, weight, bias)
    assert onednn.called


def test_what_is_given_may_be_changed_in_place(onednn: Mock) -> None:
    x, weight = torch.randn(2, 40, 8), torch.randn(5, 8)
    ours, plain = (gradients(lambda *given, f=f: f(*given, None).relu_(), x, weight) for f in (linear, F.linear))
    assert onednn.called
    torch.testing.assert_close(ours, plain)


def test_biases_that_are_not_contiguous(onednn: Mock) -> None:
    x, weight = torch.randn(64, 8), torch.randn(5, 8)
    for bias in (torch.randn(10)[::2], torch.randn(1).expand(5), torch.randn(1), torch.randn(1, 5)):
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
    assert not onednn.called


def test_operands_of_other_kinds(onednn: Mock) -> None:
    """Subclasses, which say themselves what a product is, and other layouts."""

    class Own(Tensor):
        pass

    x, weight = torch.randn(64, 8), torch.randn(5, 8)
    assert type(linear(x, weight.as_subclass(Own), None)) is Own
    torch.testing.assert_close(linear(x, weight.to_sparse(), None), F.linear(x, weight))
    assert pack_weight(weight.as_subclass(Own), 64) is None and pack_weight(weight.to_sparse(), 64) is None
    assert not onednn.called


@pytest.mark.parametrize("learns", [(True, False), (False, True), (True, True)])
def test_nothing_is_kept_in_vain(learns: tuple[bool, bool], onednn: Mock) -> None:
    """As PyTorch does: the input for the weight's gradient, and the weight for the input's."""
    kept: list[list[tuple[int, ...]]] = []
    for function in (linear, F.linear):
        x, weight = (torch.randn(*of).requires_grad_(one) for of, one in zip(((64, 8), (5, 8)), learns, strict=True))
        kept.append([])
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept[-1].append(tuple(t.shape)) or t, lambda t: t):
            function(x, weight, None)
    ours, plain = kept
    assert len(ours) == len(plain) == sum(learns)


def test_several_gradients_at_once(onednn: Mock) -> None:
    x, weight, bias = (torch.randn(*of, requires_grad=True) for of in ((64, 8), (5, 8), (5,)))
    upstream = torch.randn(3, 64, 5)
    found, expected = (
        torch.autograd.grad(function(x, weight, bias), (x, weight, bias), upstream, is_grads_batched=True)
        for function in (linear, F.linear)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(not packs_bf16(), reason="oneDNN has no bfloat16 on this processor")
def test_packed_in_bfloat16(onednn: Mock) -> None:
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*of, generator=g).bfloat16() for of in ((70, 24), (40, 24), (40,))]
    x, weight, bias = inputs
    packed = pack_weight(weight, 64)
    assert packed is not None
    plain, exact = F.linear(*inputs), F.linear(*(each.double() for each in inputs))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for has_bias in (True, False):
            expected = exact if has_bias else exact - bias.double()
            assert_accurate(linear(x, weight, bias if has_bias else None, packed), expected, plain)
        views = (
            x.T.contiguous().T,
            torch.stack([x, x], 2)[..., 0],
            x[:1].expand(70, -1),
            x.view(2, 35, 24).transpose(0, 1),
        )
        for view in views:
            expected = F.linear(view.double(), weight.double(), bias.double())
            assert_accurate(linear(view, weight, bias, packed), expected, F.linear(view, weight, bias))
        torch.testing.assert_close(
            pack_weight(weight.T.contiguous().T, 64).to_dense(), packed.to_dense(), rtol=0, atol=0
        )
    assert onednn.call_count == 6
    weight.requires_grad_()  # what is packed has no gradient
    torch.testing.assert_close(gradients(lambda *given: linear(*given, packed), *inputs), gradients(F.linear, *inputs))
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert linear(x, weight, bias, packed).dtype == torch.float16
    assert onednn.call_count == 6


def test_few_tokens(onednn: Mock) -> None:
    with patch.object(module, "ROWS", 64):
        linear(torch.randn(63, 8), torch.randn(5, 8), None)
        assert not onednn.called
        linear(torch.randn(64, 8), torch.randn(5, 8), None)
        assert onednn.called


def test_where_it_is_faster() -> None:
    for text, isa, expected in (
        ("vendor_id : AuthenticAMD", "AVX512", True),
        ("vendor_id : AuthenticAMD", "AVX2", False),
        ("vendor_id : GenuineIntel", "AVX512", False),
    ):
        with (
            patch.object(module, "_said", lambda _, text=text: text),
            patch.object(torch.backends.cpu, "get_cpu_capability", lambda isa=isa: isa),
        ):
            assert by_onednn.__wrapped__() is expected
    assert module._said("/nowhere") == ""
