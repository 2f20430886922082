"""Attention whose heads are gated, forward and backward, in Triton: flash attention (Dao 2023, algorithms 1 and 2).

A program has a block of queries (or, for the gradients to key and value, of keys) of one head of one example, and goes
over the other side a block at a time. Of a head whose gate is 0 a program reads the gate, writes zeros and leaves,
unless the gate needs a gradient; so nothing depends on the gates' values outside the device. The gates' gradient is the
total of the sums of upstream * output over channels, which a backward of attention computes in any case: each program
writes its share, and PyTorch adds them, always in the same order.

Scores are kept times UNIT: log2(e), for exp2, or 1 beside a floating mask, of which the least finite value is not to
become infinite. `row` and `column` number queries and keys and are two-dimensional, so that a tile may have queries
down and keys across, or the reverse; the backward to key and value does that, so that its weights are the left operand
of its products as they stand.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from fastdistill.kernels.kd_ce_loss import _multiple
from torch import Tensor

from fastdistill.ops import reference

LOG2_E = tl.constexpr(math.log2(math.e))
MAX_SIZE = 128  # of a head
MAX_KEYS = 64  # in a tile
ALIGNMENT = tl.constexpr(8)  # elements that one instruction copies, or two

# Queries and keys in a tile, warps, pipeline stages, registers a thread (None: ptxas chooses; it would rather spill a
# little than not fit one program more on a multiprocessor): for heads of up to 64 channels and for wider ones. About
# the largest that sm_80 and sm_90 hold in registers, and sm_86 in shared memory. Extras are dropout and a mask that is
# floating or has a row for each query.
TILES: dict[str, dict[str, tuple[tuple[int, int, int, int, int | None], ...]]] = {
    "forward": {
        "half": ((128, 64, 8, 3, None), (64, 64, 8, 2, 255)),
        "half with extras": ((64, 32, 4, 2, 255), (64, 32, 8, 2, 255)),
        "single": ((16, 32, 4, 2, 255), (16, 32, 4, 2, 255)),
    },
    "query": {
        "half": ((64, 64, 4, 2, None), (64, 32, 4, 2, None)),
        "half with extras": ((64, 32, 4, 2, 255), (64, 32, 4, 2, 255)),
        "single": ((16, 32, 4, 2, 255), (16, 16, 8, 2, 255)),
    },
    "key_value": {
        "half": ((32, 64, 4, 2, None), (64, 64, 8, 2, None)),
        "half with extras": ((16, 32, 4, 2, 255), (16, 32, 4, 2, 255)),
        "single": ((32, 16, 4, 2, 255), (16, 16, 8, 2, 255)),
    },
}


@triton.jit
def _at(pointer, example, head, example_stride, head_stride):
    """Where a head's rows are; all offsets in 64 bits, all strides multiples of ALIGNMENT."""
    return pointer + example * _multiple(example_stride, ALIGNMENT) + head * _multiple(head_stride, ALIGNMENT)


@triton.jit
def _elements(row, rows, stride, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Of a block of rows, [rows of the block, BLOCK_SIZE]: where they are, and which there are."""
    channel = tl.arange(0, BLOCK_SIZE)[None, :]
    exists = (row < rows)[:, None]
    if SIZE != BLOCK_SIZE:
        exists = exists & (channel < SIZE)
    return row.to(tl.int64)[:, None] * _multiple(stride, ALIGNMENT) + channel, exists


@triton.jit
def _load(pointer, row, rows, stride, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    offset, exists = _elements(row, rows, stride, SIZE, BLOCK_SIZE)
    return tl.load(pointer + offset, mask=exists, other=0)


@triton.jit
def _store(pointer, values, row, rows, stride, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    offset, exists = _elements(row, rows, stride, SIZE, BLOCK_SIZE)
    tl.store(pointer + offset, values.to(pointer.dtype.element_ty), mask=exists)


@triton.jit
def _masked(scores, row, column, mask_ptr, mask_row, mask_column, queries, keys, MASK: tl.constexpr,
            MASK_ROWS: tl.constexpr, CAUSAL: tl.constexpr, EVEN_KEYS: tl.constexpr):  # fmt: skip
    """The scores, -inf where a query may not attend to a key or there is no such key."""
    if MASK == "none":
        if not EVEN_KEYS:
            scores = tl.where(column < keys, scores, -float("inf"))
    else:
        pointers = mask_ptr + column.to(tl.int64) * mask_column
        exists = column < keys
        if MASK_ROWS:  # of whole tiles
            pointers = pointers + row.to(tl.int64) * mask_row
            exists = row < queries
        if MASK == "bool":
            scores = tl.where(tl.load(pointers, mask=exists, other=0) != 0, scores, -float("inf"))
        else:
            scores += tl.load(pointers, mask=exists, other=-float("inf")).to(tl.float32)
    if CAUSAL:
        scores = tl.where(row >= column, scores, -float("inf"))
    return scores


@triton.jit
def _exp(scores, UNIT: tl.constexpr):
    return tl.exp2(scores * (LOG2_E / UNIT))


@triton.jit
def _kept(row, column, head, seed, dropout_p):
    """Whether dropout keeps a weight: a function of its place and the seed alone."""
    zero = (row + column) * 0
    random, _, _, _ = tl.philox(seed, zero + column, zero + row, zero + head, zero)
    return tl.uint_to_uniform_float(random) >= dropout_p


@triton.jit
def _gate(gate_ptr, example, head, stride_example, stride_head, GATED: tl.constexpr):
    if GATED:
        return tl.load(gate_ptr + example * stride_example + head * stride_head).to(tl.float32)
    else:
        return 1.0


@triton.jit
def _forward_kernel(
    query_ptr, key_ptr, value_ptr,
    gate_ptr, mask_ptr, seed_ptr,  # not read unless GATED, MASK, DROPOUT
    output_ptr,
    ungated_ptr,  # like output; not written unless GATE_GRAD
    logsumexp_ptr,  # [B, H, queries], contiguous
    query_example, query_head, query_row,  # strides
    key_example, key_head, key_row,
    value_example, value_head, value_row,
    output_example, output_head, output_row,
    gate_example, gate_head,
    mask_example, mask_head, mask_row, mask_column,
    heads, queries, keys,
    scale,
    dropout_p,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    GATED: tl.constexpr, GATE_GRAD: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr, CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr, UNIT: tl.constexpr, EVEN_KEYS: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, QUERIES)
    block = tl.program_id(0) % blocks
    pair = tl.program_id(0) // blocks
    example, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    row = block * QUERIES + tl.arange(0, QUERIES)
    output_ptr = _at(output_ptr, example, head, output_example, output_head)
    logsumexp_ptr += pair.to(tl.int64) * queries + row
    gate = _gate(gate_ptr, example, head, gate_example, gate_head, GATED)
    if GATED and not GATE_GRAD:  # noqa: SIM102 (a branch of the compiler's)
        if gate == 0:
            nothing = tl.zeros([QUERIES, BLOCK_SIZE], tl.float32)
            _store(output_ptr, nothing, row, queries, output_row, SIZE, BLOCK_SIZE)
            tl.store(logsumexp_ptr, tl.zeros([QUERIES], tl.float32), mask=row < queries)
            return

    query_ptr = _at(query_ptr, example, head, query_example, query_head)
    key_ptr = _at(key_ptr, example, head, key_example, key_head)
    value_ptr = _at(value_ptr, example, head, value_example, value_head)
    mask_ptr += example * mask_example + head * mask_head
    query = _load(query_ptr, row, queries, query_row, SIZE, BLOCK_SIZE)
    largest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    output = tl.zeros([QUERIES, BLOCK_SIZE], tl.float32)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, (block + 1) * QUERIES)
    for start in range(0, end, KEYS):
        column = start + tl.arange(0, KEYS)
        key = _load(key_ptr, column, keys, key_row, SIZE, BLOCK_SIZE)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * UNIT)
        scores = _masked(scores, row[:, None], column[None, :], mask_ptr, mask_row, mask_column, queries, keys, MASK,
                         MASK_ROWS, CAUSAL, EVEN_KEYS)  # fmt: skip
        higher = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(higher == -float("inf"), 0, higher)  # nothing to attend to so far
        weights = _exp(scores - shift[:, None], UNIT)
        shrink = _exp(largest - shift, UNIT)
        largest = higher
        total = total * shrink + tl.sum(weights, 1)
        if DROPOUT:
            kept = _kept(row[:, None], column[None, :], pair, tl.load(seed_ptr), dropout_p)
            weights = tl.where(kept, weights, 0)
        value = _load(value_ptr, column, keys, value_row, SIZE, BLOCK_SIZE)
        output = tl.dot(weights.to(value.dtype), value, output * shrink[:, None], input_precision=PRECISION)

    empty = total == 0
    logsumexp = tl.where(empty, 0, largest / UNIT + tl.log(total))
    tl.store(logsumexp_ptr, logsumexp, mask=row < queries)
    output *= (1 / (tl.where(empty, 1, total) * (1 - dropout_p)))[:, None]
    if GATE_GRAD:
        ungated_ptr = _at(ungated_ptr, example, head, output_example, output_head)
        _store(ungated_ptr, output, row, queries, output_row, SIZE, BLOCK_SIZE)
    _store(output_ptr, output * gate, row, queries, output_row, SIZE, BLOCK_SIZE)


@triton.jit
def _dots_kernel(
    upstream_ptr,
    output_ptr,  # without gates where GATE_GRAD
    gate_ptr,
    dots_ptr,  # out [B, H, queries], contiguous: sums over channels of upstream * gated output
    shares_ptr,  # out [B, H, blocks], contiguous: the blocks' sums of upstream * output; not written unless GATE_GRAD
    upstream_example, upstream_head, upstream_row,
    output_example, output_head, output_row,
    gate_example, gate_head,
    heads, queries,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, GATED: tl.constexpr, GATE_GRAD: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, QUERIES)
    block = tl.program_id(0) % blocks
    pair = tl.program_id(0) // blocks
    example, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    gate = _gate(gate_ptr, example, head, gate_example, gate_head, GATED)
    if GATED and not GATE_GRAD:  # noqa: SIM102 (a branch of the compiler's)
        if gate == 0:
            return
    row = block * QUERIES + tl.arange(0, QUERIES)
    upstream_ptr = _at(upstream_ptr, example, head, upstream_example, upstream_head)
    output_ptr = _at(output_ptr, example, head, output_example, output_head)
    upstream = _load(upstream_ptr, row, queries, upstream_row, SIZE, BLOCK_SIZE).to(tl.float32)
    output = _load(output_ptr, row, queries, output_row, SIZE, BLOCK_SIZE).to(tl.float32)
    dots = tl.sum(upstream * output, 1)
    if GATE_GRAD:
        tl.store(shares_ptr + tl.program_id(0), tl.sum(dots, 0))
        dots *= gate
    tl.store(dots_ptr + pair.to(tl.int64) * queries + row, dots, mask=row < queries)


@triton.jit
def _query_kernel(
    upstream_ptr, query_ptr, key_ptr, value_ptr,
    gate_ptr, mask_ptr, seed_ptr, logsumexp_ptr, dots_ptr,
    grad_ptr,
    upstream_example, upstream_head, upstream_row,
    query_example, query_head, query_row,
    key_example, key_head, key_row,
    value_example, value_head, value_row,
    grad_example, grad_head, grad_row,
    gate_example, gate_head,
    mask_example, mask_head, mask_row, mask_column,
    heads, queries, keys,
    scale,
    dropout_p,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    GATED: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr, CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr, UNIT: tl.constexpr, EVEN_KEYS: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradient to a block of queries."""
    blocks = tl.cdiv(queries, QUERIES)
    block = tl.program_id(0) % blocks
    pair = tl.program_id(0) // blocks
    example, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    row = block * QUERIES + tl.arange(0, QUERIES)
    grad_ptr = _at(grad_ptr, example, head, grad_example, grad_head)
    gate = _gate(gate_ptr, example, head, gate_example, gate_head, GATED)
    if GATED:  # noqa: SIM102 (a branch of the compiler's)
        if gate == 0:
            nothing = tl.zeros([QUERIES, BLOCK_SIZE], tl.float32)
            _store(grad_ptr, nothing, row, queries, grad_row, SIZE, BLOCK_SIZE)
            return

    upstream_ptr = _at(upstream_ptr, example, head, upstream_example, upstream_head)
    query_ptr = _at(query_ptr, example, head, query_example, query_head)
    key_ptr = _at(key_ptr, example, head, key_example, key_head)
    value_ptr = _at(value_ptr, example, head, value_example, value_head)
    mask_ptr += example * mask_example + head * mask_head
    rows = pair.to(tl.int64) * queries + row
    logsumexp = tl.load(logsumexp_ptr + rows, mask=row < queries, other=0) * UNIT
    dots = tl.load(dots_ptr + rows, mask=row < queries, other=0)
    upstream = _load(upstream_ptr, row, queries, upstream_row, SIZE, BLOCK_SIZE)
    query = _load(query_ptr, row, queries, query_row, SIZE, BLOCK_SIZE)
    grad = tl.zeros([QUERIES, BLOCK_SIZE], tl.float32)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, (block + 1) * QUERIES)
    for start in range(0, end, KEYS):
        column = start + tl.arange(0, KEYS)
        key = _load(key_ptr, column, keys, key_row, SIZE, BLOCK_SIZE)
        value = _load(value_ptr, column, keys, value_row, SIZE, BLOCK_SIZE)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * UNIT)
        scores = _masked(scores, row[:, None], column[None, :], mask_ptr, mask_row, mask_column, queries, keys, MASK,
                         MASK_ROWS, CAUSAL, EVEN_KEYS)  # fmt: skip
        weights = _exp(scores - logsumexp[:, None], UNIT)
        slopes = tl.dot(upstream, tl.trans(value), input_precision=PRECISION) * (gate / (1 - dropout_p))
        if DROPOUT:
            kept = _kept(row[:, None], column[None, :], pair, tl.load(seed_ptr), dropout_p)
            slopes = tl.where(kept, slopes, 0)
        slopes = weights * (slopes - dots[:, None])
        grad = tl.dot(slopes.to(key.dtype), key, grad, input_precision=PRECISION)
    _store(grad_ptr, grad * scale, row, queries, grad_row, SIZE, BLOCK_SIZE)


@triton.jit
def _key_value_kernel(
    upstream_ptr, query_ptr, key_ptr, value_ptr,
    gate_ptr, mask_ptr, seed_ptr, logsumexp_ptr, dots_ptr,
    grad_key_ptr, grad_value_ptr,  # of the same strides
    upstream_example, upstream_head, upstream_row,
    query_example, query_head, query_row,
    key_example, key_head, key_row,
    value_example, value_head, value_row,
    grad_example, grad_head, grad_row,
    gate_example, gate_head,
    mask_example, mask_head, mask_row, mask_column,
    heads, queries, keys,
    scale,
    dropout_p,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    GATED: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr, CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr, UNIT: tl.constexpr, EVEN_KEYS: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradients to a block of keys and values. Tiles have keys down and queries across."""
    blocks = tl.cdiv(keys, KEYS)
    block = tl.program_id(0) % blocks
    pair = tl.program_id(0) // blocks
    example, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    column = block * KEYS + tl.arange(0, KEYS)
    grad_key_ptr = _at(grad_key_ptr, example, head, grad_example, grad_head)
    grad_value_ptr = _at(grad_value_ptr, example, head, grad_example, grad_head)
    gate = _gate(gate_ptr, example, head, gate_example, gate_head, GATED)
    if GATED:  # noqa: SIM102 (a branch of the compiler's)
        if gate == 0:
            nothing = tl.zeros([KEYS, BLOCK_SIZE], tl.float32)
            _store(grad_key_ptr, nothing, column, keys, grad_row, SIZE, BLOCK_SIZE)
            _store(grad_value_ptr, nothing, column, keys, grad_row, SIZE, BLOCK_SIZE)
            return

    upstream_ptr = _at(upstream_ptr, example, head, upstream_example, upstream_head)
    query_ptr = _at(query_ptr, example, head, query_example, query_head)
    key_ptr = _at(key_ptr, example, head, key_example, key_head)
    value_ptr = _at(value_ptr, example, head, value_example, value_head)
    mask_ptr += example * mask_example + head * mask_head
    logsumexp_ptr += pair.to(tl.int64) * queries
    dots_ptr += pair.to(tl.int64) * queries
    key = _load(key_ptr, column, keys, key_row, SIZE, BLOCK_SIZE)
    value = _load(value_ptr, column, keys, value_row, SIZE, BLOCK_SIZE)
    grad_key = tl.zeros([KEYS, BLOCK_SIZE], tl.float32)
    grad_value = tl.zeros([KEYS, BLOCK_SIZE], tl.float32)
    begin = 0
    if CAUSAL:
        begin = block * KEYS // QUERIES * QUERIES
    for start in range(begin, queries, QUERIES):
        row = start + tl.arange(0, QUERIES)
        query = _load(query_ptr, row, queries, query_row, SIZE, BLOCK_SIZE)
        upstream = _load(upstream_ptr, row, queries, upstream_row, SIZE, BLOCK_SIZE)
        # a row beyond the last has weights 0
        logsumexp = tl.load(logsumexp_ptr + row, mask=row < queries, other=float("inf")) * UNIT
        dots = tl.load(dots_ptr + row, mask=row < queries, other=0)
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * (scale * UNIT)
        scores = _masked(scores, row[None, :], column[:, None], mask_ptr, mask_row, mask_column, queries, keys, MASK,
                         MASK_ROWS, CAUSAL, EVEN_KEYS)  # fmt: skip
        weights = _exp(scores - logsumexp[None, :], UNIT)
        slopes = tl.dot(value, tl.trans(upstream), input_precision=PRECISION) * (gate / (1 - dropout_p))
        dropped = weights
        if DROPOUT:
            kept = _kept(row[None, :], column[:, None], pair, tl.load(seed_ptr), dropout_p)
            slopes = tl.where(kept, slopes, 0)
            dropped = tl.where(kept, weights, 0)
        grad_value = tl.dot(dropped.to(upstream.dtype), upstream, grad_value, input_precision=PRECISION)
        slopes = weights * (slopes - dots[None, :])
        grad_key = tl.dot(slopes.to(query.dtype), query, grad_key, input_precision=PRECISION)
    grad_key *= scale
    grad_value *= gate / (1 - dropout_p)
    _store(grad_key_ptr, grad_key, column, keys, grad_row, SIZE, BLOCK_SIZE)
    _store(grad_value_ptr, grad_value, column, keys, grad_row, SIZE, BLOCK_SIZE)


# Launchers ------------------------------------------------------------------------------------------------------------


def _block(length: int, most: int) -> int:
    """The smallest power of two from 16 (what tensor cores multiply) that holds the length, or `most`."""
    return min(max(triton.next_power_of_2(length), 16), most)


def _aligned(x: Tensor) -> Tensor:
    """With rows that begin at multiples of ALIGNMENT elements, copied if need be; so is their number of channels."""
    apart = all(stride % ALIGNMENT.value == 0 for stride in x.stride()[:3])
    even = apart and x.stride(3) == 1 and x.data_ptr() % 16 == 0
    return x if even else x.clone(memory_format=torch.contiguous_format)


def _in_tiles(mask: Tensor, single: bool) -> Tensor:
    """A mask with a row for each query, its rows whole tiles, and in single precision numbers.

    So the kernels can copy it 16 bytes at a time, past the registers. Where they cannot, the compiler computes the
    softmax twice, laid out as the products are and as the mask is read.
    """
    keys, dtype = mask.shape[3], torch.float32 if single else mask.dtype
    even = keys % MAX_KEYS == 0 and mask.stride(3) == 1 and mask.data_ptr() % 16 == 0
    if even and mask.dtype == dtype and all(stride % 16 == 0 for stride in mask.stride()[:3]):
        return mask
    once = mask[tuple(slice(1 if stride == 0 else None) for stride in mask.stride())]
    nothing = 0 if mask.dtype == torch.bool else -torch.inf
    tiles = once.new_full((*once.shape[:3], triton.cdiv(keys, MAX_KEYS) * MAX_KEYS), nothing, dtype=dtype)
    tiles[..., :keys] = once
    return tiles.expand(*mask.shape[:3], -1)


def _empty_heads(x: Tensor) -> Tensor:
    """[B, H, S, D] in memory as [B, S, H, D]."""
    return torch.empty_permuted(x.shape, (0, 2, 1, 3), dtype=x.dtype, device=x.device)


def _widened(x: Tensor) -> Tensor:
    """With channels of zeros, which add nothing, up to a multiple of ALIGNMENT."""
    return F.pad(x, (0, -x.shape[3] % ALIGNMENT.value))


def _narrowed(x: Tensor, size: int) -> Tensor:
    return _empty_heads(x[..., :size]).copy_(x[..., :size])


def _by_reference(query: Tensor, key: Tensor) -> bool:
    return query.dtype == torch.float64 or query.shape[-1] > MAX_SIZE or query.numel() == 0 or key.numel() == 0


class _Call:
    """What the kernels of one call share: how query and key are laid out in blocks, gates, mask, dropout."""

    def __init__(self, query: Tensor, key: Tensor, head_gate: Tensor | None, attn_mask: Tensor | None,
                 seed: Tensor | None, dropout_p: float, is_causal: bool, scale: float) -> None:  # fmt: skip
        batch, heads, queries, size = query.shape
        keys = key.shape[2]
        self.pairs, self.queries, self.keys = batch * heads, queries, keys
        self.single = query.dtype == torch.float32
        self.block_size = _block(size, MAX_SIZE)
        gate_strides, mask_strides = (0, 0), (0, 0, 0, 0)
        if head_gate is not None:
            gate_strides = head_gate.expand(batch, heads).stride()
        kind, rows = "none", False
        if attn_mask is not None:
            kind = "bool" if attn_mask.dtype == torch.bool else "float"
            attn_mask = attn_mask.expand(batch, heads, queries, keys)
            rows = queries > 1 and attn_mask.stride(2) != 0
            if rows:
                attn_mask = _in_tiles(attn_mask, self.single)
            mask_strides = attn_mask.stride()
            if attn_mask.dtype == torch.bool:
                attn_mask = attn_mask.view(torch.uint8)
        self.gate = query if head_gate is None else head_gate
        self.mask = query if attn_mask is None else attn_mask
        self.seed = query if seed is None else seed
        self.extras = rows or kind == "float" or seed is not None
        self.numbers = (
            *gate_strides,
            *mask_strides,
            heads,
            queries,
            keys,
            scale,
            dropout_p if seed is not None else 0.0,
        )
        self.options = {
            "SIZE": size, "BLOCK_SIZE": self.block_size, "GATED": head_gate is not None, "MASK": kind,
            "MASK_ROWS": rows, "CAUSAL": is_causal, "DROPOUT": seed is not None,
            "UNIT": 1.0 if kind == "float" else LOG2_E.value, "PRECISION": "tf32x3" if self.single else "tf32",
        }  # fmt: skip

    def tile(self, kernel: str) -> tuple[dict[str, int | bool], dict[str, int | None]]:
        """The blocks of queries and keys, and how to launch the kernel with them."""
        kind = "single" if self.single else "half with extras" if self.extras else "half"
        queries, keys, warps, stages, registers = TILES[kernel][kind][self.block_size > 64]
        keys = _block(self.keys, keys)
        tile = {"QUERIES": _block(self.queries, queries), "KEYS": keys, "EVEN_KEYS": self.keys % keys == 0}
        return tile, {"num_warps": warps, "num_stages": stages, "maxnreg": registers}


def gated_attention(
    query: Tensor, key: Tensor, value: Tensor, head_gate: Tensor | None, attn_mask: Tensor | None, seed: Tensor | None,
    dropout_p: float, is_causal: bool, scale: float, gate_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The op of the same name, in one launch."""
    if _by_reference(query, key):
        return reference.gated_attention(
            query, key, value, head_gate, attn_mask, seed, dropout_p, is_causal, scale, gate_grad
        )
    if (size := query.shape[3]) % ALIGNMENT.value:
        wide = (_widened(x) for x in (query, key, value))
        output, ungated, logsumexp = gated_attention(
            *wide, head_gate, attn_mask, seed, dropout_p, is_causal, scale, gate_grad
        )
        return _narrowed(output, size), _narrowed(ungated, size) if gate_grad else ungated, logsumexp
    call = _Call(query, key, head_gate, attn_mask, seed, dropout_p, is_causal, scale)
    output = _empty_heads(query)
    ungated = _empty_heads(query) if gate_grad else query.new_empty(0)
    query, key, value = _aligned(query), _aligned(key), _aligned(value)
    logsumexp = query.new_empty(query.shape[:3], dtype=torch.float32)
    tile, launch = call.tile("forward")
    with torch.cuda.device_of(query):
        _forward_kernel[(triton.cdiv(call.queries, tile["QUERIES"]) * call.pairs,)](
            query, key, value, call.gate, call.mask, call.seed, output, ungated, logsumexp,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3], *call.numbers,
            **call.options, **tile, GATE_GRAD=gate_grad, **launch,
        )  # fmt: skip
    return output, ungated, logsumexp


def gated_attention_backward(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, head_gate: Tensor | None, attn_mask: Tensor | None,
    seed: Tensor | None, output: Tensor, logsumexp: Tensor, dropout_p: float, is_causal: bool, scale: float,
    gate_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The op of the same name, in three launches and, for the gates, a sum."""
    if _by_reference(query, key):
        return reference.gated_attention_backward(
            upstream, query, key, value, head_gate, attn_mask, seed, output, logsumexp, dropout_p, is_causal, scale,
            gate_grad,
        )  # fmt: skip
    if (size := query.shape[3]) % ALIGNMENT.value:
        wide = (_widened(x) for x in (upstream, query, key, value))
        *grads, grad_gate = gated_attention_backward(
            *wide, head_gate, attn_mask, seed, _widened(output), logsumexp, dropout_p, is_causal, scale, gate_grad
        )
        grad_query, grad_key, grad_value = (_narrowed(x, size) for x in grads)
        return grad_query, grad_key, grad_value, grad_gate
    call = _Call(query, key, head_gate, attn_mask, seed, dropout_p, is_causal, scale)
    grad_query, grad_key, grad_value = _empty_heads(query), _empty_heads(key), _empty_heads(value)
    upstream, query, key, value, output = (_aligned(x) for x in (upstream, query, key, value, output))
    logsumexp = logsumexp.contiguous()
    dots = torch.empty_like(logsumexp)
    rows = _block(call.queries, 64)
    shares = query.new_empty(*query.shape[:2], triton.cdiv(call.queries, rows) if gate_grad else 0, dtype=torch.float32)
    inputs = (upstream, query, key, value, call.gate, call.mask, call.seed, logsumexp, dots)
    strides = [stride for x in inputs[:4] for stride in x.stride()[:3]]
    query_tile, query_launch = call.tile("query")
    key_tile, key_launch = call.tile("key_value")
    with torch.cuda.device_of(query):
        _dots_kernel[(triton.cdiv(call.queries, rows) * call.pairs,)](
            upstream, output, call.gate, dots, shares, *upstream.stride()[:3], *output.stride()[:3],
            *call.numbers[:2], *call.numbers[6:8], SIZE=call.options["SIZE"], BLOCK_SIZE=call.block_size,
            GATED=call.options["GATED"], GATE_GRAD=gate_grad, QUERIES=rows, num_warps=4, maxnreg=255,
        )  # fmt: skip
        _key_value_kernel[(triton.cdiv(call.keys, key_tile["KEYS"]) * call.pairs,)](
            *inputs, grad_key, grad_value, *strides, *grad_key.stride()[:3], *call.numbers, **call.options,
            **key_tile, **key_launch,
        )  # fmt: skip
        _query_kernel[(triton.cdiv(call.queries, query_tile["QUERIES"]) * call.pairs,)](
            *inputs, grad_query, *strides, *grad_query.stride()[:3], *call.numbers, **call.options, **query_tile,
            **query_launch,
        )  # fmt: skip
    grad_gate = query.new_empty(0)
    if gate_grad and head_gate is not None:
        over = -1 if head_gate.dim() == 2 else (0, 2)
        grad_gate = shares.sum(over).to(head_gate.dtype)
    return grad_query, grad_key, grad_value, grad_gate
