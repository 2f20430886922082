"""Scores of heads and neurons: normalised, mixed, ranked, and kept as safetensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastdistill.files import load_tensors, save_tensors
from fastdistill.ops.checks import check_choice, check_number

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Units = Literal["heads", "neurons"]
UNITS: tuple[Units, ...] = ("heads", "neurons")


@dataclass(frozen=True)
class Scores:
    """A score for every attention head and every feed-forward neuron: one vector a layer, ``[H]`` and ``[I]``."""

    heads: Sequence[Tensor]
    neurons: Sequence[Tensor]

    def __post_init__(self) -> None:
        if len(self.heads) != len(self.neurons):
            raise ValueError(f"heads has {len(self.heads)} layers, neurons {len(self.neurons)}; expected as many")
        for units in UNITS:
            for layer, values in enumerate(getattr(self, units)):
                if not isinstance(values, Tensor) or values.dim() != 1 or not values.is_floating_point():
                    what = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
                    raise ValueError(f"{units}[{layer}] is of {what}; expected a vector of floating-point numbers")

    def map(self, function: Callable[..., Tensor], *others: Scores) -> Scores:
        """The function of each layer's vector and those of the others."""
        return Scores(
            *(
                [function(*layer) for layer in zip(*(getattr(s, u) for s in (self, *others)), strict=True)]
                for u in UNITS
            )
        )

    def normalized(self, eps: float = 1e-7) -> Scores:
        """Divided, in each layer, by the l2 norm of the layer's heads or neurons, plus `eps`."""
        return self.map(lambda values: values / (torch.linalg.vector_norm(values) + eps))

    def lerp(self, other: Scores, weight: float) -> Scores:
        """``(1 - weight) * self + weight * other``."""
        return self.map(lambda ours, theirs: (1 - weight) * ours + weight * theirs, other)

    def kept(self, sparsity: float, round_to: int = 1) -> tuple[list[Tensor], list[Tensor]]:
        """The heads and the neurons that are left in each layer, as sorted indices, without the lowest
        ``round(sparsity * total)`` of all heads and of all neurons; see `fastdistill.prune`."""
        check_sparsity(sparsity)
        if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
            raise ValueError(f"round_to is {round_to!r}; expected a positive integer")
        return _best("heads", self.heads, sparsity, 1), _best("neurons", self.neurons, sparsity, round_to)

    def auto_sparsity(self, units: Units = "heads") -> float:
        """The share of the scores of these units up to the first peak of their density (STARK-AUTO, section 4.5).

        The density is a Gaussian kernel estimate with Scott's bandwidth. Raises ValueError where all are equal."""
        check_choice("units", units, UNITS)
        values = torch.cat([layer.detach().cpu().double() for layer in getattr(self, units)])
        return float((values <= first_peak(values)).double().mean())

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; it is the old one or the new one, whole, at any moment."""
        tensors = {f"{u}.{i}": v.contiguous() for u in UNITS for i, v in enumerate(getattr(self, u))}
        save_tensors(tensors, Path(path), {"layers": str(len(self.heads))})

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """What `save` wrote. Raises ValueError for any other file."""
        tensors, metadata = load_tensors(Path(path))
        layers = range(int(metadata.get("layers", len(tensors) // 2)))
        if tensors.keys() != {f"{u}.{i}" for u in UNITS for i in layers}:
            raise ValueError(f"{path} holds {', '.join(sorted(tensors))}; expected the scores of {len(layers)} layers")
        return cls(*([tensors[f"{units}.{layer}"] for layer in layers] for units in UNITS))


def density(values: Tensor, points: int = 1000) -> tuple[Tensor, Tensor]:
    """A Gaussian kernel estimate of the density of these numbers: where, in equal steps over their range, and what."""
    from scipy.stats import gaussian_kde

    if len(values) < 2 or not values.min() < values.max():
        raise ValueError(f"there are {len(values)} scores that are all equal; expected different numbers")
    where = torch.linspace(float(values.min()), float(values.max()), points, dtype=torch.float64)
    return where, torch.from_numpy(gaussian_kde(values.numpy())(where.numpy()))


def first_peak(values: Tensor) -> float:
    """Where the density of these numbers has its first maximum."""
    where, height = density(values)
    falls = torch.cat([height.diff() < 0, torch.tensor([True])])
    return float(where[int(falls.double().argmax())])


def mix(expressiveness: Any, friendliness: Any, tradeoff: float) -> Any:
    """``tradeoff * expressiveness + (1 - tradeoff) * friendliness``, both normalised; the former without the latter."""
    check_number("tradeoff", tradeoff, minimum=0)
    if tradeoff > 1 or (tradeoff < 1 and friendliness is None):
        wanted = "from 0 to 1" if friendliness is not None else "1: there was no student"
        raise ValueError(f"tradeoff is {tradeoff!r}; expected {wanted}")
    ours = expressiveness.normalized()
    return ours if friendliness is None else friendliness.normalized().lerp(ours, tradeoff)


def check_sparsity(sparsity: float) -> None:
    check_number("sparsity", sparsity, minimum=0)
    if sparsity > 1:
        raise ValueError(f"sparsity is {sparsity!r}; expected a number from 0 to 1")


def random_scores(model: PreTrainedModel, generator: torch.Generator) -> Scores:
    """Scores that prune at random: each head and each neuron equally often (STARK-RAND)."""
    from fastdistill.models.architectures import blocks

    layers = blocks(model)
    return Scores(
        [torch.rand(block.heads, generator=generator) for block in layers],
        [torch.rand(block.neurons, generator=generator) for block in layers],
    )


def _best(units: Units, scores: Sequence[Tensor], sparsity: float, round_to: int) -> list[Tensor]:
    values = torch.cat([layer.detach().cpu().double() for layer in scores])
    if values.isnan().any():
        raise ValueError(f"the scores of {units} hold NaN; expected numbers")
    stays = torch.ones(len(values), dtype=torch.bool)
    stays[values.argsort(stable=True)[: round(sparsity * len(values))]] = False
    found = []
    for layer, flags in zip(scores, stays.split([len(layer) for layer in scores]), strict=True):
        number = int(flags.sum())
        rounded = min(int(number / round_to + 0.5) * round_to, len(layer))
        if rounded != number:
            best = layer.detach().cpu().argsort(stable=True)[len(layer) - rounded :]
            flags = torch.zeros_like(flags).index_fill(0, best, True)
        found.append(flags.nonzero().squeeze(1))
    return found
