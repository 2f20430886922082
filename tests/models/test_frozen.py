from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdistill.models.architectures import ARCHITECTURES, blocks
from fastdistill.models.frozen import frozen
from fastdistill.models.narrowing import without
from fastdistill.models.packed import packed_forward
from tests.accuracy import assert_accurate
from tests.models.known import IMAGES, NO_CLASSIFIER, batch_of, model_of

NEURONS = (17, 5)
"""Of 24, in either layer."""


def pruned(kind: str, **changes: Any) -> Any:
    model = model_of(kind, **changes)
    layers = blocks(model)
    own = [torch.arange(1, 1 + number) for number in NEURONS[: len(layers)]]
    return without(model, [torch.arange(block.heads) for block in layers], own).eval()


def widths(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, set[int]]:
    """Its logits, and how many neurons its layers computed."""
    seen, original, biases = set(), nn.functional.linear, {id(block.neuron_out.bias) for block in blocks(model)}

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if id(bias) in biases:
            seen.add(input.shape[-1])
        return original(input, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", linear)
        return model(**batch).logits, seen


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind not in NO_CLASSIFIER])
def test_says_the_same(kind: str) -> None:
    model, batch = pruned(kind).double(), batch_of(kind)
    if kind in IMAGES:
        batch = {"pixel_values": batch["pixel_values"].double()}
    expected = model(**batch).logits
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    with frozen(model):
        torch.testing.assert_close(model(**batch).logits, expected, equal_nan=True)  # Gemma 2's own, of no tokens
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0, equal_nan=True)
    assert all("forward" not in vars(module) for module in model.modules())
    torch.testing.assert_close(dict(model.state_dict()), weights, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_computes_multiples(kind: str) -> None:
    model, batch = pruned(kind), batch_of(kind)
    assert widths(model, batch)[1] == set(NEURONS)
    with frozen(model):
        assert widths(model, batch)[1] == {16, 32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_accuracy(dtype: torch.dtype) -> None:
    model, batch = pruned("bert"), batch_of("bert")
    exact = pruned("bert").double()(**batch).logits
    plain = model.to(dtype)(**batch).logits
    with frozen(model):
        assert_accurate(model(**batch).logits, exact, plain)
        assert_accurate(packed_forward(model, batch).logits, exact, plain)


class Casts(TorchDispatchMode):
    """Counts a model's weights and biases that are cast."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.places, self.number = {weight.data_ptr() for weight in model.parameters()}, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.places
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast(dtype: torch.dtype) -> None:
    """Weights are cast once, and only for autocast of that dtype."""
    model, batch = pruned("bert"), batch_of("bert")
    single, exact = model(**batch).logits, pruned("bert").double()(**batch).logits
    with torch.autocast("cpu", dtype), Casts(model) as plainly:
        plain = model(**batch).logits
    with frozen(model, autocast=dtype):
        with torch.autocast("cpu", dtype), Casts(model) as copied:
            assert_accurate(model(**batch).logits, exact, plain)
        with torch.autocast("cpu", dtype):
            assert_accurate(packed_forward(model, batch).logits, exact, plain)
        torch.testing.assert_close(model(**batch).logits, single)
        other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
        with torch.autocast("cpu", other):
            assert model(**batch).logits.dtype == other
    assert plainly.number == 2 * 14 and copied.number == 0  # two layers of six, pooler and classifier
    double = model.double()
    with frozen(double, autocast=dtype), torch.autocast("cpu", dtype):
        assert double(**batch).logits.dtype == torch.float64


def test_gradients_are_those_of_the_weights() -> None:
    model, batch = pruned("bert"), batch_of("bert")
    expected = torch.autograd.grad(model(**batch).logits.square().sum(), list(model.parameters()), allow_unused=True)
    with frozen(model):
        found = torch.autograd.grad(model(**batch).logits.square().sum(), list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@torch.no_grad()
def test_what_stays_as_it_is() -> None:
    """Whole models, modules that are no plain linear maps, and those that someone looks at."""
    batch = batch_of("bert")
    seen: list[int] = []
    watched = pruned("bert")
    for block in blocks(watched):
        block.neuron_out.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1]))
    with frozen(watched):
        watched(**batch)
    assert seen == list(NEURONS)
    compiled: Any = torch.compile(pruned("bert"))
    for model in (model_of("bert", intermediate_size=32), pruned("gpt2"), compiled):
        with frozen(model):
            inner = getattr(model, "_orig_mod", model)
            assert all(getattr(vars(module).get("forward"), "same", True) for module in inner.modules())
    assert all("forward" not in vars(module) for module in compiled._orig_mod.modules())


@torch.no_grad()
@pytest.mark.parametrize("change", ["moved", "loaded", "replaced", "one of two"])
def test_weights_that_change_are_seen(change: str) -> None:
    """As where transformers' `bf16_full_eval` moves a model once it evaluates."""
    model, other, batch = pruned("bert"), pruned("bert", initializer_range=0.5), batch_of("bert")
    with frozen(model):
        model(**batch)
        if change == "moved":
            model.bfloat16()
        elif change == "loaded":
            model.load_state_dict(other.state_dict())
        elif change == "replaced":
            for name, weight in other.named_parameters():
                owner, _, own = name.rpartition(".")
                setattr(model.get_submodule(owner), own, weight)
        else:
            for block in blocks(model):
                block.neuron_out.weight.mul_(2)
                block.neuron_in[0].bias.add_(1)
        found = model(**batch).logits
    torch.testing.assert_close(found, model(**batch).logits)
