"""gated_ffn and ActiveNeurons where neurons are off."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import gated_ffn
from fastdistill.ops import ActiveNeurons
from fastdistill.ops.bias_act_gate import bias_act_gate
from tests import eager
from tests.ops.ffn import GATES, NAMES, by_active, check, make, with_gradients


def gathered(x: Tensor, w_in: Tensor, b_in: Any, w_out: Tensor, b_out: Any, gate: Tensor, **options: Any) -> Tensor:
    active = ActiveNeurons(gate)
    return gated_ffn(x, *active.gather(w_in, b_in, w_out), b_out, active.gate, **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gate", GATES[1:])
@pytest.mark.parametrize("function", [by_active, gathered])
def test_neurons_that_are_off_are_left_out(device: str, function: Any, gate: str, bias: bool) -> None:
    inputs = make(3, 5, 8, gate=gate, bias=bias, device=device)
    expected = with_gradients(eager.gated_ffn, inputs, NAMES[:5])
    off = (inputs[5] == 0).all(0) if gate == "per example" else inputs[5] == 0
    assert 0 < off.sum() < 37
    for weight in (inputs[1], inputs[3].T, *([inputs[2]] if bias else [])):
        weight[off] = math.nan
    ours = with_gradients(function, inputs, NAMES[:5])
    for what, value in expected.items():
        torch.testing.assert_close(ours[what], value, rtol=1e-10, atol=1e-12)
    for grad in (ours["w_in"], ours["w_out"].T, *([ours["b_in"]] if bias else [])):
        assert (grad[off] == 0).all() and (grad[~off] != 0).all()
    assert with_gradients(gated_ffn, inputs)["out"].isnan().all()  # the gate needs its gradient: computed


@pytest.mark.parametrize("gate", GATES[1:])
def test_of_weights_under_a_closed_gate_the_gradients_are_0(device: str, gate: str) -> None:
    inputs = make(3, 5, 8, gate=gate, device=device)
    off = (inputs[5] == 0).all(0) if gate == "per example" else inputs[5] == 0
    ours = with_gradients(gated_ffn, inputs, NAMES[:5])
    for grad in (ours["w_in"], ours["b_in"], ours["w_out"].T):
        assert (grad[off] == 0).all() and (grad[~off] != 0).all()


@pytest.mark.parametrize("gate", GATES[1:])
def test_of_many_rows_on_cpu_neurons_that_are_off_are_left_out(gate: str) -> None:
    inputs = make(4, 400, 8, gate=gate)
    check(inputs, NAMES[:5])
    off = (inputs[5] == 0).all(0) if gate == "per example" else inputs[5] == 0
    inputs[1][off] = math.nan
    assert gated_ffn(*inputs).isfinite().all()
    with torch.no_grad():  # a gate that requires a gradient, of which none is recorded
        assert gated_ffn(*inputs[:5], inputs[5].requires_grad_()).isfinite().all()
    assert gated_ffn(*inputs).isnan().all()


@pytest.mark.parametrize("neurons", [1, 16, 37, 64])
@pytest.mark.parametrize("share_off", [0.0, 0.4, 1.0])
def test_products_get_even_sizes(device: str, neurons: int, share_off: float) -> None:
    inputs = make(3, 5, 8, neurons=neurons, off=share_off, device=device)
    active = ActiveNeurons(inputs[5])
    on = int((inputs[5] != 0).sum())
    assert len(active.indices) == len(active.gate) == -(-on // 16) * 16
    assert active.gate.count_nonzero() == on and active.neurons == neurons
    torch.testing.assert_close(gated_ffn(*inputs[:5], active), eager.gated_ffn(*inputs))


def test_the_number_of_threads_changes_nothing_but_pytorchs_products() -> None:
    x, w_in, b_in, w_out, b_out, gate = make(600, 64, neurons=300, out=64, dtype=torch.float32)
    active, before, swept = ActiveNeurons(gate), torch.get_num_threads(), []
    few_in, few_b, few_out = active.gather(w_in, b_in, w_out)
    h = torch.nn.functional.linear(x, few_in)
    try:
        for threads in (1, 2, 3, 4, 8):
            torch.set_num_threads(threads)
            a = bias_act_gate(h, few_b, active.gate, "gelu")
            grads = torch.ops.fastdistill.bias_act_gate_backward(h, h, few_b, active.gate, "gelu", True, True)
            swept.append([a, *grads])
            hidden = bias_act_gate(torch.nn.functional.linear(x, few_in), few_b, active.gate, "gelu")
            plain = torch.nn.functional.linear(hidden, few_out, b_out)
            assert torch.equal(gated_ffn(x, w_in, b_in, w_out, b_out, active), plain)
    finally:
        torch.set_num_threads(before)
    for again in swept[1:]:
        assert all(torch.equal(*pair) for pair in zip(again, swept[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_on_and_all_off(device: str, dtype: torch.dtype) -> None:
    for gate in GATES[1:]:
        inputs = make(3, 5, 8, gate=gate, off=0, dtype=dtype, device=device)
        check(inputs, NAMES[:5])
        check(inputs, NAMES[:5], function=by_active)
        inputs[5].zero_()
        check(inputs)
        check(inputs, NAMES[:5])
        check(inputs, NAMES[:5], function=by_active)


def test_off_for_some_examples_is_computed(device: str) -> None:
    inputs = make(3, 5, 8, gate="per example", off=0, device=device)
    inputs[5][1, :20] = 0
    check(inputs, NAMES[:5], function=by_active)
    check(inputs, NAMES[:5])
    check(inputs)


@pytest.mark.parametrize("function", [gated_ffn, by_active])
@pytest.mark.parametrize("gate", GATES[1:])
def test_nothing_goes_stale(device: str, function: Any, gate: str) -> None:
    """Weights and gates are seen as they are, however they were changed between calls."""
    inputs = make(4, 400, 8, gate=gate, dtype=torch.float32, device=device)
    weights = inputs[1:5]

    def compare() -> None:
        torch.testing.assert_close(function(*inputs), eager.gated_ffn(*inputs), rtol=1e-4, atol=1e-5)

    compare()
    optimizer = torch.optim.AdamW([w.requires_grad_() for w in weights], lr=0.1, weight_decay=0.0, fused=True)
    function(*inputs).square().sum().backward()  # changes tensors uncounted
    optimizer.step()
    for w in weights:
        w.requires_grad_(False)
    compare()
    inputs[1].data.mul_(2)
    compare()
    inputs[1].data = inputs[1].data * 3
    compare()
    inputs[3].detach().mul_(2), inputs[2].detach().add_(1)
    compare()
    if device == "cpu":
        inputs[1].numpy()[:] *= 2
        inputs[5].numpy()[..., :9] = 0
        compare()
    inputs[5].data.neg_()
    compare()
    with torch.inference_mode():
        inputs[5][..., 9:12] = 0
        compare()
    compare()


def test_active_neurons_are_a_copy(device: str) -> None:
    inputs = make(3, 5, 8, device=device)
    active, expected = ActiveNeurons(inputs[5]), eager.gated_ffn(*inputs)
    inputs[5].zero_()
    torch.testing.assert_close(gated_ffn(*inputs[:5], active), expected)
    torch.testing.assert_close(gated_ffn(*inputs[:5], copy.deepcopy(active)), expected)


@pytest.mark.parametrize("fused", [False, True])
def test_training_with_a_fixed_mask(device: str, fused: bool) -> None:
    ours, theirs = ([None if x is None else x.clone() for x in make(3, 5, 8, device=device)] for _ in range(2))
    active = ActiveNeurons(ours[5])
    off = ours[5] == 0
    for function, inputs in ((eager.gated_ffn, theirs), (gated_ffn, [*ours[:5], active])):
        parameters = [x.requires_grad_() for x in inputs[1:5]]
        optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.0, fused=fused)
        for _ in range(3):
            function(*inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        torch.testing.assert_close(gated_ffn(*ours[:5], active), eager.gated_ffn(*theirs))
    assert torch.equal(ours[1][off], make(3, 5, 8, device=device)[1][off])  # gradient 0: not moved


def test_found_in_inference_mode_and_used_outside(device: str) -> None:
    inputs = make(3, 5, 8, device=device)
    with torch.inference_mode():
        active = ActiveNeurons(inputs[5].clone())
        torch.testing.assert_close(gated_ffn(*inputs[:5], active), eager.gated_ffn(*inputs))
    expected = with_gradients(eager.gated_ffn, inputs, NAMES[:5])
    ours = with_gradients(lambda *args: gated_ffn(*args[:5], active), inputs, NAMES[:5])
    for what, value in expected.items():
        torch.testing.assert_close(ours[what], value)
