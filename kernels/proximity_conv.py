"""Proximity-weighted convolution with its maximum over tokens, and its gradients, in Triton.

Forward: a program has a block of one sentence's channels and goes over the sentence a block of tokens at a time, with a
matrix product for each token of an n-gram; it keeps of each channel the maximum and where it is. Proximity multiplies
the products, not the states, so that the tensor cores get the states as they are.

Backward: a filter's gradient is gathered from the n-grams of the maxima, those of all sentences in a fixed order. The
gradient to a block of tokens is a product of the filters with a matrix made on the way, which has the upstream gradient
of a channel at the token of its maximum and is 0 elsewhere: a scatter in a fixed order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from fastdistill.kernels.common import _cast, _multiple
from torch import Tensor

from fastdistill.ops import reference_proximity_conv as reference

NOWHERE = tl.constexpr(2**31 - 1)  # beyond any token
ALIGNED = 8  # elements that one instruction copies into shared memory, or two
# Tokens, channels and width of a tile, warps and pipeline stages: what sm_80 and sm_90 hold in registers (not tuned).
TILES = {"half": (64, 64, 64, 4, 3), "half, unaligned": (32, 32, 32, 4, 2), "single": (32, 32, 32, 4, 2)}
SENTENCES, COLUMNS = 16, 128  # of the states that a program of the gradient to the weight has at once


@triton.jit
def _real(mask_ptr, sentence, token, length, MASKED: tl.constexpr):
    """Whether there is such a token."""
    inside = (token >= 0) & (token < length)
    if MASKED:
        inside = inside & (tl.load(mask_ptr + sentence * length + token, mask=inside, other=0) != 0)
    return inside


@triton.jit(do_not_specialize=["length"])
def _forward_kernel(
    states_ptr,  # [B, S, D] with unit stride in a row
    proximity_ptr,  # [B, S], contiguous, as is all that follows
    filters_ptr,  # [K, C, D]
    bias_ptr,  # [C]; not read unless BIASED
    mask_ptr,  # [B, S], bool; not read unless MASKED
    output_ptr,  # out [B, C]
    positions_ptr,  # out [B, C], int64
    sentence_stride,
    token_stride,
    length,
    width,
    channels,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # divides width and strides
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    width, token_stride = _multiple(width, ALIGNMENT), _multiple(token_stride, ALIGNMENT)
    sentence_stride = _multiple(sentence_stride, ALIGNMENT)
    parts = tl.cdiv(channels, CHANNELS)
    sentence = (tl.program_id(0) // parts).to(tl.int64)
    channel = tl.program_id(0) % parts * CHANNELS + tl.arange(0, CHANNELS)
    states_ptr += sentence * sentence_stride
    most = tl.full([CHANNELS], -float("inf"), tl.float32)
    position = tl.full([CHANNELS], -1, tl.int32)
    for start in range(0, length, TOKENS):
        token = start + tl.arange(0, TOKENS)
        values = tl.zeros([TOKENS, CHANNELS], tl.float32)
        for k in range(TAPS):
            row = token + (k - TAPS // 2)
            real = _real(mask_ptr, sentence, row, length, MASKED)
            products = tl.zeros([TOKENS, CHANNELS], tl.float32)
            rows_ptr = states_ptr + row.to(tl.int64)[:, None] * token_stride
            filter_ptr = filters_ptr + (k * channels + channel).to(tl.int64)[None, :] * width
            for begin in range(0, width, WIDTH):
                column = begin + tl.arange(0, WIDTH)
                inside = column < width
                state = tl.load(rows_ptr + column[None, :], mask=real[:, None] & inside[None, :], other=0)
                weight = tl.load(
                    filter_ptr + column[:, None], mask=(channel < channels)[None, :] & inside[:, None], other=0
                )
                products = tl.dot(state, weight, products, input_precision=PRECISION)
            factor = tl.load(proximity_ptr + sentence * length + row, mask=real, other=0).to(tl.float32)
            values += factor[:, None] * products
        spoilt = values != values
        real = _real(mask_ptr, sentence, token, length, MASKED)[:, None]
        values = tl.where(real & (values == values), values, -float("inf"))
        largest = tl.max(values, 0)
        first = tl.min(tl.where(values == largest[None, :], token[:, None], NOWHERE), 0)
        first_spoilt = tl.min(tl.where(real & spoilt, token[:, None], NOWHERE), 0)
        higher = largest > most
        position = tl.where(higher, first, position)
        most = tl.where(higher, largest, most)
        newly_spoilt = (first_spoilt < NOWHERE) & (most == most)
        position = tl.where(newly_spoilt, first_spoilt, position)
        most = tl.where(newly_spoilt, float("nan"), most)
    if BIASED:
        most += tl.load(bias_ptr + channel, mask=channel < channels, other=0).to(tl.float32)
    at = sentence * channels + channel
    tl.store(output_ptr + at, _cast(most, output_ptr), mask=channel < channels)
    tl.store(positions_ptr + at, position.to(tl.int64), mask=channel < channels)


@triton.jit(do_not_specialize=["length", "batch"])
def _states_kernel(
    grad_output_ptr,  # [B, C], contiguous, as is all that follows
    states_ptr,  # [B, S, D] with unit stride in a row; not read unless WANT_PROXIMITY
    proximity_ptr,  # [B, S]
    filters_ptr,  # [K, C, D]
    mask_ptr,  # [B, S], bool; not read unless MASKED
    positions_ptr,  # [B, C], int64
    grad_states_ptr,  # out [B, S, D], contiguous; not written unless WANT_STATES
    shares_ptr,  # out [parts, B, S], float32: each part of the width's share; not written unless WANT_PROXIMITY
    sentence_stride,
    token_stride,
    length,
    width,
    channels,
    batch,
    MASKED: tl.constexpr,
    WANT_STATES: tl.constexpr,
    WANT_PROXIMITY: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # divides width and strides
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    width, token_stride = _multiple(width, ALIGNMENT), _multiple(token_stride, ALIGNMENT)
    sentence_stride = _multiple(sentence_stride, ALIGNMENT)
    parts = tl.cdiv(width, WIDTH)
    blocks = tl.cdiv(length, TOKENS)
    part = tl.program_id(0) % parts
    block = tl.program_id(0) // parts % blocks
    sentence = (tl.program_id(0) // parts // blocks).to(tl.int64)
    token = block * TOKENS + tl.arange(0, TOKENS)
    column = part * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    grad = tl.zeros([TOKENS, WIDTH], tl.float32)
    for k in range(TAPS):
        center = token + (TAPS // 2 - k)
        for begin in range(0, channels, CHANNELS):
            channel = begin + tl.arange(0, CHANNELS)
            within = channel < channels
            position = tl.load(positions_ptr + sentence * channels + channel, mask=within, other=-1)
            upstream = tl.load(grad_output_ptr + sentence * channels + channel, mask=within, other=0)
            upstream = tl.where(position < 0, 0, upstream)
            scattered = tl.where(position[None, :] == center[:, None], upstream[None, :], 0)
            weight = tl.load(
                filters_ptr + (k * channels + channel).to(tl.int64)[:, None] * width + column[None, :],
                mask=within[:, None] & inside[None, :], other=0,
            )  # fmt: skip
            grad = tl.dot(scattered.to(weight.dtype), weight, grad, input_precision=PRECISION)
    real = _real(mask_ptr, sentence, token, length, MASKED)
    grad = tl.where(real[:, None], grad, 0)
    exists = (token < length)[:, None] & inside[None, :]
    if WANT_STATES:
        factor = tl.load(proximity_ptr + sentence * length + token, mask=real, other=0).to(tl.float32)
        at = (sentence * length + token)[:, None] * width + column[None, :]
        tl.store(grad_states_ptr + at, _cast(grad * factor[:, None], grad_states_ptr), mask=exists)
    if WANT_PROXIMITY:
        state = tl.load(
            states_ptr + sentence * sentence_stride + token.to(tl.int64)[:, None] * token_stride + column[None, :],
            mask=exists & real[:, None], other=0,
        )  # fmt: skip
        share = tl.sum(grad * state.to(tl.float32), 1)
        tl.store(shares_ptr + (part * batch + sentence) * length + token, share, mask=token < length)


@triton.jit(do_not_specialize=["length", "batch"])
def _weight_kernel(
    grad_output_ptr,  # [B, C], contiguous, as is all that follows
    states_ptr,  # [B, S, D] with unit stride in a row
    proximity_ptr,  # [B, S]
    mask_ptr,  # [B, S], bool; not read unless MASKED
    positions_ptr,  # [B, C], int64
    grad_weight_ptr,  # out [C, D, K]
    grad_bias_ptr,  # out [C]; not written unless WANT_BIAS
    sentence_stride,
    token_stride,
    length,
    width,
    channels,
    batch,
    MASKED: tl.constexpr,
    WANT_BIAS: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # divides width and strides
    TAPS: tl.constexpr,
    SENTENCES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    width, token_stride = _multiple(width, ALIGNMENT), _multiple(token_stride, ALIGNMENT)
    sentence_stride = _multiple(sentence_stride, ALIGNMENT)
    parts = tl.cdiv(width, WIDTH)
    part = tl.program_id(0) % parts
    k = tl.program_id(0) // parts % TAPS
    channel = (tl.program_id(0) // parts // TAPS).to(tl.int64)
    column = part * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    grad = tl.zeros([SENTENCES, WIDTH], tl.float32)
    grad_bias = tl.zeros([SENTENCES], tl.float32)
    for begin in range(0, batch, SENTENCES):
        sentence = (begin + tl.arange(0, SENTENCES)).to(tl.int64)
        within = sentence < batch
        position = tl.load(positions_ptr + sentence * channels + channel, mask=within, other=-1)
        within = within & (position >= 0)
        upstream = tl.load(grad_output_ptr + sentence * channels + channel, mask=within, other=0).to(tl.float32)
        grad_bias += upstream
        row = position + (k - TAPS // 2)
        real = within & (row >= 0) & (row < length)
        if MASKED:
            real = real & (tl.load(mask_ptr + sentence * length + row, mask=real, other=0) != 0)
        factor = tl.load(proximity_ptr + sentence * length + row, mask=real, other=0).to(tl.float32)
        state = tl.load(
            states_ptr + (sentence * sentence_stride + row * token_stride)[:, None] + column[None, :],
            mask=real[:, None] & inside[None, :], other=0,
        )  # fmt: skip
        grad += (upstream * factor)[:, None] * state.to(tl.float32)
    at = (channel * width + column) * TAPS + k
    tl.store(grad_weight_ptr + at, _cast(tl.sum(grad, 0), grad_weight_ptr), mask=inside)
    if WANT_BIAS:  # noqa: SIM102 (a branch of the compiler's)
        if (part == 0) & (k == 0):
            tl.store(grad_bias_ptr + channel, _cast(tl.sum(grad_bias, 0), grad_bias_ptr))


# Launching ------------------------------------------------------------------------------------------------------------


def _block(length: int, most: int) -> int:
    """The smallest power of two from 16 (what tensor cores multiply) that holds the length, or `most`."""
    return min(max(triton.next_power_of_2(length), 16), most)


def _alignment(states: Tensor) -> int:
    return math.gcd(*states.shape[2:], *states.stride()[:2], 16)


def _tile(states: Tensor, channels: int) -> dict[str, int | str]:
    single = states.dtype == torch.float32
    kind = "single" if single else "half" if _alignment(states) % ALIGNED == 0 else "half, unaligned"
    tokens, most_channels, most_width, warps, stages = TILES[kind]
    return {
        "TOKENS": _block(states.shape[1], tokens), "CHANNELS": _block(channels, most_channels),
        "WIDTH": _block(states.shape[2], most_width), "PRECISION": "tf32x3" if single else "tf32",
        "ALIGNMENT": _alignment(states), "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _filters(weight: Tensor) -> Tensor:
    """[C, D, K] as [K, C, D]."""
    return weight.permute(2, 0, 1).contiguous()


def proximity_conv(
    states: Tensor, proximity: Tensor, weight: Tensor, bias: Tensor | None, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The op of the same name, in one launch and one that reorders the weight; float64 by plain PyTorch."""
    if states.dtype == torch.float64:
        return reference.proximity_conv(states, proximity, weight, bias, attention_mask)
    batch, length, width = states.shape
    channels, _, taps = weight.shape
    output = states.new_empty(batch, channels)
    positions = states.new_empty(batch, channels, dtype=torch.int64)
    if output.numel() > 0:
        states, proximity = _rows(states), proximity.contiguous()
        mask = states if attention_mask is None else attention_mask.contiguous()
        tile = _tile(states, channels)
        with torch.cuda.device_of(states):
            _forward_kernel[(batch * triton.cdiv(channels, tile["CHANNELS"]),)](
                states, proximity, _filters(weight), states if bias is None else bias.contiguous(), mask,
                output, positions, states.stride(0), states.stride(1), length, width, channels,
                BIASED=bias is not None, MASKED=attention_mask is not None, TAPS=taps, **tile,
            )  # fmt: skip
    return output, positions


def proximity_conv_backward(
    grad_output: Tensor,
    states: Tensor,
    proximity: Tensor,
    weight: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor,
    want_states: bool,
    want_proximity: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op of the same name: a launch for states and proximity, and a sum of its shares; one for weight and bias."""
    if states.dtype == torch.float64:
        return reference.proximity_conv_backward(
            grad_output, states, proximity, weight, attention_mask, positions, want_states, want_proximity,
            want_weight, want_bias,
        )  # fmt: skip
    batch, length, width = states.shape
    channels, _, taps = weight.shape
    states, weighing, masked = _rows(states), proximity.contiguous(), attention_mask is not None
    mask = states if attention_mask is None else attention_mask.contiguous()
    grad_output, positions = grad_output.contiguous(), positions.contiguous()
    strides_and_sizes = states.stride(0), states.stride(1), length, width, channels, batch
    grad_states = states.new_empty((batch, length, width) if want_states else 0)
    tile = _tile(states, channels)
    parts = triton.cdiv(width, tile["WIDTH"])
    shares = states.new_empty((parts, batch, length) if want_proximity else 0, dtype=torch.float32)
    grad_weight = weight.new_empty(weight.shape if want_weight or want_bias else 0)
    grad_bias = weight.new_empty(channels if want_bias else 0)
    with torch.cuda.device_of(states):
        if (want_states or want_proximity) and batch > 0:
            _states_kernel[(batch * parts * triton.cdiv(length, tile["TOKENS"]),)](
                grad_output, states, weighing, _filters(weight), mask, positions, grad_states, shares,
                *strides_and_sizes,
                MASKED=masked, WANT_STATES=want_states, WANT_PROXIMITY=want_proximity, TAPS=taps, **tile,
            )  # fmt: skip
        if grad_weight.numel() > 0:
            columns = _block(width, COLUMNS)
            _weight_kernel[(channels * taps * triton.cdiv(width, columns),)](
                grad_output, states, weighing, mask, positions, grad_weight, grad_bias,
                *strides_and_sizes,
                MASKED=masked, WANT_BIAS=want_bias, ALIGNMENT=_alignment(states), TAPS=taps,
                SENTENCES=SENTENCES, WIDTH=columns,
            )  # fmt: skip
    grad_proximity = shares.sum(0).to(proximity.dtype) if want_proximity else states.new_empty(0)
    return grad_states, grad_proximity, grad_weight if want_weight else weight.new_empty(0), grad_bias
