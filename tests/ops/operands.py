"""Arguments for every operator, in any layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OPS = torch.ops.fastdistill
LABELS = torch.tensor([[0, 1, -100], [2, 3, 4]])
Calls = list[tuple[Any, ...]]


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


@dataclass(frozen=True)
class Drawn:
    """Tensors of one layout; of those that can have a gradient, the leaves, all want one, or none."""

    layout: str
    grad: bool

    def leaf(self, *shape: int) -> Tensor:
        return self.plain(*shape).requires_grad_(self.grad)

    def plain(self, *shape: int) -> Tensor:
        return draw(*shape, layout=self.layout)


def detached(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)


def kd_ce_loss(of: Drawn) -> Calls:
    wanted = (of.grad, of.grad)
    few = (of.leaf(2, 3, 5), of.leaf(2, 3, 5), LABELS, 2.0, 1.0, 0.5, "reverse_kl", True, -100, 0.1, "mean", *wanted)
    many = (of.leaf(6, 70), of.leaf(6, 70), None, 2.0, 1.0, 0.0, "forward_kl", True, -100, 0.0, "none", *wanted)
    return [few, (*few, True), many]


def dkd_loss(of: Drawn) -> Calls:
    wanted = (of.grad, of.grad)
    options = (2.0, 0.7, 3.0, 0.5, "reverse_kl", True, -100, 0.1, "mean", *wanted)
    few = (of.leaf(2, 3, 5), of.leaf(2, 3, 5), LABELS, *options)
    options = (2.0, 1.0, 8.0, 0.0, "forward_kl", True, -100, 0.0, "none", *wanted)
    many = (of.leaf(6, 70), of.leaf(6, 70), LABELS.view(6), *options)
    return [few, (*few, True), many, (*many, True)]


def scale_rows(of: Drawn) -> Calls:
    return [(of.plain(5, 7), torch.tensor(2.0)), (of.plain(5, 7), draw(5))]


def scale_rows_(of: Drawn) -> Calls:
    return [] if of.layout == "expanded" else scale_rows(of)  # what is expanded cannot be written to


def gated_attention(of: Drawn) -> Calls:
    mask = torch.arange(20) < torch.tensor([20, 7])[:, None, None, None]
    found = []
    for heads, groups, gate in ((3, 3, None), (3, 3, of.leaf(3)), (3, 3, of.leaf(2, 3)), (4, 2, of.leaf(4))):
        options = (mask if of.grad else None, None, 0.0, False, 0.3, of.grad and gate is not None)
        found.append((of.leaf(2, heads, 9, 8), of.leaf(2, groups, 20, 8), of.leaf(2, groups, 20, 8), gate, *options))
    return found


def gated_attention_backward(of: Drawn) -> Calls:
    found = []
    for args in map(detached, gated_attention(of)):
        output, ungated, logsumexp = OPS.gated_attention(*args)
        found.append((of.plain(*output.shape), *args[:6], ungated if args[-1] else output, logsumexp, *args[6:]))
    return found


def bias_act_gate(of: Drawn) -> Calls:
    return [
        (of.leaf(4, 3, 20), of.leaf(20), of.leaf(20), "gelu"),
        (of.leaf(4, 3, 20), of.leaf(20), of.leaf(4, 20), "silu"),
        (of.leaf(4, 20), None, None, "relu"),
    ]


def bias_act_gate_backward(of: Drawn) -> Calls:
    return [
        (of.plain(4, 3, 20), of.plain(4, 3, 20), of.plain(20), of.plain(20), "gelu", of.grad, of.grad),
        (of.plain(4, 3, 20), of.plain(4, 3, 20), of.plain(20), of.plain(4, 20), "gelu_tanh", of.grad, of.grad),
        (of.plain(4, 20), of.plain(4, 20), None, None, "relu", False, False),
    ]


def dropout_add_layer_norm(of: Drawn) -> Calls:
    return [
        (of.leaf(4, 3, 20), of.leaf(4, 3, 20), weight, bias, seed, 0.0 if seed is None else 0.3, 1e-5)
        for weight, bias, seed in (
            (of.leaf(20), of.leaf(20), None),
            (of.leaf(20), None, torch.tensor(5)),
            (of.leaf(2, 20), of.leaf(2, 20), None),
        )
    ]


def dropout_add_layer_norm_backward(of: Drawn) -> Calls:
    found = []
    for args in map(detached, dropout_add_layer_norm(of)):
        output, mean, rstd = OPS.dropout_add_layer_norm(*args)
        found.append((of.plain(*output.shape), *args[:3], mean, rstd, *args[4:6], of.grad))
    return found


def proximity_conv(of: Drawn) -> Calls:
    mask = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    return [
        (of.leaf(3, 7, 5), of.leaf(3, 7), of.leaf(6, 5, 3), bias, given)
        for bias, given in ((None, None), (of.leaf(6), mask))
    ]


def proximity_conv_backward(of: Drawn) -> Calls:
    found = []
    for args in map(detached, proximity_conv(of)):
        output, positions = OPS.proximity_conv(*args)
        *inputs, bias, mask = args
        found.append((output, *inputs, mask, positions, True, of.grad, of.grad, bias is not None))
    return found


def uncertainty(of: Drawn) -> Calls:
    return [(of.leaf(4, 3, 5), "entropy", True), (of.leaf(4, 70), "margin", False)]


def uncertainty_backward(of: Drawn) -> Calls:
    few = (draw(4, 3), of.plain(4, 3, 5), "entropy", True)
    return [few, (draw(4), of.plain(4, 70), "least_confidence", False)]


def select_uncertain(of: Drawn) -> Calls:
    return [(of.plain(4, 3, 5), 5, "entropy"), (of.plain(9, 70), 2, "margin")]


def accumulate_sensitivity_(of: Drawn) -> Calls:
    return [
        ([draw(4, 5), draw(3)], [of.plain(4, 5), of.plain(3)], [of.plain(4, 5), of.plain(3)]),
        ([draw(4, 5)], [of.plain(4, 5)], None),
    ]


OPERANDS: dict[str, Callable[[Drawn], Calls]] = {
    made.__name__: made
    for made in (
        kd_ce_loss, dkd_loss, scale_rows, scale_rows_, gated_attention, gated_attention_backward, bias_act_gate,
        bias_act_gate_backward, dropout_add_layer_norm, dropout_add_layer_norm_backward, proximity_conv,
        proximity_conv_backward, uncertainty, uncertainty_backward, select_uncertain, accumulate_sensitivity_,
    )
}  # fmt: skip
