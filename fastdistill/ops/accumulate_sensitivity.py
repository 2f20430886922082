"""The sensitivity of single weights, summed over batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastdistill.ops import reference
from fastdistill.ops.checks import FLOATING, check_same_device, check_tensor
from fastdistill.ops.library import define
from fastdistill.ops.native import NATIVE

TOTALS = (torch.float32, torch.float64)


def accumulate_sensitivity_(
    totals: Sequence[Tensor], grads: Sequence[Tensor | None], weights: Sequence[Tensor] | None = None
) -> None:
    r"""Add every weight's sensitivity to its running total, in place, for many tensors in one call.

    .. math::
        \mathrm{totals}_i \mathrel{+}= |\mathrm{grads}_i \cdot \mathrm{weights}_i|

    For a gate of 1 on every single weight, :math:`w\,\partial L / \partial w` is the gate's gradient: the sensitivity
    of STARK (Yang et al. 2022, section 3.2) in its unstructured form (section 4.4), and to first order what removing
    the weight changes the loss by (Molchanov et al. 2017).

    Args:
        totals: tensors of any shapes, float32 or float64. (In 16 bits a growing sum soon stops changing.)
        grads: ``grads[i]`` of the shape of ``totals[i]``; float32, float64, bfloat16 or float16. None, like the
            ``grad`` of a parameter that no backward has reached, adds nothing to its total.
        weights: as ``grads``, but never None; of any of those dtypes, as float32 weights with bfloat16 gradients.
            Without this argument, :math:`|\mathrm{grads}_i|` is added.

    All tensors are on one device. An index is computed in float64 if any of its tensors is float64, else in float32.
    Nothing is recorded for autograd, so gradients and weights may require a gradient.

    Where the tensors of an index are dense and have the same strides (also transposed or channels-last), each is read
    once and nothing is allocated. Others are copied first.

    Raises:
        TypeError: an argument that is not a list or tuple of tensors, or a dtype not named above.
        ValueError: lists of different lengths; shapes or devices that differ; a tensor that is not strided; a total
            that requires a gradient, has strides by which its elements overlap (as after ``expand`` or ``unfold``), or
            begins in memory where another total, a gradient or a weight does. Totals must not overlap other tensors in
            any other way either: that goes unnoticed, and leaves the order of the additions open. Under torch.compile
            no overlap is noticed.
        NotImplementedError: called within torch.vmap or another transform of torch.func.
    """
    compiled = None
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                "accumulate_sensitivity_ writes in place, which torch.func's transforms (vmap, grad, ...) cannot "
                "follow; expected a call outside them"
            )
        compiled = NATIVE.cpu
    if compiled is not None and compiled.try_accumulate_sensitivity_(totals, grads, weights):
        return  # every check below was made, in a hundredth of the time
    columns: dict[str, Sequence[Tensor | None]] = {"totals": totals, "grads": grads}
    if weights is not None:
        columns["weights"] = weights
    for name, column in columns.items():
        if not isinstance(column, list | tuple):
            raise TypeError(f"{name} is a {type(column).__name__}; expected a list or tuple of tensors")
        if len(column) != len(totals):
            raise ValueError(f"{name} has length {len(column)}, totals {len(totals)}; expected the same length")
        _check_column(name, column, totals)
    _check_written(totals)
    if not torch.compiler.is_compiling():  # tracing knows no addresses
        _check_memory(columns)

    kept = [i for i, grad in enumerate(grads) if grad is not None]
    if len(kept) < len(grads):
        totals, grads = [totals[i] for i in kept], [grads[i] for i in kept]
        weights = None if weights is None else [weights[i] for i in kept]
    with torch.no_grad():
        _op(totals, grads, weights)
    torch.autograd.graph.increment_version(totals)


def _check_column(name: str, column: Sequence[Tensor | None], totals: Sequence[Tensor]) -> None:
    """Each tensor against the total of its index."""
    dtypes, strided = TOTALS if name == "totals" else FLOATING, torch.strided
    device = totals[0].device if totals and isinstance(totals[0], Tensor) else None
    for i, (tensor, total) in enumerate(zip(column, totals, strict=True)):
        if tensor is None and name == "grads":
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes or tensor.is_nested:
            return check_tensor(f"{name}[{i}]", tensor, dtypes)
        if tensor is not total and tensor.shape != total.shape:
            raise ValueError(
                f"{name}[{i}] has shape {tuple(tensor.shape)}, totals[{i}] {tuple(total.shape)}; expected the same"
            )
        if tensor.device != device:
            check_same_device(f"{name}[{i}]", tensor, "totals[0]", totals[0])
        if tensor.layout is not strided:
            raise ValueError(f"{name}[{i}] has layout {tensor.layout}; expected torch.strided (see Tensor.to_dense)")


def _check_written(totals: Sequence[Tensor]) -> None:
    for i, total in enumerate(totals):
        if total.requires_grad:
            raise ValueError(f"totals[{i}] requires a gradient; expected a running sum, as of torch.zeros_like")
        if not total.is_contiguous() and _may_overlap(total):
            raise ValueError(
                f"totals[{i}] has strides {total.stride()} for shape {tuple(total.shape)}; "
                "expected every element in memory of its own (see Tensor.clone)"
            )


def _may_overlap(x: Tensor) -> bool:
    """Whether a dimension's step is no longer than all that the dimensions of shorter steps span."""
    span = 0
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride <= span:
            return True
        span += stride * (size - 1)
    return False


def _check_memory(columns: Mapping[str, Sequence[Tensor | None]]) -> None:
    addresses = {
        name: [0 if tensor is None else tensor.data_ptr() for tensor in column] for name, column in columns.items()
    }
    written: dict[int, int] = {}
    for i, address in enumerate(addresses["totals"]):
        if address != 0:  # an empty tensor
            written.setdefault(address, i)
    for name, column in addresses.items():
        for i, address in enumerate(column):
            if address in written and (name, i) != ("totals", written[address]):
                raise ValueError(
                    f"totals[{written[address]}] and {name}[{i}] are in the same memory; "
                    "expected totals with memory of their own"
                )


_op = define(
    "accumulate_sensitivity_(Tensor(a!)[] totals, Tensor[] grads, Tensor[]? weights) -> ()",
    reference.accumulate_sensitivity_,
    lambda totals, grads, weights: None,
)
if NATIVE.cpu is not None and NATIVE.cuda:
    NATIVE.cpu.serve_accumulate_sensitivity_on_cuda()
