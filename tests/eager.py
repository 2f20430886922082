"""What a user would write in plain PyTorch: the tests' second opinion, and in the same dtype the measure of what
error is ordinary."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def kd_ce_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 1.0,
    divergence: str = "forward_kl",
    scale_by_temperature: bool = True,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    log_s = F.log_softmax(student_logits / temperature, -1)
    log_t = F.log_softmax(teacher_logits / temperature, -1)
    kd = _divergence(log_s, log_t, divergence)
    loss = kd_weight * kd * (temperature**2 if scale_by_temperature else 1)
    return _with_cross_entropy(loss, student_logits, labels, ce_weight, ignore_index, label_smoothing, reduction)


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 1.0,
    divergence: str = "forward_kl",
    scale_by_temperature: bool = True,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    target = labels.long().masked_fill(labels == ignore_index, 0).unsqueeze(-1)
    is_target = torch.zeros_like(student_logits, dtype=torch.bool).scatter(-1, target, True)
    log_b, log_q = [], []
    for logits in (student_logits / temperature, teacher_logits / temperature):
        log_p = F.log_softmax(logits, -1)
        rest = log_p.masked_fill(is_target, -torch.inf).logsumexp(-1)
        log_b.append(torch.stack([log_p.gather(-1, target).squeeze(-1), rest], -1))
        others = logits.masked_select(~is_target).view(*logits.shape[:-1], logits.shape[-1] - 1)
        log_q.append(F.log_softmax(others, -1))
    kd = alpha * _divergence(*log_b, divergence) + beta * _divergence(*log_q, divergence)
    loss = kd_weight * kd * (temperature**2 if scale_by_temperature else 1)
    return _with_cross_entropy(loss, student_logits, labels, ce_weight, ignore_index, label_smoothing, reduction)


def _divergence(log_s: Tensor, log_t: Tensor, divergence: str) -> Tensor:
    if divergence == "forward_kl":
        return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
    if divergence == "reverse_kl":
        return F.kl_div(log_t, log_s, reduction="none", log_target=True).sum(-1)
    return -(log_t.exp() * log_s).sum(-1)


def _with_cross_entropy(
    loss: Tensor,
    logits: Tensor,
    labels: Tensor | None,
    ce_weight: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    counted = torch.ones_like(loss, dtype=torch.bool)
    if labels is not None:
        counted = labels != ignore_index
        ce = F.cross_entropy(
            logits.flatten(0, -2),
            labels.flatten().long(),
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction="none",
        )
        loss = torch.where(counted, loss + ce_weight * ce.view(labels.shape), 0)
    if reduction == "none":
        return loss
    return loss.sum() / counted.sum() if reduction == "mean" else loss.sum()


def uncertainty(logits: Tensor, kind: str = "entropy", normalize: bool = True) -> Tensor:
    log_p, classes = logits.log_softmax(-1), logits.shape[-1]
    p = log_p.exp()
    if kind == "entropy":
        value, most = -(p * log_p).sum(-1), math.log(classes)
    elif kind == "least_confidence":
        value, most = 1 - p.amax(-1), 1 - 1 / classes
    else:
        first, second = p.topk(2, -1).values.unbind(-1)
        value, most = 1 - (first - second), 1.0
    return value / most if normalize else value


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def gated_ffn(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    neuron_gate: Tensor | None = None,
    *,
    activation: str = "gelu",
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
) -> Tensor:
    a = F.linear(x, w_in, b_in)
    a = ACTIVATIONS[activation](a) if w_gate is None else ACTIVATIONS[activation](F.linear(x, w_gate, b_gate)) * a
    if neuron_gate is not None and neuron_gate.dim() == 2:
        a = a * neuron_gate.view(len(neuron_gate), *(1,) * (x.dim() - 2), len(w_in))
    elif neuron_gate is not None:
        a = a * neuron_gate
    return F.linear(a, w_out, b_out)


def gated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_gate: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        attn_mask = attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(query.dtype)
    group = query.shape[1] // max(key.shape[1], 1)
    if group > 1:
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    output = F.scaled_dot_product_attention(query, key, value, attn_mask, is_causal=is_causal, scale=scale)
    return output if head_gate is None else output * head_gate.to(output.dtype)[..., None, None]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    return F.layer_norm(x + residual, weight.shape, weight, bias, eps)


def proximity_conv(
    states: Tensor,
    proximity: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    weighted = states * proximity.to(states.dtype).unsqueeze(-1)
    if attention_mask is not None:
        weighted = weighted.masked_fill(attention_mask.unsqueeze(-1) == 0, 0)
    values = F.conv1d(weighted.mT, weight, bias, padding=weight.shape[-1] // 2)
    if attention_mask is not None:
        values = values.masked_fill(attention_mask.unsqueeze(1) == 0, -math.inf)
    return values.max(-1).values
