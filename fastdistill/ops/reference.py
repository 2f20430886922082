"""Every op in plain PyTorch: the definition, the tests' oracle, and what runs where no kernel does.

Each function has its op's schema. Gradients are written out, so that a test of them against autograd is a test of the
formulas that the kernels share.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor has it, else float32: what a loss is computed in and returned as."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _expectation(probabilities: Tensor, values: Tensor) -> Tensor:
    """Sum over classes of p * x, with 0 * x = 0 for infinite x too."""
    return torch.where(probabilities == 0, 0.0, probabilities * values).sum(-1, keepdim=True)


def _divergence(target: Tensor, other: Tensor, self_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """KL(target || other) of two rows of logits (without the target's entropy: soft cross-entropy), and its gradients
    with respect to both."""
    log_target, log_other = target.log_softmax(-1), other.log_softmax(-1)
    p_target, p_other = log_target.exp(), log_other.exp()
    difference = (log_target if self_entropy else 0) - log_other
    value = _expectation(p_target, difference)
    grad_target = torch.where(p_target == 0, 0.0, p_target * (difference - value))
    return value, grad_target, p_other - p_target


class _Term(NamedTuple):
    """A term of a loss by row, ``[..., 1]``, before its weight, and its gradients."""

    weight: float
    value: Tensor
    to_student: Tensor
    to_teacher: Tensor


def _distillation(
    weight: float, student: Tensor, teacher: Tensor, temperature: float, divergence: str, scale_by_temperature: bool
) -> _Term:
    """The divergence of logits that have been divided by temperature."""
    if divergence == "reverse_kl":
        value, to_student, to_teacher = _divergence(student, teacher, self_entropy=True)
    else:
        value, to_teacher, to_student = _divergence(teacher, student, self_entropy=divergence == "forward_kl")
    factor = temperature**2 if scale_by_temperature else 1.0
    return _Term(weight, factor * value, factor / temperature * to_student, factor / temperature * to_teacher)


def kd_ce_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    divergence: str,
    scale_by_temperature: bool,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    student_grad: bool,
    teacher_grad: bool,
    return_terms: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and, where asked for, its terms behind it and its gradients for an upstream gradient of one (see
    ops/kd_ce_loss.py)."""
    dtype = accumulation_dtype(student_logits, teacher_logits)
    student, teacher = student_logits.to(dtype), teacher_logits.to(dtype)
    kd = _Term(0.0, student.new_zeros(*student.shape[:-1], 1), torch.zeros_like(student), torch.zeros_like(teacher))
    if kd_weight != 0:
        s, t = student / temperature, teacher / temperature
        kd = _distillation(kd_weight, s, t, temperature, divergence, scale_by_temperature)
    return _with_cross_entropy(
        [kd], student_logits, teacher_logits, labels, ce_weight, ignore_index, label_smoothing, reduction,
        student_grad, teacher_grad, return_terms,
    )  # fmt: skip


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    target_weight: float,
    nontarget_weight: float,
    ce_weight: float,
    divergence: str,
    scale_by_temperature: bool,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    student_grad: bool,
    teacher_grad: bool,
    return_terms: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As kd_ce_loss, with distillation apart for the target and for the other classes (see ops/dkd_loss.py)."""
    dtype = accumulation_dtype(student_logits, teacher_logits)
    classes = student_logits.shape[-1]
    label = torch.where((labels >= 0) & (labels < classes), labels, 0).long().unsqueeze(-1)
    is_target = torch.arange(classes, device=label.device) == label
    odds, others, moves = [], [], []
    for logits in (student_logits, teacher_logits):
        scaled = logits.to(dtype) / temperature
        without = scaled.masked_fill(is_target, -torch.inf)
        log_odds = scaled.gather(-1, label) - without.logsumexp(-1, keepdim=True)
        odds.append(torch.cat([log_odds, torch.zeros_like(log_odds)], -1))
        others.append(without)
        moves.append(is_target.to(dtype) - without.softmax(-1))  # the log odds' gradient
    options = temperature, divergence, scale_by_temperature
    weight, value, *grads = _distillation(target_weight, odds[0], odds[1], *options)
    to_student, to_teacher = (grad[..., :1] * move for grad, move in zip(grads, moves, strict=True))
    tckd = _Term(weight, value, to_student, to_teacher)
    nckd = _distillation(nontarget_weight, others[0], others[1], *options)
    return _with_cross_entropy(
        [tckd, nckd], student_logits, teacher_logits, labels, ce_weight, ignore_index, label_smoothing, reduction,
        student_grad, teacher_grad, return_terms,
    )  # fmt: skip


def _with_cross_entropy(
    terms: list[_Term],
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    ce_weight: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    student_grad: bool,
    teacher_grad: bool,
    return_terms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """An op's outputs: the weighted sum of terms and cross-entropy, over the rows that count."""
    student = student_logits.to(accumulation_dtype(student_logits, teacher_logits))
    ce = _Term(0.0, torch.zeros_like(terms[0].value), torch.zeros_like(student), torch.zeros_like(student))
    ignored = outside = torch.zeros_like(ce.value, dtype=torch.bool)
    if labels is not None:
        labels = labels.long().unsqueeze(-1)
        classes = student.shape[-1]
        ignored = labels == ignore_index
        outside = ~ignored & ((labels < 0) | (labels >= classes))
        if labels.device.type == "cpu" and outside.any():
            row = int(outside.flatten().nonzero()[0])
            raise ValueError(
                f"labels holds {labels.flatten()[row].item()} at row {row}; expected 0 <= label < {classes} "
                f"(the number of classes) or ignore_index ({ignore_index})"
            )
        if ce_weight != 0:
            log_p = student.log_softmax(-1)
            safe = labels.masked_fill(ignored | outside, 0)
            cross_entropy = -(1 - label_smoothing) * log_p.gather(-1, safe)
            if label_smoothing > 0:
                cross_entropy = cross_entropy - label_smoothing * log_p.mean(-1, keepdim=True)
            target = torch.full_like(student, label_smoothing / classes)
            target = target.scatter_add(-1, safe, torch.full_like(cross_entropy, 1 - label_smoothing))
            ce = _Term(ce_weight, cross_entropy, log_p.exp() - target, ce.to_teacher)

    terms = [*terms, ce]
    values = [sum((term.weight * term.value for term in terms), torch.zeros_like(ce.value))]
    if return_terms:
        values += [term.value for term in terms]
    grad_student = sum((term.weight * term.to_student for term in terms), torch.zeros_like(student))
    grad_teacher = sum((term.weight * term.to_teacher for term in terms), torch.zeros_like(student))
    loss, grad_student, grad_teacher = (
        x.masked_fill(outside, torch.nan).masked_fill(ignored, 0.0)
        for x in (torch.stack(values), grad_student, grad_teacher)
    )
    loss = loss.squeeze(-1)
    if reduction == "mean":
        counted = (~ignored).sum()
        grad_student, grad_teacher = (g / counted.clamp(min=1) for g in (grad_student, grad_teacher))
        loss = loss.flatten(1).sum(1) / counted
    elif reduction == "sum":
        loss = loss.flatten(1).sum(1)
    return (
        loss if return_terms else loss[0].clone(),
        grad_student.to(student_logits.dtype).contiguous() if student_grad else student_logits.new_empty(0),
        grad_teacher.to(teacher_logits.dtype).contiguous() if teacher_grad else teacher_logits.new_empty(0),
    )


def scale_rows(grad: Tensor, grad_output: Tensor) -> Tensor:
    """``grad[..., c] * grad_output[...]``; ``grad_output`` has the leading shape of ``grad`` or is a scalar."""
    return (grad * grad_output.unsqueeze(-1)).to(grad.dtype).contiguous()


def scale_rows_(grad: Tensor, grad_output: Tensor) -> None:
    grad.mul_(grad_output.unsqueeze(-1))


def accumulate_sensitivity_(totals: list[Tensor], grads: list[Tensor], weights: list[Tensor] | None) -> None:
    """``totals[i] += |grads[i] * weights[i]|``, or ``|grads[i]|`` without weights."""
    if not totals:
        return
    dtypes = [accumulation_dtype(*tensors) for tensors in zip(totals, grads, weights or grads, strict=True)]
    products = [grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]
    if weights is not None:
        factors = [weight.to(dtype) for weight, dtype in zip(weights, dtypes, strict=True)]
        products = list(torch._foreach_mul(products, factors))
    torch._foreach_add_(totals, torch._foreach_abs(products))


def _first(found: Tensor) -> Tensor:
    """The first of the last dimension's elements that are true."""
    return found & (found.cumsum(-1) == 1)


def _around_the_largest(logits: Tensor) -> tuple[Tensor, ...]:
    """The logits less the largest, their exponentials, where the largest is and where the second largest, the sum of
    all exponentials but the largest's, and of all (NaN if the largest is infinite), and the second's exponential."""
    logits = logits.to(accumulation_dtype(logits))
    largest, second = logits.topk(2, -1).values.split(1, -1)
    held = _first(logits == largest)
    runner_up = _first((logits == second) & ~held)
    gap = (logits - largest).masked_fill(held, 0).clamp_min(-1000)  # exponential 0 in float64 too, and 0 * gap = 0
    exponential = gap.exp()
    others = exponential.masked_fill(held, 0).sum(-1, keepdim=True)
    return gap, exponential, held, runner_up, others, 1 + others + (largest - largest), (second - largest).exp()


def _at_uniform(kind: str, classes: int) -> float:
    """The largest uncertainty that there is: that of equal probabilities."""
    return {"entropy": math.log(classes), "least_confidence": 1 - 1 / classes, "margin": 1.0}[kind]


def uncertainty(logits: Tensor, kind: str, normalize: bool) -> Tensor:
    """Of each row (see ops/uncertainty.py), as precise near 0 as elsewhere: nothing is subtracted from 1."""
    gap, exponential, _, _, others, total, second = _around_the_largest(logits)
    if kind == "entropy":
        value = others.log1p() - (exponential * gap).sum(-1, keepdim=True) / total
    elif kind == "least_confidence":
        value = others / total
    else:
        value = (others + second) / total
    return value.squeeze(-1) / (_at_uniform(kind, logits.shape[-1]) if normalize else 1)


def uncertainty_backward(grad_output: Tensor, logits: Tensor, kind: str, normalize: bool) -> Tensor:
    """The gradient to the logits for a ``grad_output`` of the logits' leading shape."""
    gap, exponential, held, runner_up, others, total, second = _around_the_largest(logits)
    if kind == "entropy":
        grad = exponential * ((exponential * gap).sum(-1, keepdim=True) / total - gap)
    elif kind == "least_confidence":
        grad = torch.where(held, -others, exponential) / total
    else:
        grad = exponential * (1 - second)
        grad = torch.where(held, -others - second, torch.where(runner_up, grad + second * total, grad)) / total
    scale = grad_output.unsqueeze(-1) / (_at_uniform(kind, logits.shape[-1]) if normalize else 1)
    return (grad / total * scale).to(logits.dtype).contiguous()


def rank(scores: Tensor, count: int) -> Tensor:
    """The indices of the highest of all scores, NaN before any number and equals by lower index."""
    scores = scores.flatten()
    scores = scores.masked_fill(scores.isnan(), torch.inf)  # CUDA sorts a NaN whose sign bit is set as the lowest
    return scores.sort(descending=True, stable=True).indices[:count].clone()


def _for_each_head(grouped: Tensor, heads: int) -> Tensor:
    """Key or value with a head for each of the query's; where there are as many, itself."""
    return grouped if grouped.shape[1] == heads else grouped.repeat_interleave(heads // grouped.shape[1], 1)


def _over_groups(grad: Tensor, groups: int) -> Tensor:
    """The gradient to key or value from that to each of the query's heads."""
    return grad if grad.shape[1] == groups else grad.unflatten(1, (groups, -1)).sum(2)


def _attention_weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    logsumexp: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The softmax of the scores, 0 in a row with nothing to attend to, and the scores' logsumexp (0 there)."""
    scores = scale * query @ key.mT
    if is_causal:
        attn_mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        allowed = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if allowed else scores + attn_mask
    if logsumexp is None:
        logsumexp = scores.logsumexp(-1)
        nothing = logsumexp == -torch.inf
        return scores.softmax(-1).masked_fill(nothing.unsqueeze(-1), 0), logsumexp.masked_fill(nothing, 0)
    return (scores - logsumexp.unsqueeze(-1)).exp(), logsumexp


def dropout_factors(seed: Tensor | None, weights: Tensor, dropout_p: float) -> Tensor | float:
    """What dropout multiplies each attention weight by: 0 or 1 / (1 - p), the same for the same seed."""
    if seed is None:
        return 1.0
    generator = torch.Generator(weights.device).manual_seed(int(seed))
    kept = torch.rand(weights.shape, generator=generator, device=weights.device) >= dropout_p
    return kept / (1 - dropout_p)


def _apart(heads: Tensor, like: Tensor) -> Tensor:
    """[B, H, S, D] in memory as [B, S, H, D]; not as a view of that, which could not be changed in place."""
    apart = torch.empty_permuted(heads.shape, (0, 2, 1, 3), dtype=like.dtype, device=like.device)
    return apart.copy_(heads)


def gated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_gate: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    gate_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the output without gates where ``gate_grad``, and the logsumexp (see ops/gated_attention.py)."""
    dtype = accumulation_dtype(query)
    q, k, v = (_for_each_head(x.to(dtype), query.shape[1]) for x in (query, key, value))
    weights, logsumexp = _attention_weights(q, k, attn_mask, is_causal, scale, None)
    attention = weights * dropout_factors(seed, weights, dropout_p) @ v
    output = attention
    if head_gate is not None:
        gate = head_gate.to(dtype)[..., None, None]
        output = attention * gate
        if not gate_grad:
            output = torch.where(gate == 0, 0, output)
            logsumexp = torch.where(gate.squeeze(-1) == 0, 0, logsumexp)
    ungated = _apart(attention, query) if gate_grad else query.new_empty(0)
    return _apart(output, query), ungated, logsumexp.contiguous()


def gated_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_gate: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    gate_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients to query, key, value and, where ``gate_grad``, the gate: ``output`` is then that without gates."""
    dtype = accumulation_dtype(query)
    grad_output, q, k, v = (_for_each_head(x.to(dtype), query.shape[1]) for x in (grad_output, query, key, value))
    weights, _ = _attention_weights(q, k, attn_mask, is_causal, scale, logsumexp)
    factors = dropout_factors(seed, weights, dropout_p)
    mean = (grad_output * output.to(dtype)).sum(-1, keepdim=True)  # under the weights, of their gradients
    grad_gate = query.new_empty(0)
    if head_gate is not None:
        gate = head_gate.to(dtype)[..., None, None]
        grad_output = grad_output * gate
        if gate_grad:
            by_example = mean.sum((-1, -2))
            grad_gate = (by_example if head_gate.dim() == 2 else by_example.sum(0)).to(head_gate.dtype)
            mean = mean * gate
    grad_value = (weights * factors).mT @ grad_output
    grad_scores = scale * weights * (grad_output @ v.mT * factors - mean)
    grad_query, grad_key = grad_scores @ k, grad_scores.mT @ q
    if head_gate is not None:
        grad_query, grad_key, grad_value = (torch.where(gate == 0, 0, x) for x in (grad_query, grad_key, grad_value))
    grad_key, grad_value = (_over_groups(x, key.shape[1]) for x in (grad_key, grad_value))
    return _apart(grad_query, query), _apart(grad_key, query), _apart(grad_value, query), grad_gate


def _activation(z: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The activation and its derivative."""
    if kind == "relu":
        return z.relu(), torch.where(z <= 0, 0.0, 1.0).to(z.dtype)
    if kind == "gelu":  # z times the normal distribution function, whose derivative is the normal density
        share = torch.special.erfc(-z / math.sqrt(2)) / 2
        return z * share, share + z * (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    if kind not in ("gelu_tanh", "silu"):
        raise ValueError(f"activation is {kind!r}; expected gelu, gelu_tanh, relu or silu")
    slope = torch.ones_like(z)  # z times the logistic function of u, of which slope is the derivative
    u = z
    if kind == "gelu_tanh":
        u = math.sqrt(8 / math.pi) * z * (1 + 0.044715 * z.square())
        slope = math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * z.square())
    share = u.sigmoid()
    return z * share, share + z * slope * share * (-u).sigmoid()


def _neurons(h: Tensor, bias: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """The pre-activation, and the gate in a shape that multiplies it."""
    dtype = accumulation_dtype(h)
    z = h.to(dtype) if bias is None else h.to(dtype) + bias.to(dtype)
    if gate is None:
        return z, z.new_ones(())
    between = (1,) * (h.dim() - 2) if gate.dim() == 2 else ()
    return z, gate.to(dtype).view(*gate.shape[:-1], *between, gate.shape[-1])


def bias_act_gate(h: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str) -> Tensor:
    """``gate * act(h + bias)`` for h [..., I], bias [I], gate [I] or [B, I] (see ops/bias_act_gate.py)."""
    z, factor = _neurons(h, bias, gate)
    return (factor * _activation(z, activation)[0]).to(h.dtype).contiguous()


def bias_act_gate_backward(
    grad_output: Tensor,
    h: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    activation: str,
    want_bias: bool,
    want_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of h and, where asked for, of bias and gate."""
    z, factor = _neurons(h, bias, gate)
    value, slope = _activation(z, activation)
    grad_output = grad_output.to(z.dtype)
    grad = grad_output * factor * slope
    grad_bias, grad_gate = h.new_empty(0), h.new_empty(0)  # two, for outputs of an op may not alias
    if want_bias and bias is not None:
        grad_bias = grad[None].sum_to_size(bias.shape).to(bias.dtype)  # also of one row a new tensor
    if want_gate and gate is not None:
        grad_gate = (grad_output * value).sum_to_size(factor.shape).view(gate.shape).to(gate.dtype)
    return grad.to(h.dtype).contiguous(), grad_bias, grad_gate
