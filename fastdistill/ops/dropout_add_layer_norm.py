"""What ends each half of a post-norm transformer layer: dropout, the residual connection and layer normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill.ops import reference
from fastdistill.ops.checks import (
    FLOATING,
    NUMBERS,
    autocast_dtype,
    check_number,
    check_same_device,
    check_tensor,
    is_floating,
)
from fastdistill.ops.library import define, define_autograd


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
) -> Tensor:
    r"""``layer_norm(residual + dropout(x))`` over the last dimension, in one pass each way.

    .. math::
        h = r + m \odot x / (1 - p), \qquad
        y = \frac{h - \mathrm{E}[h]}{\sqrt{\mathrm{Var}[h] + \epsilon}} \odot w + b

    as :func:`torch.nn.functional.dropout` and :func:`torch.nn.functional.layer_norm` (Ba et al. 2016) compute it, where
    each of m is 0 with probability p, else 1. Neither m nor h is kept: the backward pass computes them anew from x,
    residual and a seed.

    Args:
        x, residual: ``[..., D]``, of one shape, each in one of float32, float64, bfloat16 or float16.
        weight: ``[D]``, of any of these dtypes. Or ``[N, D]``, of N models that are computed as one: each is for an
            N-th of the rows, the first for the first.
        bias: of the weight's shape and dtype; None: zeros.
        dropout_p: probability of leaving out an element of x, in [0, 1); the others are divided by 1 - dropout_p.
            Always applied: pass 0 in evaluation. Drawn by PyTorch's generator of the device.
        eps: :math:`\epsilon`, more than 0.

    Returns:
        ``[..., D]``, contiguous, in the dtype that x, residual and weight promote to, and under autocast at
        least float32, as from `layer_norm` on CUDA. Computed in float32 (float64 if any has it) and rounded once.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, different devices, a number out of its range.

    Differentiable once, and not by torch.func.
    """
    if not (is_floating(x) and is_floating(residual) and is_floating(weight) and (bias is None or is_floating(bias))):
        _explain_tensors(x, residual, weight, bias)
    if not (
        x.shape == residual.shape
        and x.dim() > 0
        and x.shape[-1] > 0
        and (weight.shape == x.shape[-1:] or _is_of_parts(weight, x))
        and x.device == residual.device == weight.device
        and (bias is None or (bias.shape == weight.shape and bias.dtype is weight.dtype and bias.device == x.device))
    ):
        _explain_shapes(x, residual, weight, bias)
    if not (type(dropout_p) in NUMBERS and 0 <= dropout_p < 1 and type(eps) in NUMBERS and 0 < eps < 1):
        check_number("dropout_p", dropout_p, minimum=0, below=1)
        check_number("eps", eps, above=0, below=1)
    if weight.dtype in (torch.bfloat16, torch.float16) and autocast_dtype(x.device) is not None:
        weight, bias = weight.float(), None if bias is None else bias.float()
    # drawn here, so that the op is a function: it can be compiled, and run again
    seed = torch.randint(2**63 - 1, (), device=x.device) if dropout_p > 0 else None
    output: Tensor = _op(x, residual, weight, bias, seed, dropout_p, eps)[0]
    return output


def _explain_tensors(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, value in (("x", x), ("residual", residual), ("weight", weight), ("bias", bias)):
        if value is not None or name != "bias":
            check_tensor(name, value, FLOATING)


def _explain_shapes(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [..., D] with D of at least 1")
    if residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; expected {tuple(x.shape)}, that of x")
    if weight.shape != x.shape[-1:] and not _is_of_parts(weight, x):
        size, rows = x.shape[-1], x.numel() // x.shape[-1]
        expected = f"({size},), or (N, {size}) with N that divides {rows} rows"
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected {expected}")
    if bias is not None and bias.shape != weight.shape:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected {tuple(weight.shape)}, that of weight")
    for name, value in (("residual", residual), ("weight", weight), ("bias", bias)):
        if value is not None:
            check_same_device(name, value, "x", x)
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(f"bias has dtype {bias.dtype}, weight {weight.dtype}; expected the same")


def _is_of_parts(weight: Tensor, x: Tensor) -> bool:
    """Whether it is ``[N, D]``, with as many rows for each of the N."""
    is_one_each = weight.dim() == 2 and len(weight) > 0 and weight.shape[1] == x.shape[-1]
    return is_one_each and x.numel() % weight.numel() == 0


def _contiguous(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format, dtype=dtype)


def _fake(x: Tensor, residual: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    to = reference.promoted_dtype(x, residual, weight)
    wide = reference.accumulation_dtype(x, residual, weight)
    return _contiguous(x, to), x.new_empty(x.shape[:-1], dtype=wide), x.new_empty(x.shape[:-1], dtype=wide)


def _fake_backward(
    grad_output: Tensor, x: Tensor, residual: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, seed, _, want_weight = args
    is_own = seed is not None or x.dtype != residual.dtype
    return (
        _contiguous(x) if is_own else x.new_empty(0),
        _contiguous(residual),
        weight.new_empty(weight.shape if want_weight else 0),
        weight.new_empty(weight.shape if want_weight else 0),
    )


# `mean` and `rstd` are of each row, `[...]`. The gradient to x is empty where it is that to residual: without dropout,
# in one dtype.
_op = define(
    "dropout_add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, Tensor? seed, float dropout_p, "
    "float eps) -> (Tensor output, Tensor mean, Tensor rstd)",
    reference.dropout_add_layer_norm,
    _fake,
    triton="dropout_add_layer_norm",
)
_backward_op = define(
    "dropout_add_layer_norm_backward(Tensor grad_output, Tensor x, Tensor residual, Tensor weight, Tensor mean, "
    "Tensor rstd, Tensor? seed, float dropout_p, bool want_weight) "
    "-> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    reference.dropout_add_layer_norm_backward,
    _fake_backward,
    triton="dropout_add_layer_norm",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    x, residual, weight, _, seed, ctx.dropout_p, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, residual, weight, mean, rstd, seed)


def _backward(ctx: Any, grad_output: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("dropout_add_layer_norm cannot be differentiated twice (create_graph=True)")
    if grad_output is None:
        return (None,) * 7
    _, _, want_weight, want_bias, *_ = ctx.needs_input_grad
    x, residual = ctx.saved_tensors[:2]
    of_x, of_residual, of_weight, of_bias = _backward_op(
        grad_output, *ctx.saved_tensors, ctx.dropout_p, want_weight or want_bias
    )
    if ctx.saved_tensors[-1] is None and x.dtype == residual.dtype:
        of_x = of_residual
    return of_x, of_residual, of_weight if want_weight else None, of_bias if want_bias else None, None, None, None


define_autograd("dropout_add_layer_norm", _backward, _setup_context)
