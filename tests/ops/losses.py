"""Logits and labels, and losses of them against eager PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastdistill
from tests import eager
from tests.accuracy import assert_accurate

DIVERGENCES = ("forward_kl", "soft_ce", "reverse_kl")
REDUCTIONS = ("mean", "sum", "none")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def make(
    *shape: int, device: str = "cpu", dtypes: tuple = (torch.float64,) * 2, scale: float = 3.0, seed: int = 0
) -> tuple:
    """Student logits, teacher logits, labels of which about a tenth is ignored."""
    g = torch.Generator().manual_seed(seed)
    student, teacher = (
        (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(device, d).requires_grad_() for d in dtypes
    )
    labels = torch.randint(shape[-1], shape[:-1], generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.1] = -100
    return student, teacher, labels.to(device)


def with_gradients(function: Any, student: Tensor, teacher: Tensor, labels: Tensor | None, **options: Any) -> tuple:
    loss = function(student, teacher, labels, **options)
    upstream = torch.linspace(0.5, 2, max(loss.numel(), 1), dtype=torch.float64)[: loss.numel()].view(loss.shape)
    grads = torch.autograd.grad(loss, (student, teacher), upstream.to(loss), allow_unused=True)
    return loss, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, (student, teacher), strict=True))


def check_against_eager(
    student: Tensor, teacher: Tensor, labels: Tensor | None, loss: str = "kd_ce_loss", **options: Any
) -> None:
    function, in_pytorch = getattr(fastdistill, loss), getattr(eager, loss)
    exact_inputs = [x.detach().double().requires_grad_() for x in (student, teacher)]
    same_dtype = [x.detach().clone().requires_grad_() for x in (student, teacher)]
    ours = with_gradients(function, student, teacher, labels, **options)
    exact = with_gradients(in_pytorch, *exact_inputs, labels, **options)
    plain = with_gradients(in_pytorch, *same_dtype, labels, **options)
    for what, *values in zip(("loss", "student gradient", "teacher gradient"), ours, exact, plain, strict=True):
        assert_accurate(*values, what=what)
