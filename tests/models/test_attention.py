from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdistill
from fastdistill.models import attention
from fastdistill.ops import gate_rules
from tests.encoders import CONFIGS, classifier, inputs

TEXT = sorted(CONFIGS.keys() - {"vit"})
OWN = ("bert", "distilbert", "mpnet")  # the others' attention is a copy of BERT's
LAYERS = 2
PADDING = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 8 + [0]])


def padded(kind: str) -> dict[str, Tensor]:
    return {**inputs(kind, 3), "attention_mask": PADDING}


def with_attention(kind: str, implementation: str, **changes: Any) -> Any:
    """Set in the configuration, where MPNet takes it too, though its attention is always its own."""
    model = classifier(kind, num_hidden_layers=LAYERS, **changes)
    model.config._attn_implementation = "eager" if kind == "mpnet" and implementation == "sdpa" else implementation
    return model


def as_it_is(model: Any) -> Any:
    return model


def compiled(model: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(model, backend="eager", fullgraph=True)


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...] | None]:
    """The shapes of the masks that reach the op."""
    seen: list[tuple[int, ...] | None] = []

    def watched(query: Tensor, key: Tensor, value: Tensor, gate: Any, mask: Tensor | None, *options: Any) -> Tensor:
        seen.append(None if mask is None else tuple(mask.shape))
        return fastdistill.gated_attention(query, key, value, gate, mask, *options)

    monkeypatch.setattr(attention, "gated_attention", watched)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("kind, run", [*((kind, as_it_is) for kind in TEXT), *((kind, compiled) for kind in OWN)])
def test_padding_is_a_mask_of_one_row(kind: str, run: Callable[[Any], Any], masks: list[Any]) -> None:
    batch = padded(kind)
    with torch.no_grad():
        logits = run(with_attention(kind, "fastdistill"))(**batch).logits
        torch.testing.assert_close(logits, with_attention(kind, "sdpa")(**batch).logits)
    assert masks == [(3, 1, 1, 9)] * (0 if kind == "mpnet" else LAYERS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_where_nothing_is_masked_there_is_no_mask(kind: str, masks: list[Any]) -> None:
    batches = [inputs(kind)] if kind == "vit" else [inputs(kind), {**inputs(kind), "attention_mask": torch.ones(2, 9)}]
    for batch in batches:
        masks.clear()
        with torch.no_grad():
            logits = with_attention(kind, "fastdistill")(**batch).logits
            torch.testing.assert_close(logits, with_attention(kind, "sdpa")(**batch).logits)
            assert masks == [None] * (0 if kind == "mpnet" else LAYERS)
            if kind in ("vit", *OWN) and "attention_mask" not in batch:  # compiled, a mask of ones is like any other
                torch.testing.assert_close(compiled(with_attention(kind, "fastdistill"))(**batch).logits, logits)


def test_other_masks_have_a_row_for_each_query(masks: list[Any]) -> None:
    batch = padded("bert")
    with torch.no_grad():
        logits = with_attention("bert", "fastdistill", is_decoder=True)(**batch).logits
        torch.testing.assert_close(logits, with_attention("bert", "sdpa", is_decoder=True)(**batch).logits)
    assert masks == [(3, 1, 9, 9)] * LAYERS


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
def test_onnx_export(gated: bool, tmp_path: Path) -> None:
    import onnxruntime

    model, batch = with_attention("bert", "fastdistill"), padded("bert")
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with torch.no_grad(), fastdistill.gate(model) if gated else nullcontext() as gates:
        if gates is not None:
            gates.heads = [torch.tensor([0.0, 0.5])] * 2
        torch.onnx.export(
            model, (), tmp_path / "model.onnx", kwargs=batch, dynamic_shapes=dict.fromkeys(batch, shape), verbose=False
        )
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        for tokens in (9, 5):
            some = {name: tensor[:2, :tokens] for name, tensor in batch.items()}
            (logits,) = session.run(None, {name: tensor.numpy() for name, tensor in some.items()})
            torch.testing.assert_close(torch.from_numpy(logits), model(**some).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_dropout_of_long_sequences_on_cpu_is_pytorchs(masked: bool) -> None:
    """It need not be drawn again for the gradients; a query that may attend to nothing has output 0 all the same."""
    keys = gate_rules.short_keys() + 5
    query, key = torch.randn(2, 4, 5, 8, requires_grad=True), torch.randn(2, 2, keys, 8, requires_grad=True)
    mask = torch.stack([torch.arange(keys) % 5 < 3, torch.zeros(keys, dtype=torch.bool)])[:, None, None]
    mask = mask if masked else None
    found = []
    options: dict[str, Any] = {"dropout": 0.5, "scaling": 0.3, "is_causal": False}
    for attend in (
        lambda: attention.attention_forward(nn.Module(), query, key, key, mask, **options)[0],
        lambda: F.scaled_dot_product_attention(query, key, key, mask, 0.5, scale=0.3, enable_gqa=True).transpose(1, 2),
    ):
        torch.manual_seed(0)
        output = attend()
        found.append([output, *torch.autograd.grad(output.square().sum(), (query, key))])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)
    assert not masked or (found[0][0][1] == 0).all()
