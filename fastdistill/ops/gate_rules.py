"""What gates on a model's heads and neurons are computed by, by what was measured."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.ops.checks import FLOATING
from fastdistill.ops.gated_ffn import GATHER_ROWS
from fastdistill.ops.library import TRITON, has_kernel
from fastdistill.ops.native import NATIVE

GATHER_ROWS_CUDA = 2**14
"""docs/gpu.md: of 4,096 rows by 768×3072 gathering half the weights costs the host more than it saves the GPU (.86 to
1.11 ms against .56 to .86 for all of them), of 32,768 by 1024×4096 it saves half (1.63 ms of 3.10)."""


SMALL_HEAD = 2**12
"""Elements of a head's query: 128 tokens, 32 wide."""

HEADS_BY_KERNEL = ("cpu", "cuda")
"""Devices on which `heads_by_kernel` may be so."""


def neurons_by_kernel(h: Tensor) -> bool:
    """Whether activation and gates are one sweep, `bias_act_gate`, and not an activation and a multiplication.

    On CPU, layers 384 wide, batches of 32, least of several alternated: forward and backward with gates by example take
    .95 (16 tokens), .89 to .95 (32) and .97 (64) of the time with multiplications, without gradients .92, .95 and 1.06;
    `score` .96, .95 and .96 of what it takes to multiply values and gradients afterwards, where the same sums made in
    the backward pass without a kernel take .99, .96 and .98. On an H100 (docs/gpu.md) the sweep and its gradient take
    the host 124 µs, PyTorch's operations 224.
    """
    if h.dtype not in FLOATING:
        return False
    return NATIVE.cpu is not None if h.is_cpu else h.is_cuda and (NATIVE.cuda or "bias_act_gate" in TRITON)


def heads_by_kernel(query: Tensor) -> bool:
    """Whether PyTorch's attention and a multiplication give way to `gated_attention`.

    On CPU not in float32, where `score` of MiniLM takes as long (.98 to 1.02 of the time, batches of 32, 8 to 64
    tokens), but in 16 bits, where a head is small (`SMALL_HEAD`): under bfloat16 autocast `score` takes .76 of the time
    for SST-2's lengths, .84 and .90 for 64 and 128 tokens of heads 32 wide, .95 for 64 of 64 wide; 1.22 for 256. On an
    H100 in bfloat16 (docs/gpu.md) 32×12×128×64 with gates by example takes 239 µs in place of 798, and 64×12×512×64 as
    long as cuDNN's and a multiplication; wider heads and longer texts take longer, and float32 was not measured.
    """
    if query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if query.is_cpu:
        return query.shape[-2] <= short_keys() and query.shape[-2] * query.shape[-1] <= SMALL_HEAD
    return query.is_cuda and "gated_attention" in TRITON and query.shape[-1] <= 64 and query.shape[-2] <= 512


def attention_by_pytorch(query: Tensor, keys: int, dropout_p: float) -> bool:
    """Whether attention without gates gives way to PyTorch's: with dropout on CPU of longer sequences than the kernel
    there takes, whose weights are then in memory, and drawn again in the backward pass (AVX2, 32×12×128×32, forward and
    backward: 173 ms in place of 84; with a kernel, AVX-512, 86 in place of 133, and of 25 tokens 9.4 of 13.5)."""
    return dropout_p > 0 and query.is_cpu and keys > short_keys()


def short_keys() -> int:
    """Up to so many keys attention on CPU is this package's own kernel; 0 where there is none."""
    return 0 if NATIVE.cpu is None else int(NATIVE.cpu.short_keys)


def worth_leaving_out(rows: int, units: int, kept: int, device: torch.device) -> bool:
    """Whether it pays to gather the weights of the units that are not closed.

    Half of a layer masked takes 1.03 to 1.07 of the time of the pruned one on CPU (16 to 64 tokens), multiplications by
    gates 1.83 to 1.93. On a GPU: `GATHER_ROWS_CUDA`.
    """
    if device.type == "cuda":
        return rows >= GATHER_ROWS_CUDA and kept < units
    return rows * (units - kept) > GATHER_ROWS * kept


def gates_run_on() -> str:
    """For `fastdistill.doctor`, in one line."""
    neurons = "the activation's sweep (bias_act_gate)" if has_kernel("bias_act_gate", "CPU") else "multiplications"
    heads = "PyTorch's attention"
    if short_keys():
        heads += f" (in 16 bits by gated_attention, up to {SMALL_HEAD} elements of a head's query)"
    return (
        f"gate and score: on CPU neurons by {neurons}, heads by {heads}, and closed units left out of products; "
        f"training there by gated_attention up to {short_keys()} tokens; "
        "on CUDA both by kernels, heads of up to 64 channels and 512 tokens in 16 bits, and closed units left out from "
        "16,384 rows (docs/gpu.md)"
    )
