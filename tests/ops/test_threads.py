"""However many threads share an op's work, its answer is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fastdistill


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output.sum(), leaves)]


def loss(student: Tensor, teacher: Tensor) -> Tensor:
    return fastdistill.kd_ce_loss(student, teacher, torch.arange(5000) % 70, reduction="none")


def decoupled(student: Tensor, teacher: Tensor) -> Tensor:
    return fastdistill.dkd_loss(student, teacher, torch.arange(5000) % 70, reduction="none")


def accumulate(grad: Tensor) -> list[Tensor]:
    total = torch.zeros_like(grad)
    fastdistill.accumulate_sensitivity_([total], [grad], [draw(*grad.shape)])
    return [total]


CALLS: dict[str, Callable[[], list[Tensor]]] = {
    "kd_ce_loss": lambda: with_gradients(loss, draw(5000, 70), draw(5000, 70).flip(0)),
    "dkd_loss": lambda: with_gradients(decoupled, draw(5000, 70), draw(5000, 70).flip(0)),
    "uncertainty": lambda: with_gradients(fastdistill.uncertainty, draw(5000, 70)),
    "select_uncertain": lambda: [fastdistill.select_uncertain(draw(5000, 70), 0.3)],
    "gated_attention": lambda: with_gradients(fastdistill.gated_attention, *[draw(4, 6, 70, 32)] * 3, draw(4, 6)),
    "proximity_conv": lambda: with_gradients(
        fastdistill.proximity_conv, draw(60, 40, 64), draw(60, 40), draw(96, 64, 3), draw(96)
    ),
    "accumulate_sensitivity_": lambda: accumulate(draw(700, 501)),
}  # of gated_ffn: in its own file


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", CALLS)
def test_threads_change_nothing(op: str, one_thread: None) -> None:
    expected = CALLS[op]()
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        for ours, theirs in zip(CALLS[op](), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
