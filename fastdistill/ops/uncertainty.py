"""How uncertain a prediction is."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastdistill.ops import reference
from fastdistill.ops.checks import FLOATING, check_choice, check_tensor
from fastdistill.ops.library import define, define_autograd

Kind = Literal["entropy", "least_confidence", "margin"]
KINDS = ("entropy", "least_confidence", "margin")


def uncertainty(logits: Tensor, kind: Kind = "entropy", normalize: bool = True) -> Tensor:
    r"""How far from certain each row's prediction :math:`p = \mathrm{softmax}(z)` is; larger is less certain.

    With :math:`p_{(1)} \geq p_{(2)}` the two largest probabilities,

    * ``"entropy"``: :math:`H(p) = -\sum_c p_c \log p_c` (DeKD, equations 4 and 5);
    * ``"least_confidence"``: :math:`1 - p_{(1)}`;
    * ``"margin"``: :math:`1 - (p_{(1)} - p_{(2)})`. (DeKD prints the margin itself, which is small where a
      prediction is uncertain.)

    Close to certainty the value is as precise as elsewhere: nothing is subtracted from 1 to compute it.

    Args:
        logits: ``[..., C]`` with C >= 2; float32, float64, bfloat16 or float16. A logit of -inf is a probability of 0.
        kind: as above.
        normalize: divide by the largest value there is, that of equal probabilities: :math:`\log C`,
            :math:`1 - 1/C` and, for ``"margin"``, 1, so that this kind has the same value either way.

    Returns:
        ``[...]``, float64 for float64 logits, else float32. NaN for a row with NaN or +inf in it or nothing but -inf,
        whose probabilities are NaN.

    Differentiable once, by an exact gradient computed from the logits in the backward; the forward keeps nothing else.
    Where logits are equal, the one of the lower index counts as the larger: so goes the gradient of
    ``"least_confidence"`` and ``"margin"``, which have a kink there. The derivatives of torch.func (grad, vjp, jvp,
    ...) are not supported, nor is forward mode; torch.vmap calls it once for each example of its batch.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: fewer than two classes, or a kind not named above.
    """
    _check("logits", logits, kind, normalize)
    value: Tensor = score(logits, kind, normalize)
    return value


def hidden_entropy(hidden_states: Tensor, normalize: bool = True) -> Tensor:
    r"""The mean entropy of each layer's hidden states, of all layers at once; by it DeKD chooses a teacher's layers.

    .. math::
        R_l = \frac{1}{B} \sum_b H\big(\mathrm{softmax}(h_{l,b})\big)

    Args:
        hidden_states: ``[L, B, d]``, of L layers on B examples (say, of the first token), d >= 2; dtypes as in
            :func:`uncertainty`.
        normalize: divide by log d, so that 1 is the most there is. (DeKD, equation 8, divides by the log of the number
            of labels; neither changes the order of layers.)

    Returns:
        ``[L]``, float64 for float64 states, else float32. NaN for a layer where an example is. Differentiable as
        :func:`uncertainty` is.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: another shape, or no examples.
    """
    _check("hidden_states", hidden_states, "entropy", normalize)
    if hidden_states.dim() != 3 or hidden_states.shape[1] == 0:
        raise ValueError(
            f"hidden_states has shape {tuple(hidden_states.shape)}; expected [layers, examples, width] "
            "with at least one example"
        )
    mean: Tensor = score(hidden_states, "entropy", normalize).mean(-1)
    return mean


def _check(name: str, logits: Tensor, kind: str, normalize: bool) -> None:
    check_logits(name, logits)
    check_choice("kind", kind, KINDS)
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize is {normalize!r}; expected a bool")


def check_logits(name: str, logits: Tensor) -> None:
    check_tensor(name, logits, FLOATING)
    if logits.dim() == 0 or logits.shape[-1] < 2:
        raise ValueError(f"{name} has shape {tuple(logits.shape)}; expected a last dimension of at least 2")


score = define(
    "uncertainty(Tensor logits, str kind, bool normalize) -> Tensor",
    reference.uncertainty,
    lambda logits, kind, normalize: logits.new_empty(logits.shape[:-1], dtype=reference.accumulation_dtype(logits)),
)
_backward_op = define(
    "uncertainty_backward(Tensor grad_output, Tensor logits, str kind, bool normalize) -> Tensor",
    reference.uncertainty_backward,
    lambda grad_output, logits, kind, normalize: torch.empty_like(logits, memory_format=torch.contiguous_format),
)


def _setup_context(ctx: Any, inputs: tuple[Tensor, str, bool], output: Tensor) -> None:
    logits, ctx.kind, ctx.normalize = inputs
    ctx.save_for_backward(logits)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
    if torch.is_grad_enabled():
        raise RuntimeError("uncertainty cannot be differentiated twice (create_graph=True)")
    return _backward_op(grad_output, ctx.saved_tensors[0], ctx.kind, ctx.normalize), None, None


define_autograd("uncertainty", _backward, _setup_context)
