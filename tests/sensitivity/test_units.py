from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdistill
from fastdistill import CKD, DKD, MSE, PKD, LogitsKD, WeightedSum
from fastdistill.models import attention
from fastdistill.objectives.logits import TaskLoss
from fastdistill.ops import gate_rules
from fastdistill.ops.gate_rules import short_keys
from fastdistill.sensitivity import units
from tests.accuracy import assert_accurate
from tests.processes import start
from tests.tiny import batches, pair


def one_by_one(teacher: Any, data: Any, student: Any, objective: Any, reduce: str) -> list[list[Tensor]]:
    """P and Q by two backward passes for every single example, weights' gradients and all."""
    teacher.eval(), student.eval()
    totals: list[Any] = [0, 0]
    count = 0
    for batch in data:
        sums: list[Any] = [0, 0]
        for row in range(len(batch["labels"])):
            example = {name: value[row : row + 1] for name, value in batch.items()}
            labels = example.pop("labels")
            for place, loss in enumerate((TaskLoss(), objective)):
                with fastdistill.gate(teacher) as gates:
                    theirs = teacher(**example, output_hidden_states=True)
                    ours = student(**example, output_hidden_states=True)
                    value = loss(theirs, None, labels) if place == 0 else loss(ours, theirs, labels)
                    found = torch.cat(torch.autograd.grad(value, gates.tensors))
                sums[place] = sums[place] + (found.abs() if reduce == "example" else found)
        for place in range(2):
            totals[place] += sums[place] if reduce == "example" else sums[place].abs() / len(batch["labels"])
        count += len(batch["labels"]) if reduce == "example" else 1
    sizes = [2, 2, 32, 32]
    return [list((total / count).split(sizes)) for total in totals]


OBJECTIVES = {
    "default": None,
    "kl with labels": LogitsKD(temperature=3.0),
    "decoupled": DKD(temperature=3.0),
    "patient": WeightedSum({"pkd": (2.0, PKD("last")), "kd": (1.0, LogitsKD(ce_weight=0.0))}),
    "function": lambda student, teacher, labels: (student.logits - teacher.logits).square().mean(),
}


@pytest.mark.parametrize("reduce", ["example", "batch"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("classes", [2, 3])
def test_scores_are_those_of_a_loop_over_examples(classes: int, objective: str, reduce: Any) -> None:
    teacher, student = pair(classes)
    data = batches(classes=classes)
    chosen = OBJECTIVES[objective]
    found = fastdistill.score(teacher, data, student, objective=chosen, reduce=reduce, progress=False)
    default = LogitsKD(temperature=2.0, divergence="soft_ce", ce_weight=0.0)
    expected = one_by_one(teacher, data, student, chosen or default, reduce)
    for scores, wanted in zip((found.expressiveness, found.friendliness), expected, strict=True):
        for layer, values in zip([*scores.heads, *scores.neurons], wanted, strict=True):
            torch.testing.assert_close(layer.double(), values, rtol=1e-5, atol=1e-12)


def test_regression() -> None:
    teacher, student = pair(1)
    data = batches(classes=1)
    found = fastdistill.score(teacher, data, student, progress=False)
    expected = one_by_one(teacher, data, student, MSE(label_weight=0.0), "example")
    for scores, wanted in zip((found.expressiveness, found.friendliness), expected, strict=True):
        for layer, values in zip([*scores.heads, *scores.neurons], wanted, strict=True):
            torch.testing.assert_close(layer.double(), values, rtol=1e-5, atol=1e-12)


REVERSE = LogitsKD(divergence="reverse_kl")
SUM = WeightedSum({"kd": (2.0, LogitsKD()), "reverse": (1.0, REVERSE), "ce": (1.0, TaskLoss())})


@pytest.mark.parametrize("objective", [None, SUM])
@pytest.mark.parametrize("classes, backwards", [(1, 1), (2, 1), (3, 2)])
def test_how_many_backward_passes_there_are(
    classes: int, backwards: int, objective: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if objective is SUM and classes == 1:
        pytest.skip("a sum for classes")
    teacher, student = pair(classes)
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda outputs, inputs, *a, **k: calls.append(inputs) or grad(outputs, inputs, *a, **k)
    )
    fastdistill.score(teacher, batches((4,), classes), student, objective=objective, progress=False)
    assert sum(isinstance(inputs, list) for inputs in calls) == backwards


def test_the_models_are_left_as_they_were() -> None:
    teacher, student = pair()
    teacher.train(), student.train()
    teacher.classifier.weight.requires_grad_(False)
    flags = [p.requires_grad for p in teacher.parameters()]
    fastdistill.score(teacher, batches(), student, progress=False)
    assert [p.requires_grad for p in teacher.parameters()] == flags
    assert teacher.training and student.training and all(module.training for module in teacher.modules())
    assert all(p.grad is None for p in [*teacher.parameters(), *student.parameters()])


def test_a_model_that_has_neither_heads_nor_neurons() -> None:
    teacher, student = pair()
    none = fastdistill.prune(teacher, fastdistill.score(teacher, batches(), progress=False).expressiveness, 1.0)
    found = fastdistill.score(none, batches(), student, progress=False).knowledgeable()
    assert [len(layer) for layer in (*found.heads, *found.neurons)] == [0] * 4


def test_without_a_student() -> None:
    teacher, student = pair()
    alone = fastdistill.score(teacher, batches(), progress=False)
    both = fastdistill.score(teacher, batches(), student, progress=False)
    assert alone.friendliness is None
    for ours, theirs in zip(alone.expressiveness.neurons, both.expressiveness.neurons, strict=True):
        torch.testing.assert_close(ours, theirs)
    alone.knowledgeable(tradeoff=1.0)
    with pytest.raises(ValueError, match="tradeoff is 0.5; expected 1: there was no student"):
        alone.knowledgeable()


def test_knowledgeable_scores_are_interpolated() -> None:
    teacher, student = pair()
    found = fastdistill.score(teacher, batches(), student, progress=False)
    assert found.friendliness is not None
    mixed = found.knowledgeable(tradeoff=0.25)
    for layer in range(2):
        p, q = (s.heads[layer] / s.heads[layer].norm() for s in (found.expressiveness, found.friendliness))
        torch.testing.assert_close(mixed.heads[layer], 0.25 * p + 0.75 * q, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="tradeoff is 1.5; expected from 0 to 1"):
        found.knowledgeable(1.5)


@pytest.mark.parametrize("kd", [LogitsKD(temperature=2.0), PKD("last")])
def test_unlabelled_examples_do_not_count(kd: Any) -> None:
    teacher, student = pair()
    (batch,) = batches((5,))
    some = {name: value[:3] for name, value in batch.items()}
    batch["labels"] = torch.cat([batch["labels"][:3], torch.tensor([-100, -100])])
    found = fastdistill.score(teacher, [batch], student, objective=kd, progress=False)
    expected = fastdistill.score(teacher, [some], student, objective=kd, progress=False)
    for scores in ("expressiveness", "friendliness"):
        for ours, theirs in zip(getattr(found, scores).neurons, getattr(expected, scores).neurons, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_scoring_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "SAVE_EVERY", 2)
    teacher, student = pair()
    data, file = batches((2,) * 7), tmp_path / "score.safetensors"
    expected = fastdistill.score(teacher, data, student, progress=False)

    def cut(at: int) -> Any:
        for number, batch in enumerate(data):
            if number == at:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        fastdistill.score(teacher, cut(5), student, checkpoint=file, progress=False)
    assert file.is_file()
    calls: list[Any] = []
    teacher.register_forward_hook(lambda *args: calls.append(args))
    found = fastdistill.score(teacher, data, student, checkpoint=file, progress=False)
    assert len(calls) == 3  # the fifth was not yet written down
    again = fastdistill.score(teacher, data, student, checkpoint=file, progress=False)
    assert torch.equal(again.expressiveness.heads[0], expected.expressiveness.heads[0])
    assert len(calls) == 3
    file.unlink()
    for ours, theirs in zip(found.friendliness.neurons, expected.friendliness.neurons, strict=True):  # type: ignore[union-attr]
        assert torch.equal(ours, theirs)

    with pytest.raises(KeyboardInterrupt):
        fastdistill.score(teacher, cut(5), student, checkpoint=file, progress=False)
    with torch.no_grad():
        student.classifier.bias += 1
    changed = fastdistill.score(teacher, data, student, checkpoint=file, progress=False)
    other = fastdistill.score(teacher, data, student, progress=False)
    assert torch.equal(changed.friendliness.heads[0], other.friendliness.heads[0])  # type: ignore[union-attr]

    others = ([{**data[0], "labels": 1 - data[0]["labels"]}, *data[1:]], data[:3])
    for batches_of_others in others:
        with pytest.raises(ValueError, match="of other batches than loader gives"):
            fastdistill.score(teacher, batches_of_others, student, checkpoint=file, progress=False)

    file.write_bytes(b"no")
    with pytest.raises(ValueError, match="no safetensors file, or damaged"):
        fastdistill.score(teacher, data, student, checkpoint=file, progress=False)


def _rank(rank: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29641"}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/store")
    teacher, student = pair()
    found = fastdistill.score(teacher, batches((4, 3))[rank : rank + 1], student, progress=False)
    found.knowledgeable().save(f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_sum_what_they_find(tmp_path: Path) -> None:
    two = [start(_rank, rank, str(tmp_path), said=tmp_path / "said") for rank in range(2)]
    for process in two:
        process.join(300)
    assert [process.exitcode for process in two] == [0, 0], (tmp_path / "said").read_text()
    teacher, student = pair()
    expected = fastdistill.score(teacher, batches((4, 3)), student, progress=False).knowledgeable()
    for rank in range(2):
        found = fastdistill.Scores.load(tmp_path / f"{rank}.safetensors")
        for ours, theirs in zip(found.neurons, expected.neurons, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_what_cannot_be_scored() -> None:
    teacher, student = pair()
    with pytest.raises(ValueError, match="reduce is 'mean'"):
        fastdistill.score(teacher, batches(), student, reduce="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="student is the teacher itself"):
        fastdistill.score(teacher, batches(), teacher, progress=False)
    with torch.inference_mode(), pytest.raises(ValueError, match="expected outside it"):
        fastdistill.score(teacher, batches(), progress=False)
    with pytest.raises(ValueError, match="objective is given but student is None"):
        fastdistill.score(teacher, batches(), objective=LogitsKD())
    with pytest.raises(ValueError, match="loader gave a batch without labels: input_ids"):
        fastdistill.score(teacher, [{"input_ids": torch.ones(1, 2, dtype=torch.long)}], student, progress=False)
    with pytest.raises(ValueError, match="no labelled example"):
        fastdistill.score(teacher, [], student, progress=False)
    with pytest.raises(ValueError, match="objective is TaskLoss.*; expected one of a single teacher's outputs"):
        fastdistill.score(teacher, batches(), student, objective=TaskLoss(), progress=False)
    with pytest.raises(ValueError, match="loader gave a batch without attention_mask: input_ids, labels"):
        bare = [{name: batch[name] for name in ("input_ids", "labels")} for batch in batches()]
        fastdistill.score(teacher, bare, student, objective=CKD(), progress=False)


@pytest.mark.parametrize("objective", ["default", "patient"])
@pytest.mark.parametrize("classes", [2, 3])
def test_under_autocast(classes: int, objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, where attention is this package's also on a CPU; sums are of float32."""
    teacher, student = pair(classes)
    data, kd = batches(classes=classes), OBJECTIVES[objective]
    expected = fastdistill.score(teacher, data, student, objective=kd, progress=False)
    teacher, student = teacher.float(), student.float()
    attended = []
    own = attention.gated_attention
    monkeypatch.setattr(
        attention, "gated_attention", lambda query, *others: attended.append(query.dtype) or own(query, *others)
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = fastdistill.score(teacher, data, student, objective=kd, progress=False)
        assert set(attended) == ({torch.bfloat16} if short_keys() else set())
        monkeypatch.setattr(gate_rules, "heads_by_kernel", lambda query: False)
        plain = fastdistill.score(teacher, data, student, objective=kd, progress=False)
    for kind in ("expressiveness", "friendliness"):
        given = (torch.cat([*getattr(s, kind).heads, *getattr(s, kind).neurons]) for s in (found, expected, plain))
        ours, exact, eager = given
        assert ours.dtype == torch.float32 and not torch.equal(ours, exact.float())
        assert_accurate(ours, exact.double(), eager, kind)
