"""Attention whose heads are gated, forward and backward, in Triton: flash attention (Dao 2023, algorithms 1 and 2).

A program has a block of queries (or, for the gradients to key and value, of keys) of one head of one example, and goes
over the other side a block at a time; where a head's keys fit one tile, one program computes all its gradients. Of a
head whose gate is 0 a program reads the gate, writes zeros and leaves, unless the gate needs a gradient; so nothing
depends on the gates' values outside the device. The gates' gradient is the total of the sums of grad_output * output
over channels, which a backward of attention computes in any case: each program writes its share, and PyTorch adds them,
always in the same order. GROUP neighbouring heads share a head of key and value; each writes the gradients to it apart,
in single precision, and PyTorch adds those, too.

Scores are kept times UNIT: log2(e), for exp2, or 1 beside a floating mask, of which the least finite value is not to
become infinite. `row` and `column` number queries and keys and are two-dimensional, so that a tile may have queries
down and keys across, or the reverse; the backward to key and value does that, so that its weights are the left operand
of its products as they stand.

csrc/triton/gated_attention.cpp prepares what the kernels are given: `launch` is called once a specialisation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastdistill.kernels.common import _multiple
from torch import Tensor

LOG2_E = tl.constexpr(math.log2(math.e))
MAX_SIZE = 128  # of a head
ALIGNMENT = tl.constexpr(8)  # elements that one instruction copies, or two
TILED = tl.constexpr(16)  # divides the strides of a mask that has a row for each query

# Queries and keys in a tile, warps, pipeline stages, registers a thread (None: ptxas chooses): for heads of up to 64
# channels and for wider ones. Extras are dropout and a mask that is floating or has a row for each query. Those for
# sm_90, whose multiprocessors hold more, are the fastest of 30 measured (docs/gpu.md), with dropout the largest that it
# holds in registers; the others about the largest that sm_80 does, and sm_86 in shared memory.
Tile = tuple[int, int, int, int, int | None]
TILES: dict[str, dict[str, tuple[Tile, Tile]]] = {
    "forward": {
        "half, sm_90": ((128, 64, 8, 4, None), (128, 128, 8, 3, None)),
        "half with dropout, sm_90": ((64, 64, 4, 3, None), (64, 64, 8, 2, None)),
        "half": ((128, 64, 8, 3, None), (64, 64, 8, 2, 255)),
        "half with extras": ((64, 32, 4, 2, 255), (64, 32, 8, 2, 255)),
        "single": ((16, 32, 4, 2, 255), (16, 32, 4, 2, 255)),
    },
    "query": {
        "half, sm_90": ((128, 64, 8, 3, None), (128, 64, 8, 3, None)),
        "half with dropout, sm_90": ((64, 64, 4, 2, None), (64, 32, 4, 2, None)),
        "half": ((64, 64, 4, 2, None), (64, 32, 4, 2, None)),
        "half with extras": ((64, 32, 4, 2, 255), (64, 32, 4, 2, 255)),
        "single": ((16, 32, 4, 2, 255), (16, 16, 8, 2, 255)),
    },
    "key_value": {
        "half, sm_90": ((32, 64, 4, 3, 168), (64, 128, 8, 2, None)),
        "half with dropout, sm_90": ((32, 64, 4, 2, None), (32, 64, 8, 2, None)),
        "half": ((32, 64, 4, 2, None), (64, 64, 8, 2, None)),
        "half with extras": ((16, 32, 4, 2, 255), (16, 32, 4, 2, 255)),
        "single": ((32, 16, 4, 2, 255), (16, 16, 8, 2, 255)),
    },
    "whole": {  # of half precision only: others keep no whole head in registers
        "half, sm_90": ((64, 128, 8, 2, None), (64, 64, 8, 2, None)),
        "half with dropout, sm_90": ((32, 128, 8, 2, None), (32, 64, 8, 2, None)),
        "half": ((16, 128, 8, 1, None), (16, 64, 8, 1, None)),
        "half with extras": ((16, 128, 8, 1, None), (16, 64, 8, 1, None)),
    },
}
STREAMS = ("dots", "gate", "gate_gradient")  # that read each number once
TILES |= dict.fromkeys(STREAMS, dict.fromkeys(TILES["forward"], ((64, 64, 4, 1, 255),) * 2))


class Specialization(NamedTuple):
    """What a kernel is compiled for; each has all of it, and reads what it needs."""

    SIZE: int  # of a head
    BLOCK_SIZE: int  # SIZE in tiles
    GROUP: int  # heads that share a key and a value
    GATED: bool
    GATE_GRAD: bool
    MASK: str  # of MASKS
    MASK_ROWS: bool  # one for each query
    CAUSAL: bool
    DROPOUT: bool
    UNIT: float
    EVEN_KEYS: bool  # whole tiles
    PRECISION: str
    QUERIES: int  # in a tile
    KEYS: int


# Tensors as kernels get them. Triton, which looks at the numbers in a tuple even where it is told not to specialize,
# compiles for the defaults: of these odd ones it takes the number of bits alone.
INT64, INT32 = 2**63 - 1, 2**31 - 1


class Rows(NamedTuple):
    """[B, H, S, D] with unit stride in a row; all other strides are multiples of ALIGNMENT."""

    ptr: Any
    example: int = INT64
    head: int = INT64
    row: int = INT32


class Gate(NamedTuple):
    """[B, H]"""

    ptr: Any
    example: int = INT64
    head: int = INT64


class Mask(NamedTuple):
    """[B, H, queries, keys]"""

    ptr: Any
    example: int = INT64
    head: int = INT64
    row: int = INT64
    column: int = INT64


@triton.jit
def _place(rows, heads, BLOCK: tl.constexpr):
    """Of a program: its block of rows, its pair of example and head, both of the pair."""
    blocks = tl.cdiv(rows, BLOCK)
    pair = tl.program_id(0) // blocks
    return tl.program_id(0) % blocks, pair, (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)


@triton.jit
def _like(rows, ptr):
    """Rows of the same strides elsewhere."""
    return Rows(ptr, rows.example, rows.head, rows.row)


@triton.jit
def _at(rows, example, head):
    """A head's rows; all offsets in 64 bits."""
    ptr = rows.ptr + example * _multiple(rows.example, ALIGNMENT) + head * _multiple(rows.head, ALIGNMENT)
    return _like(rows, ptr)


@triton.jit
def _elements(rows, row, count, SPEC: tl.constexpr):
    """Of a block of rows, [rows of the block, SPEC.BLOCK_SIZE]: where they are, and which there are."""
    channel = tl.arange(0, SPEC.BLOCK_SIZE)[None, :]
    exists = (row < count)[:, None]
    if SPEC.SIZE != SPEC.BLOCK_SIZE:
        exists = exists & (channel < SPEC.SIZE)
    return rows.ptr + (row.to(tl.int64)[:, None] * _multiple(rows.row, ALIGNMENT) + channel), exists


@triton.jit
def _load(rows, row, count, SPEC: tl.constexpr):
    pointers, exists = _elements(rows, row, count, SPEC)
    return tl.load(pointers, mask=exists, other=0)


@triton.jit
def _store(rows, values, row, count, SPEC: tl.constexpr):
    pointers, exists = _elements(rows, row, count, SPEC)
    tl.store(pointers, values.to(rows.ptr.dtype.element_ty), mask=exists)


@triton.jit
def _mask_at(mask, example, head, SPEC: tl.constexpr):
    if SPEC.MASK_ROWS:
        ptr = mask.ptr + example * _multiple(mask.example, TILED) + head * _multiple(mask.head, TILED)
    else:
        ptr = mask.ptr + example * mask.example + head * mask.head
    return Mask(ptr, mask.example, mask.head, mask.row, mask.column)


@triton.jit
def _masked(scores, row, column, mask, queries, keys, SPEC: tl.constexpr):
    """The scores, -inf where a query may not attend to a key or there is no such key."""
    if SPEC.MASK == "none":
        if not SPEC.EVEN_KEYS:
            scores = tl.where(column < keys, scores, -float("inf"))
    else:
        if SPEC.MASK_ROWS:  # of whole tiles
            pointers = mask.ptr + column.to(tl.int64) + row.to(tl.int64) * _multiple(mask.row, TILED)
            exists = row < queries
        else:
            pointers = mask.ptr + column.to(tl.int64) * mask.column
            exists = column < keys
        if SPEC.MASK == "bool":
            scores = tl.where(tl.load(pointers, mask=exists, other=0) != 0, scores, -float("inf"))
        else:
            scores += tl.load(pointers, mask=exists, other=-float("inf")).to(tl.float32)
    if SPEC.CAUSAL:
        scores = tl.where(row >= column, scores, -float("inf"))
    return scores


@triton.jit
def _exp(scores, SPEC: tl.constexpr):
    return tl.exp2(scores * (LOG2_E / SPEC.UNIT))


@triton.jit
def _kept(row, column, head, seed, dropout_p):
    """Whether dropout keeps a weight: a function of its place and the seed alone. Seven rounds pass BigCrush (Salmon et
    al. 2011)."""
    zero = (row + column) * 0
    random, _, _, _ = tl.philox(seed, zero + column, zero + row, zero + head, zero, n_rounds=7)
    return tl.uint_to_uniform_float(random) >= dropout_p


@triton.jit
def _gate(gate, example, head, SPEC: tl.constexpr):
    if SPEC.GATED:
        return tl.load(gate.ptr + example * gate.example + head * gate.head).to(tl.float32)
    else:
        return 1.0


NUMBERS = ["heads", "queries", "keys", "scale", "dropout_p"]  # that no kernel is compiled anew for


@triton.jit(do_not_specialize=NUMBERS)
def _forward_kernel(
    query_rows: Rows, key_rows: Rows, value_rows: Rows,
    output_rows: Rows,
    ungated_ptr,  # like output; not written unless SPEC.GATE_GRAD
    logsumexp_ptr,  # [B, H, queries], contiguous
    gates: Gate, mask: Mask, seed_ptr,  # not read unless SPEC.GATED, SPEC.MASK, SPEC.DROPOUT
    heads: tl.int32, queries: tl.int32, keys: tl.int32, scale: tl.float32, dropout_p: tl.float32, SPEC: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = SPEC.QUERIES
    KEYS: tl.constexpr = SPEC.KEYS
    BLOCK_SIZE: tl.constexpr = SPEC.BLOCK_SIZE
    block, pair, example, head = _place(queries, heads, QUERIES)
    row = block * QUERIES + tl.arange(0, QUERIES)
    output_rows = _at(output_rows, example, head)
    logsumexp_ptr += pair.to(tl.int64) * queries + row
    gate = _gate(gates, example, head, SPEC)
    if SPEC.GATED and not SPEC.GATE_GRAD:  # noqa: SIM102 (a branch of the compiler's)
        if gate == 0:
            nothing = tl.zeros([QUERIES, BLOCK_SIZE], tl.float32)
            _store(output_rows, nothing, row, queries, SPEC)
            tl.store(logsumexp_ptr, tl.zeros([QUERIES], tl.float32), mask=row < queries)
            return

    query_rows = _at(query_rows, example, head)
    key_rows = _at(key_rows, example, head // SPEC.GROUP)
    value_rows = _at(value_rows, example, head // SPEC.GROUP)
    mask = _mask_at(mask, example, head, SPEC)
    query = _load(query_rows, row, queries, SPEC)
    largest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    output = tl.zeros([QUERIES, BLOCK_SIZE], tl.float32)
    end = keys
    if SPEC.CAUSAL:
        end = tl.minimum(keys, (block + 1) * QUERIES)
    for start in range(0, end, KEYS):
        column = start + tl.arange(0, KEYS)
        key = _load(key_rows, column, keys, SPEC)
        scores = tl.dot(query, tl.trans(key), input_precision=SPEC.PRECISION) * (scale * SPEC.UNIT)
        scores = _masked(scores, row[:, None], column[None, :], mask, queries, keys, SPEC)
        higher = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(higher == -float("inf"), 0, higher)  # nothing to attend to so far
        weights = _exp(scores - shift[:, None], SPEC)
        shrink = _exp(largest - shift, SPEC)
        largest = higher
        total = total * shrink + tl.sum(weights, 1)
        if SPEC.DROPOUT:
            kept = _kept(row[:, None], column[None, :], pair, tl.load(seed_ptr), dropout_p)
            weights = tl.where(kept, weights, 0)
        value = _load(value_rows, column, keys, SPEC)
        output = tl.dot(weights.to(value.dtype), value, output * shrink[:, None], input_precision=SPEC.PRECISION)

    empty = total == 0
    logsumexp = tl.where(empty, 0, largest / SPEC.UNIT + tl.log(total))
    tl.store(logsumexp_ptr, logsumexp, mask=row < queries)
    output *= (1 / (tl.where(empty, 1, total) * (1 - dropout_p)))[:, None]
    if SPEC.GATE_GRAD:
        _store(_at(_like(output_rows, ungated_ptr), example, head), output, row, queries, SPEC)
    _store(output_rows, output * gate, row, queries, SPEC)


@triton.jit(do_not_specialize=NUMBERS)
def _dots_kernel(
    grad_output_rows: Rows,
    output_rows: Rows,  # without gates where SPEC.GATE_GRAD
    dots_ptr,  # out [B, H, queries], contiguous: sums over channels of grad_output * gated output
    shares_ptr,  # out [B, H, blocks], contiguous: the blocks' sums of grad_output * output, if SPEC.GATE_GRAD
    gates: Gate, mask: Mask, seed_ptr,
    heads: tl.int32, queries: tl.int32, keys: tl.int32, scale: tl.float32, dropout_p: tl.float32, SPEC: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = SPEC.QUERIES
    block, pair, example, head = _place(queries, heads, QUERIES)
    gate = _gate(gates, example, head, SPEC)
    if SPEC.GATED and not SPEC.GATE_GRAD:  # noqa: SIM102 (a branch of the compiler's)
        if gate == 0:
            return
    row = block * QUERIES + tl.arange(0, QUERIES)
    grad_output_rows = _at(grad_output_rows, example, head)
    output_rows = _at(output_rows, example, head)
    grad_output = _load(grad_output_rows, row, queries, SPEC).to(tl.float32)
    output = _load(output_rows, row, queries, SPEC).to(tl.float32)
    dots = tl.sum(grad_output * output, 1)
    if SPEC.GATE_GRAD:
        tl.store(shares_ptr + tl.program_id(0), tl.sum(dots, 0))
        dots *= gate
    tl.store(dots_ptr + pair.to(tl.int64) * queries + row, dots, mask=row < queries)


@triton.jit(do_not_specialize=NUMBERS)
def _gate_kernel(
    ungated_rows: Rows,
    output_rows: Rows,  # out
    gates: Gate, mask: Mask, seed_ptr,
    heads: tl.int32, queries: tl.int32, keys: tl.int32, scale: tl.float32, dropout_p: tl.float32, SPEC: tl.constexpr,
):  # fmt: skip
    """The output from the one without gates, which cuDNN has made."""
    block, _, example, head = _place(queries, heads, SPEC.QUERIES)
    row = block * SPEC.QUERIES + tl.arange(0, SPEC.QUERIES)
    ungated = _load(_at(ungated_rows, example, head), row, queries, SPEC).to(tl.float32)
    _store(_at(output_rows, example, head), ungated * _gate(gates, example, head, SPEC), row, queries, SPEC)


@triton.jit(do_not_specialize=NUMBERS)
def _gate_gradient_kernel(
    grad_output_rows: Rows, ungated_rows: Rows,
    grad_ungated_rows: Rows,  # out, for cuDNN
    shares_ptr,  # out [B, H, blocks], contiguous: the blocks' sums of grad_output * ungated
    gates: Gate, mask: Mask, seed_ptr,
    heads: tl.int32, queries: tl.int32, keys: tl.int32, scale: tl.float32, dropout_p: tl.float32, SPEC: tl.constexpr,
):  # fmt: skip
    block, _, example, head = _place(queries, heads, SPEC.QUERIES)
    row = block * SPEC.QUERIES + tl.arange(0, SPEC.QUERIES)
    grad_output = _load(_at(grad_output_rows, example, head), row, queries, SPEC).to(tl.float32)
    ungated = _load(_at(ungated_rows, example, head), row, queries, SPEC).to(tl.float32)
    tl.store(shares_ptr + tl.program_id(0), tl.sum(tl.sum(grad_output * ungated, 1), 0))
    _store(_at(grad_ungated_rows, example, head), grad_output * _gate(gates, example, head, SPEC), row, queries, SPEC)


@triton.jit(do_not_specialize=NUMBERS)
def _query_kernel(
    grad_output_rows: Rows, query_rows: Rows, key_rows: Rows, value_rows: Rows,
    grad_rows: Rows,  # out
    logsumexp_ptr, dots_ptr,
    gates: Gate, mask: Mask, seed_ptr,
    heads: tl.int32, queries: tl.int32, keys: tl.int32, scale: tl.float32, dropout_p: tl.float32, SPEC: tl.constexpr,
):  # fmt: skip
    """The gradient to a block of queries."""
    QUERIES: tl.constexpr = SPEC.QUERIES
    KEYS: tl.constexpr = SPEC.KEYS
    BLOCK_SIZE: tl.constexpr = SPEC.BLOCK_SIZE
    block, pair, example, head = _place(queries, heads, QUERIES)
    row = block * QUERIES + tl.arange(0, QUERIES)
    grad_rows = _at(grad_rows, example, head)
    gate = _gate(gates, example, head, SPEC)
    if SPEC.GATED:  # noqa: SIM102 (a branch of the compiler's)
        if gate == 0:
            nothing = tl.zeros([QUERIES, BLOCK_SIZE], tl.float32)
            _store(grad_rows, nothing, row, queries, SPEC)
            return

    grad_output_rows = _at(grad_output_rows, example, head)
    query_rows = _at(query_rows, example, head)
    key_rows = _at(key_rows, example, head // SPEC.GROUP)
    value_rows = _at(value_rows, example, head // SPEC.GROUP)
    mask = _mask_at(mask, example, head, SPEC)
    rows = pair.to(tl.int64) * queries + row
    logsumexp = tl.load(logsumexp_ptr + rows, mask=row < queries, other=0) * SPEC.UNIT
    dots = tl.load(dots_ptr + rows, mask=row < queries, other=0)
    grad_output = _load(grad_output_rows, row, queries, SPEC)
    query = _load(query_rows, row, queries, SPEC)
    grad = tl.zeros([QUERIES, BLOCK_SIZE], tl.float32)
    end = keys
    if SPEC.CAUSAL:
        end = tl.minimum(keys, (block + 1) * QUERIES)
    for start in range(0, end, KEYS):
        column = start + tl.arange(0, KEYS)
        key = _load(key_rows, column, keys, SPEC)
        value = _load(value_rows, column, keys, SPEC)
        scores = tl.dot(query, tl.trans(key), input_precision=SPEC.PRECISION) * (scale * SPEC.UNIT)
        scores = _masked(scores, row[:, None], column[None, :], mask, queries, keys, SPEC)
        weights = _exp(scores - logsumexp[:, None], SPEC)
        slopes = tl.dot(grad_output, tl.trans(value), input_precision=SPEC.PRECISION) * (gate / (1 - dropout_p))
        if SPEC.DROPOUT:
            kept = _kept(row[:, None], column[None, :], pair, tl.load(seed_ptr), dropout_p)
            slopes = tl.where(kept, slopes, 0)
        slopes = weights * (slopes - dots[:, None])
        grad = tl.dot(slopes.to(key.dtype), key, grad, input_precision=SPEC.PRECISION)
    _store(grad_rows, grad * scale, row, queries, SPEC)


@triton.jit(do_not_specialize=NUMBERS)
def _key_value_kernel(
    grad_output_rows: Rows, query_rows: Rows, key_rows: Rows, value_rows: Rows,
    grad_key_rows: Rows,  # out
    grad_value_ptr,  # out, of the same strides
    logsumexp_ptr, dots_ptr,
    gates: Gate, mask: Mask, seed_ptr,
    heads: tl.int32, queries: tl.int32, keys: tl.int32, scale: tl.float32, dropout_p: tl.float32, SPEC: tl.constexpr,
):  # fmt: skip
    """The gradients to a block of keys and values. Tiles have keys down and queries across."""
    QUERIES: tl.constexpr = SPEC.QUERIES
    KEYS: tl.constexpr = SPEC.KEYS
    BLOCK_SIZE: tl.constexpr = SPEC.BLOCK_SIZE
    block, pair, example, head = _place(keys, heads, KEYS)
    column = block * KEYS + tl.arange(0, KEYS)
    grad_key_rows = _at(grad_key_rows, example, head)
    grad_value_rows = _at(_like(grad_key_rows, grad_value_ptr), example, head)
    gate = _gate(gates, example, head, SPEC)
    if SPEC.GATED:  # noqa: SIM102 (a branch of the compiler's)
        if gate == 0:
            nothing = tl.zeros([KEYS, BLOCK_SIZE], tl.float32)
            _store(grad_key_rows, nothing, column, keys, SPEC)
            _store(grad_value_rows, nothing, column, keys, SPEC)
            return

    grad_output_rows = _at(grad_output_rows, example, head)
    query_rows = _at(query_rows, example, head)
    key_rows = _at(key_rows, example, head // SPEC.GROUP)
    value_rows = _at(value_rows, example, head // SPEC.GROUP)
    mask = _mask_at(mask, example, head, SPEC)
    logsumexp_ptr += pair.to(tl.int64) * queries
    dots_ptr += pair.to(tl.int64) * queries
    key = _load(key_rows, column, keys, SPEC)
    value = _load(value_rows, column, keys, SPEC)
    grad_key = tl.zeros([KEYS, BLOCK_SIZE], tl.float32)
    grad_value = tl.zeros([KEYS, BLOCK_SIZE], tl.float32)
    begin = 0
    if SPEC.CAUSAL:
        begin = block * KEYS // QUERIES * QUERIES
    for start in range(begin, queries, QUERIES):
        row = start + tl.arange(0, QUERIES)
        query = _load(query_rows, row, queries, SPEC)
        grad_output = _load(grad_output_rows, row, queries, SPEC)
        # a row beyond the last has weights 0
        logsumexp = tl.load(logsumexp_ptr + row, mask=row < queries, other=float("inf")) * SPEC.UNIT
        dots = tl.load(dots_ptr + row, mask=row < queries, other=0)
        scores = tl.dot(key, tl.trans(query), input_precision=SPEC.PRECISION) * (scale * SPEC.UNIT)
        scores = _masked(scores, row[None, :], column[:, None], mask, queries, keys, SPEC)
        weights = _exp(scores - logsumexp[None, :], SPEC)
        slopes = tl.dot(value, tl.trans(grad_output), input_precision=SPEC.PRECISION) * (gate / (1 - dropout_p))
        dropped = weights
        if SPEC.DROPOUT:
            kept = _kept(row[None, :], column[:, None], pair, tl.load(seed_ptr), dropout_p)
            slopes = tl.where(kept, slopes, 0)
            dropped = tl.where(kept, weights, 0)
        grad_value = tl.dot(dropped.to(grad_output.dtype), grad_output, grad_value, input_precision=SPEC.PRECISION)
        slopes = weights * (slopes - dots[None, :])
        grad_key = tl.dot(slopes.to(query.dtype), query, grad_key, input_precision=SPEC.PRECISION)
    grad_key *= scale
    grad_value *= gate / (1 - dropout_p)
    _store(grad_key_rows, grad_key, column, keys, SPEC)
    _store(grad_value_rows, grad_value, column, keys, SPEC)


@triton.jit(do_not_specialize=NUMBERS)
def _whole_kernel(
    grad_output_rows: Rows, query_rows: Rows, key_rows: Rows, value_rows: Rows,
    output_rows: Rows,  # without gates where SPEC.GATE_GRAD
    grad_query_rows: Rows, grad_key_rows: Rows,  # out
    grad_value_ptr,  # out, of the strides of grad_key
    logsumexp_ptr,
    grad_gate_ptr,  # out [B, H], contiguous; not written unless SPEC.GATE_GRAD
    gates: Gate, mask: Mask, seed_ptr,
    heads: tl.int32, queries: tl.int32, keys: tl.int32, scale: tl.float32, dropout_p: tl.float32, SPEC: tl.constexpr,
):  # fmt: skip
    """All gradients of a head whose keys fit one tile."""
    QUERIES: tl.constexpr = SPEC.QUERIES
    KEYS: tl.constexpr = SPEC.KEYS
    BLOCK_SIZE: tl.constexpr = SPEC.BLOCK_SIZE
    pair = tl.program_id(0)
    example, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    column = tl.arange(0, KEYS)
    grad_output_rows = _at(grad_output_rows, example, head)
    query_rows = _at(query_rows, example, head)
    key_rows = _at(key_rows, example, head // SPEC.GROUP)
    value_rows = _at(value_rows, example, head // SPEC.GROUP)
    output_rows = _at(output_rows, example, head)
    grad_query_rows = _at(grad_query_rows, example, head)
    grad_key_rows = _at(grad_key_rows, example, head)
    grad_value_rows = _at(_like(grad_key_rows, grad_value_ptr), example, head)
    mask = _mask_at(mask, example, head, SPEC)
    logsumexp_ptr += pair.to(tl.int64) * queries
    gate = _gate(gates, example, head, SPEC)
    share = 0.0
    if SPEC.GATED:  # noqa: SIM102 (a branch of the compiler's)
        if gate == 0:
            nothing = tl.zeros([QUERIES, BLOCK_SIZE], tl.float32)
            for start in range(0, queries, QUERIES):
                row = start + tl.arange(0, QUERIES)
                _store(grad_query_rows, nothing, row, queries, SPEC)
                if SPEC.GATE_GRAD:
                    grad_output = _load(grad_output_rows, row, queries, SPEC)
                    output = _load(output_rows, row, queries, SPEC)
                    share += tl.sum(tl.sum(grad_output.to(tl.float32) * output.to(tl.float32), 1), 0)
            nothing = tl.zeros([KEYS, BLOCK_SIZE], tl.float32)
            _store(grad_key_rows, nothing, column, keys, SPEC)
            _store(grad_value_rows, nothing, column, keys, SPEC)
            if SPEC.GATE_GRAD:
                tl.store(grad_gate_ptr + pair, share)
            return

    key = _load(key_rows, column, keys, SPEC)
    value = _load(value_rows, column, keys, SPEC)
    grad_key = tl.zeros([KEYS, BLOCK_SIZE], tl.float32)
    grad_value = tl.zeros([KEYS, BLOCK_SIZE], tl.float32)
    for start in range(0, queries, QUERIES):
        row = start + tl.arange(0, QUERIES)
        query = _load(query_rows, row, queries, SPEC)
        grad_output = _load(grad_output_rows, row, queries, SPEC)
        output = _load(output_rows, row, queries, SPEC)
        dots = tl.sum(grad_output.to(tl.float32) * output.to(tl.float32), 1)
        if SPEC.GATE_GRAD:
            share += tl.sum(dots, 0)
            dots *= gate
        # a row beyond the last has weights 0
        logsumexp = tl.load(logsumexp_ptr + row, mask=row < queries, other=float("inf")) * SPEC.UNIT
        scores = tl.dot(key, tl.trans(query), input_precision=SPEC.PRECISION) * (scale * SPEC.UNIT)
        scores = _masked(scores, row[None, :], column[:, None], mask, queries, keys, SPEC)
        weights = _exp(scores - logsumexp[None, :], SPEC)
        slopes = tl.dot(value, tl.trans(grad_output), input_precision=SPEC.PRECISION) * (gate / (1 - dropout_p))
        dropped = weights
        if SPEC.DROPOUT:
            kept = _kept(row[None, :], column[:, None], pair, tl.load(seed_ptr), dropout_p)
            slopes = tl.where(kept, slopes, 0)
            dropped = tl.where(kept, weights, 0)
        grad_value = tl.dot(dropped.to(grad_output.dtype), grad_output, grad_value, input_precision=SPEC.PRECISION)
        slopes = (weights * (slopes - dots[None, :])).to(query.dtype)
        grad_key = tl.dot(slopes, query, grad_key, input_precision=SPEC.PRECISION)
        grad_query = tl.dot(tl.trans(slopes), key, input_precision=SPEC.PRECISION) * scale
        _store(grad_query_rows, grad_query, row, queries, SPEC)
    grad_key *= scale
    grad_value *= gate / (1 - dropout_p)
    _store(grad_key_rows, grad_key, column, keys, SPEC)
    _store(grad_value_rows, grad_value, column, keys, SPEC)
    if SPEC.GATE_GRAD:
        tl.store(grad_gate_ptr + pair, share)


# Launching ------------------------------------------------------------------------------------------------------------

MASKS = ("none", "bool", "float")
STRIDED = {3: Rows, 2: Gate, 4: Mask}  # by how many strides a kernel is given


def _block(length: int, most: int) -> int:
    """The smallest power of two from 16 (what tensor cores multiply) that holds the length, or `most`."""
    return min(max(triton.next_power_of_2(length), 16), most)


def _is_hopper() -> bool:
    """Or later."""
    return triton.knobs.runtime.interpret or triton.runtime.driver.active.get_current_target().arch >= 90


def _kind(single: bool, own_mask: bool, dropout: bool) -> str:
    """Of `TILES`."""
    if single:
        return "single"
    if own_mask or (dropout and not _is_hopper()):
        return "half with extras"
    if not _is_hopper():
        return "half"
    return "half with dropout, sm_90" if dropout else "half, sm_90"


def launch(
    name: str, tensors: Sequence[Tensor], strides: Sequence[int], sizes: Sequence[int], numbers: Sequence[float],
    options: Sequence[int], rows: int, pairs: int,
) -> tuple[Any, int]:  # fmt: skip
    """Launches a kernel, compiling it first if need be, with as many of each tensor's strides as is said. Returns what
    Triton compiled and how many rows a program takes, 0 for all of them."""
    _, queries, keys = sizes
    size, group, gated, gate_grad, mask, mask_rows, causal, dropout = options
    single = tensors[0].dtype == torch.float32
    kind = _kind(single, mask_rows or MASKS[mask] == "float", bool(dropout))
    block_size = _block(size, MAX_SIZE)
    most_queries, most_keys, warps, stages, registers = TILES[name][kind][block_size > 64]
    query_block = most_queries if name in STREAMS else _block(queries, most_queries)
    key_block = _block(keys, most_keys)
    taken = {"whole": 0, "key_value": key_block}.get(name, query_block)
    grid = (pairs * (triton.cdiv(rows, taken) if taken else 1), 1, 1)
    specialization = Specialization(
        SIZE=size, BLOCK_SIZE=block_size, GROUP=group, GATED=bool(gated), GATE_GRAD=bool(gate_grad),
        MASK=MASKS[mask], MASK_ROWS=bool(mask_rows), CAUSAL=bool(causal), DROPOUT=bool(dropout),
        UNIT=1.0 if MASKS[mask] == "float" else LOG2_E.value, EVEN_KEYS=keys % key_block == 0,
        PRECISION="tf32x3" if single else "tf32", QUERIES=query_block, KEYS=key_block,
    )  # fmt: skip
    kernel, rest = globals()[f"_{name}_kernel"], (*sizes, *numbers, specialization)
    compiled = None
    if not triton.knobs.runtime.interpret:
        anywhere = (STRIDED[n](x) if n else x for x, n in zip(tensors, strides, strict=True))
        compiled = kernel.warmup(*anywhere, *rest, grid=grid, num_warps=warps, num_stages=stages, maxnreg=registers)
    here = (STRIDED[n](x, *x.stride()[:n]) if n else x for x, n in zip(tensors, strides, strict=True))
    (compiled or kernel)[grid](*here, *rest)
    return compiled, taken
