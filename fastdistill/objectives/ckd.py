"""Contextual distillation: how tokens lie to one another, and how a token moves through the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.objectives.base import ATTENTION_MASK, Needs, Objective, check_teacher, weighted_sum
from fastdistill.objectives.pkd import Pairs, check_pairs, hidden_states, layer_pairs
from fastdistill.objectives.tokens import mean_of, real_tokens
from fastdistill.ops.checks import check_number
from fastdistill.ops.kd_ce_loss import kd_ce_loss

TERMS = ("wr_pair", "wr_triple", "ltr_pair", "ltr_triple")


@dataclass(frozen=True)
class CKD(Objective):
    r"""Contextual distillation of hidden states by their relations (Park et al. 2021, "Distilling Linguistic Context
    for Language Model Compression"), which are numbers of any two models: hidden sizes may differ.

    Of points :math:`h_1, \dots, h_n` two relations are compared. Pairs, by a softmax over each point's cosines with
    the others, and the KL divergence of the student's from the teacher's:

    .. math::
        P = \frac{1}{n} \sum_i \mathrm{KL}(p^t_i \,\|\, p^s_i),
        \qquad p_i = \mathrm{softmax}_{j \ne i} \frac{\langle h_i, h_j \rangle}{\|h_i\| \|h_j\|}

    and triplets, by the cosine of the angle at the middle one:

    .. math::
        T = \operatorname*{mean}_{(i,j,k)} (\psi^s_{ijk} - \psi^t_{ijk})^2, \qquad
        \psi_{ijk} = \frac{\langle h_i - h_j, h_k - h_j \rangle}{\|h_i - h_j\| \|h_k - h_j\|}
        = \frac{G_{ik} - G_{ij} - G_{jk} + G_{jj}}
          {\sqrt{(G_{ii} - 2 G_{ij} + G_{jj})(G_{kk} - 2 G_{jk} + G_{jj})}}

    with :math:`G` the products of the points less their mean, which changes no angle; 0 where two of them coincide.

    * **Word relation**: the points are the tokens of an example in one layer; P and T are means over the pairs of
      layers. The triplets are those within `window`: :math:`|i-j|, |k-j| \le` (window - 1) / 2, all three different.
    * **Layer-transforming relation**: the points are one token's states in the layers that are paired, all of them
      in triplets; P and T are means over the example's tokens.

    The loss is the sum of the four, weighted, each the mean over the examples. Padding counts nowhere. It says
    nothing of logits or labels: add it to others by `WeightedSum`.

    Args:
        wr_pair, wr_triple, ltr_pair, ltr_triple: weights of the four, >= 0 and not all 0; also the names that they
            are logged by. The paper's :math:`\lambda_{WR}` is wr_triple / wr_pair, :math:`\lambda_{LTR}` likewise.
        window: odd, 3 or more.
        pairs: (student layer, teacher layer), counted from 1, with 0 for the embeddings, in the order of their depth.
            "all" pairs the embeddings, and each of a student's k layers with every (L/k)-th of a teacher's L.
            "skip" and "last" are `PKD`'s, which leave out the embeddings and the last layer.

    It takes the column "attention_mask" ``[B, S]``, 0 for padding, on either side. Its memory is that of the hidden
    states and, for each pair of layers, ``[B, S, S]`` and ``[B, S, window, window]``. Computed in float32 (float64 if
    the states are), also under autocast. Gradients go to both models' states, where they require one.

    The softmax, divergence and default window are those of the authors' code, which the paper leaves open. That code
    differs in two ways: it divides P by n once more, so that its weights of pairs are n times ours, and it counts
    padded and repeated tokens at the edges of a window.

    Raises ValueError or TypeError for arguments out of their range, for layers that a model does not have, where
    there are fewer than 3 pairs of layers for a layer-transforming relation with a weight, and for hidden states
    that are not of the same tokens (stored ones have [CLS] alone).
    """

    wr_pair: float = 1.0
    wr_triple: float = 1.0
    ltr_pair: float = 1.0
    ltr_triple: float = 1.0
    window: int = 21
    pairs: Pairs | Literal["all"] = "all"

    def __post_init__(self) -> None:
        for name in TERMS:
            check_number(name, getattr(self, name), minimum=0)
        if not any(getattr(self, name) for name in TERMS):
            raise ValueError(f"{', '.join(TERMS)} are all 0; expected a positive one")
        if not isinstance(self.window, int) or isinstance(self.window, bool):
            raise TypeError(f"window is {self.window!r}; expected an integer")
        if self.window < 3 or self.window % 2 == 0:
            raise ValueError(f"window is {self.window}; expected an odd number, 3 or more")
        check_pairs(self.pairs, ("all", "skip", "last"))

    on_host = None

    @property
    def needs(self) -> Needs:
        return Needs(hidden_states=True, columns=(ATTENTION_MASK,), labels=False)

    def parts(
        self, student: Any, teacher: Any, labels: Tensor | None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        check_teacher(self, teacher)
        ours, theirs = hidden_states("student", student), hidden_states("teacher", teacher)
        pairs = layer_pairs(self.pairs, len(ours) - 1, len(theirs) - 1)
        if len(pairs) < 3 and (self.ltr_pair or self.ltr_triple):
            raise ValueError(
                f"pairs is {self.pairs!r}, {len(pairs)} for these models; expected 3 or more, or ltr_pair=0 and "
                "ltr_triple=0"
            )
        real = real_tokens(ours[0], theirs[0], attention_mask)
        if real.shape[1] < 2:
            raise ValueError("attention_mask has 1 token an example; expected 2 or more, to have relations")
        with torch.autocast(real.device.type, enabled=False):
            s = _stack([ours[i] for i, _ in pairs], real)
            t = _stack([theirs[j] for _, j in pairs], real)
            words = s, t, real[:, None]
            layers = s.transpose(1, 2), t.transpose(1, 2), real.new_ones(len(pairs))
            losses = {
                "wr_pair": lambda: _pair_loss(*words).mean(),
                "wr_triple": lambda: _triple_loss(*words, reach=self.window // 2).mean(),
                "ltr_pair": lambda: mean_of(_pair_loss(*layers), real).mean(),
                "ltr_triple": lambda: mean_of(_triple_loss(*layers, reach=len(pairs)), real).mean(),
            }
            return weighted_sum({name: (w, losses[name]()) for name in TERMS if (w := getattr(self, name))})


def _stack(layers: Sequence[Tensor], real: Tensor) -> Tensor:
    """``[B, layers, S, d]``, padding 0."""
    states = torch.stack(list(layers), 1)
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    return states.masked_fill(~real[:, None, :, None], 0)


# Points are [..., n, d], those that count [..., n]


def _pair_loss(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    n = counted.shape[-1]
    others = counted[..., None, :] & ~torch.eye(n, dtype=torch.bool, device=counted.device)
    has_others = counted & others.any(-1)

    def cosines(points: Tensor) -> Tensor:
        directions = F.normalize(points, dim=-1)
        return (directions @ directions.mT).masked_fill(~others, -torch.inf)

    ours, theirs = cosines(student), cosines(teacher)
    ignored = torch.where(has_others, 0, -100).expand(ours.shape[:-1])
    return mean_of(kd_ce_loss(ours, theirs, ignored, ce_weight=0.0, reduction="none"), counted)


def _triple_loss(student: Tensor, teacher: Tensor, counted: Tensor, *, reach: int) -> Tensor:
    n = counted.shape[-1]
    middle = torch.arange(n, device=counted.device)[:, None]
    if 2 * reach + 1 < n:
        places = middle + torch.arange(-reach, reach + 1, device=counted.device)  # [n, W]: those around each middle
    else:
        places = middle.T.expand(n, n)
    side = ((places - middle).abs() <= reach) & (places != middle) & (places >= 0) & (places < n)
    places = places.clamp(0, n - 1)
    side = side & counted[..., places] & counted[..., None]
    triplets = side[..., :, None] & side[..., None, :] & (places[:, :, None] != places[:, None, :])
    difference = _angles(student, counted, places) - _angles(teacher, counted, places)
    squares = difference.masked_fill(~triplets, 0).square()
    return squares.sum((-3, -2, -1)) / triplets.sum((-3, -2, -1)).clamp(min=1)


def _angles(points: Tensor, counted: Tensor, places: Tensor) -> Tensor:
    """Cosines ``[..., n, W, W]`` of the angles at each point j from the points places[j, :] to the same."""
    number = counted.sum(-1)[..., None, None].clamp(min=1)
    points = (points - points.sum(-2, keepdim=True) / number).masked_fill(~counted[..., None], 0)
    gram = points @ points.mT
    n = places.shape[0]
    flat, size = gram.flatten(-2), gram.diagonal(dim1=-2, dim2=-1)
    rows = torch.arange(n, device=places.device)[:, None] * n

    def products(where: Tensor) -> Tensor:
        return flat.index_select(-1, where.flatten()).reshape(*flat.shape[:-1], *where.shape)

    to_middle = products(rows + places)
    sizes = size[..., places] + size[..., None]
    squared = sizes - 2 * to_middle
    coincide = squared <= 16 * torch.finfo(gram.dtype).eps * sizes
    nearness = squared.masked_fill(coincide, 1).rsqrt().masked_fill(coincide, 0)
    between = products(places[:, :, None] * n + places[:, None, :])
    dot = between - to_middle[..., :, None] - to_middle[..., None, :] + size[..., None, None]
    return dot * nearness[..., :, None] * nearness[..., None, :]
