"""The operator library: every op's schema, its reference implementation, and who serves it on each device."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastdistill.ops.native import NATIVE

LIBRARY = torch.library.Library("fastdistill", "DEF")

OPS: list[str] = []

# op -> name of the module in fastdistill.kernels that serves it on CUDA
TRITON: dict[str, str] = {}


def triton_available() -> bool:
    """Whether Triton kernels can serve CUDA tensors in this process."""
    return torch.version.cuda is not None and importlib.util.find_spec("triton") is not None


def define(
    schema: str, reference: Callable[..., Any], fake: Callable[..., Any], *, triton: str | None = None
) -> Callable[..., Any]:
    """Define ``fastdistill::<schema>``: ``reference`` on every device, ``fake`` for shapes, and on CUDA, by Triton,
    what csrc/triton launches or else the function of the same name in ``fastdistill.kernels.<triton>``. C++ kernels
    register themselves when they load."""
    name = schema[: schema.index("(")]
    OPS.append(name)
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastdistill::{name}", fake, lib=LIBRARY)
    if triton is not None and triton_available():
        TRITON[name] = triton
        if not has_kernel(name, "CUDA"):
            LIBRARY.impl(name, _on_first_call(name, triton), "CUDA")
    op: Callable[..., Any] = getattr(torch.ops.fastdistill, name).default
    return op if NATIVE.cpu else _refusing_tangents(name, op)


def _refusing_tangents(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
    """As csrc/autograd refuses them: autograd in Python would lose the tangents of forward mode."""

    def call(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            for x in args:
                if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
                    raise NotImplementedError(
                        f"{name} cannot be differentiated by torch.func (grad, vjp, jvp, ...); expected "
                        "torch.autograd.grad or Tensor.backward"
                    )
        return op(*args)

    return call


def define_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Autograd for ``fastdistill::<name>``, unless csrc/autograd has already registered the same in C++."""
    if NATIVE.cpu is None:
        torch.library.register_autograd(f"fastdistill::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def _on_first_call(name: str, module: str) -> Callable[..., Any]:
    """Triton costs a third of a second to import: only who launches a kernel pays it."""
    kernel: Callable[..., Any] | None = None

    def launch(*args: Any) -> Any:
        nonlocal kernel
        if kernel is None:
            kernel = getattr(importlib.import_module(f"fastdistill.kernels.{module}"), name)
        return kernel(*args)

    return launch


def has_kernel(op: str, key: str) -> bool:
    """Whether a kernel of the op's own is registered for a dispatch key, beside the reference."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastdistill::{op}", key)


# Triton kernels that csrc/triton launches -----------------------------------------------------------------------------

_COMPILED: list[Any] = []
"""What Triton has compiled, which must not be unloaded."""


def _launch_triton(module: str, kernel: str, *launch: Any) -> list[int]:
    """Launch a kernel of ``fastdistill.kernels.<module>`` and return how to launch it again: the driver's function,
    threads, bytes of shared memory, and rows that a program takes. Nothing where kernels are interpreted."""
    compiled, rows = importlib.import_module(f"fastdistill.kernels.{module}").launch(kernel, *launch)
    if compiled is None:
        return []
    _COMPILED.append(compiled)
    return [compiled.function, compiled.metadata.num_warps * 32, compiled.metadata.shared, rows]


if importlib.util.find_spec("triton") is not None:
    LIBRARY.define(
        "launch_triton(str module, str kernel, Tensor[] tensors, int[] strides, int[] sizes, float[] numbers, "
        "int[] options, int rows, int pairs) -> int[]"
    )
    LIBRARY.impl("launch_triton", _launch_triton, "CompositeExplicitAutograd")


def followed() -> bool:
    """Whether what is computed is written down, to be computed with other values."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
