"""Models on a GPU: without padding, their first token alone, within gates, and what is found of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithPadding

import fastdistill
from fastdistill import LogitsKD, first_token_only
from fastdistill.data.load import load_task
from fastdistill.models import packed
from fastdistill.models.packed import packed_forward
from fastdistill.objectives.logits import TaskLoss
from fastdistill.recipes.examples import of_text
from fastdistill.recipes.executors import Local, Stacked, Trial
from fastdistill.recipes.optimization import Optimization
from fastdistill.recipes.splits import Splits
from fastdistill.recipes.stages import Stages
from fastdistill.recipes.training import Trained, Training
from tests import tiny
from tests.accuracy import assert_accurate, relative_error

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bert(seed: int = 0, **config: Any) -> Any:
    """Of heads as wide as vendors' attention takes them."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.1, "dropout": 0.0}
    return tiny.bert(seed, **shape | config).eval()


def ragged() -> dict[str, Tensor]:
    tokens = torch.randint(5, 65, (6, 19), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(19) < torch.tensor([4, 19, 1, 4, 6, 2])[:, None]).long()
    return {"input_ids": tokens * mask, "attention_mask": mask}


def there(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(DEVICE) for name, value in batch.items()}


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_without_padding(dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits by attention of varying lengths, where PyTorch has it."""
    model, batch = bert(layers=3), ragged()
    exact = model.double()(**batch).logits
    low = model.to(DEVICE, torch.float32 if autocast else dtype)
    called: list[Tensor] = []
    varlen = packed._varlen_attn()

    def noted(query: Tensor, *others: Any) -> Tensor:
        called.append(query)
        found: Tensor = varlen(query, *others)
        return found

    monkeypatch.setattr(packed, "_varlen_attn", lambda: None if varlen is None else noted)
    with torch.autocast("cuda", dtype, enabled=autocast and dtype != torch.float32):
        found = packed_forward(low, there(batch), batch["attention_mask"]).logits
        eager = low(**there(batch)).logits
    assert len(called) == (0 if varlen is None or dtype == torch.float32 else 2)
    assert_accurate(found.cpu(), exact, eager.cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["sdpa", "fastdistill"])
def test_the_first_token_alone(dtype: torch.dtype, implementation: str) -> None:
    model, batch = bert(layers=2, attn_implementation=implementation), ragged()

    def found(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        logits = model(**batch).logits
        logits.square().sum().backward()
        gradients = {name: weight.grad.cpu() for name, weight in model.named_parameters() if "key.bias" not in name}
        return {"logits": logits.detach().cpu(), **gradients}

    exact = found(copy.deepcopy(model).double(), batch)
    model.to(DEVICE, dtype)
    eager = found(model, there(batch))
    with first_token_only(model):
        ours = found(model, there(batch))
    for name, value in ours.items():
        allowed = 4 * relative_error(eager[name], exact[name]) + 4 * torch.finfo(dtype).eps
        assert relative_error(value, exact[name]) <= allowed, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("learns", [False, True])
def test_within_gates(dtype: torch.dtype, learns: bool) -> None:
    """Logits, and gradients of gates, as on the CPU in double precision; closed ones among them."""
    model, batch = bert(layers=2), ragged()
    draw = torch.Generator().manual_seed(3)
    heads = [torch.tensor([0.0, 0.7]), torch.tensor([1.3, 0.4])]
    neurons = [torch.rand(96, generator=draw) * (torch.arange(96) % 3 > 0) for _ in range(2)]

    def found(model: Any, batch: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        with fastdistill.gate(model) as gates:
            gates.heads[:] = [one.to(device, dtype).requires_grad_(learns) for one in heads]
            gates.neurons[:] = [one.to(device, dtype).requires_grad_(learns) for one in neurons]
            logits = model(**batch).logits
            if learns:
                logits.square().sum().backward()
            gradients = [one.grad for one in (*gates.heads, *gates.neurons) if one.grad is not None]
        return [logits.detach().cpu().double(), *(one.cpu().double() for one in gradients)]

    exact = found(copy.deepcopy(model).double(), batch, torch.device("cpu"), torch.float64)
    ours = found(model.to(DEVICE, dtype), there(batch), DEVICE, dtype)
    assert len(ours) == len(exact) == (5 if learns else 1)
    for value, expected in zip(ours, exact, strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(value, expected, rtol=0, atol=(1e-4 if dtype == torch.float32 else 5e-2) * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [2, 3])
def test_scores_are_those_on_a_cpu(dtype: torch.dtype, classes: int) -> None:
    models = [bert(seed, layers=layers, num_labels=classes) for seed, layers in ((0, 3), (1, 2))]
    loader = tiny.batches((4, 3), classes)
    exact = fastdistill.score(models[0].double(), loader, models[1].double(), progress=False)
    for model in models:
        model.to(DEVICE, dtype)
    ours = fastdistill.score(models[0], loader, models[1], progress=False)
    for found, expected in ((ours.expressiveness, exact.expressiveness), (ours.friendliness, exact.friendliness)):
        assert found is not None
        assert expected is not None
        for one, other in zip([*found.heads, *found.neurons], [*expected.heads, *expected.neurons], strict=True):
            scale = float(other.abs().max())
            atol = (1e-3 if dtype == torch.float32 else 1e-1) * scale
            torch.testing.assert_close(one.cpu().double(), other.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("bf16", [False, True])
def test_what_is_stored_is_what_is_said_on_a_cpu(tmp_path: Path, bf16: bool) -> None:
    model, rows, collate = bert(layers=3), tiny.dataset(32), DataCollatorWithPadding(tiny.tokenizer())
    options = {"collate": collate, "batch_size": 8, "hidden_states": True}
    exact = fastdistill.store(rows, model, cache_file=tmp_path / "cpu/x.arrow", **options)
    ours = fastdistill.store(rows, model, cache_file=tmp_path / "gpu/x.arrow", device=DEVICE, bf16=bf16, **options)
    for name in ("teacher_logits", "teacher_hidden_states"):
        found, expected = (torch.tensor(one[name][:]) for one in (ours, exact))
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=(5e-2 if bf16 else 1e-4) * scale)
    assert model.device.type == "cpu"


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_students_side_by_side_become_what_they_do_alone(
    tmp_path: Path, cuda_graphs: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """By plain descent: Adam makes steps of gradients that are nothing but rounding."""
    tiny.task_folder(tmp_path / "task", train=50)
    task = load_task(tmp_path / "task")
    splits = Splits(task.task, task.train, task.validation, task.validation, "validation", "validation")
    examples, optimization = of_text(splits, tiny.tokenizer()), Optimization(optim="sgd", momentum=0.9)

    def trained(executor: Any, name: str) -> list[Trained]:
        begun = Stages(
            tmp_path / name, examples, batch_size=16, cuda_graphs=cuda_graphs, optimization=optimization, patience=4
        )
        kd = Training(
            name="kd", model=tiny.bert(1, layers=1, dropout=0.0), objective=LogitsKD(), teacher=tiny.bert(5),
            epochs=8, learning_rate=0.05, batch_size=16,
        )  # fmt: skip
        alone = Training(
            name="alone", model=kd.model, objective=TaskLoss(), epochs=8, learning_rate=0.02, batch_size=16
        )
        found: list[Trained] = executor([Trial(begun.seeded(3), kd), Trial(begun.seeded(4), alone)])
        return found

    ours, expected = trained(Stacked(), "stacked"), trained(Local(), "local")
    said = capsys.readouterr().err
    assert "2 side by side: kd, alone" in said
    assert "no CUDA graphs" not in said
    for one, other in zip(ours, expected, strict=True):
        assert one.log[-1]["epoch"] == other.log[-1]["epoch"]
        for name, weight in one.model.state_dict().items():
            theirs = other.model.state_dict()[name]
            torch.testing.assert_close(
                weight, theirs, rtol=1e-3, atol=1e-4, msg=lambda said, name=name: f"{name}: {said}"
            )
