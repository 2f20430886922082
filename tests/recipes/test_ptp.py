from __future__ import annotations

from typing import Any

import pytest
import torch

import fastdistill
from fastdistill.recipes.methods.ptp import PTP_LABELS, count_ptp_labels, ptp_labels, ptp_student, with_body_of
from tests import tiny
from tests.encoders import CONFIGS, classifier, inputs

PROBABILITIES = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.3, 0.7]])
LABELS = torch.tensor([0, 1, 1, 0, 1, 0])


@pytest.mark.parametrize(
    "threshold, expected",
    [
        (0.8, [0, 1, 2, 3, 1, 3]),
        ((0.8,), [0, 1, 2, 3, 1, 3]),
        ((0.8, 0.65), [0, 1, 2, 3, 1, 2]),
        ((0.65, 0.8), [0, 1, 2, 3, 0, 3]),
        (1.0, [1, 1, 3, 3, 1, 3]),
        (0.51, [0, 0, 2, 2, 0, 2]),
    ],
)
def test_labels_say_whether_the_teacher_is_right_and_confident(threshold: Any, expected: list[int]) -> None:
    found = ptp_labels(PROBABILITIES.log() + 3, LABELS, threshold)
    assert found.dtype == torch.int64
    assert found.tolist() == expected
    counts = count_ptp_labels(found)
    assert list(counts) == list(PTP_LABELS)
    assert list(counts.values()) == [expected.count(label) for label in range(4)]  # 0 too


def test_more_classes_other_types_and_no_rows() -> None:
    logits = torch.tensor([[0.0, 9.0, 0.0], [1.0, 0.9, 0.8]])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert ptp_labels(logits.to(dtype), torch.tensor([1, 2])).tolist() == [0, 3]
    assert ptp_labels(torch.empty(0, 2), torch.empty(0, dtype=torch.int64)).tolist() == []
    assert set(count_ptp_labels(torch.empty(0, dtype=torch.int64)).values()) == {0}


def test_a_confidence_that_is_the_threshold_is_none() -> None:
    logits = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
    top = logits.softmax(-1).max().item()
    assert ptp_labels(logits, torch.tensor([0]), top).tolist() == [1]
    assert ptp_labels(logits, torch.tensor([0]), top - 1e-12).tolist() == [0]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"logits": torch.zeros(6, 1)}, ValueError, r"logits has shape \(6, 1\)"),
        ({"logits": torch.zeros(6)}, ValueError, r"logits has shape \(6,\)"),
        ({"logits": torch.full((6, 2), float("nan"))}, ValueError, "logits has NaN"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, ValueError, r"labels has shape \(5,\); expected \(6,\)"),
        ({"labels": torch.zeros(6)}, TypeError, "labels has dtype torch.float32; expected integers"),
        ({"threshold": 0.5}, ValueError, "threshold is 0.5; expected one or two numbers"),
        ({"threshold": (0.8, 1.1)}, ValueError, r"threshold is \(0.8, 1.1\)"),
        ({"threshold": (0.8, 0.7, 0.6)}, ValueError, "expected one or two numbers"),
        ({"threshold": ()}, ValueError, "expected one or two numbers"),
        ({"threshold": float("nan")}, ValueError, "expected one or two numbers"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ptp_labels(**{"logits": PROBABILITIES, "labels": LABELS} | change)


OUTPUT = dict.fromkeys(("camembert", "electra", "mpnet", "roberta", "xlm-roberta"), "classifier.out_proj.")
"""Where the output layer is one of a head of several."""


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_head_is_replaced_and_comes_back(kind: str) -> None:
    student, batch = fastdistill.shuffled_sharing(classifier(kind)), inputs(kind)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    state = torch.random.get_rng_state()
    ptp = ptp_student(student)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(ptp) is type(student)
    assert ptp.num_parameters() > student.num_parameters()  # a fourth class, and no weight of the encoder's twice
    again, other = ptp_student(student), ptp_student(student, seed=1)
    torch.testing.assert_close(again.state_dict(), ptp.state_dict(), rtol=0, atol=0)
    assert ptp.config.id2label == dict(enumerate(PTP_LABELS))
    assert student.config.num_labels == student.num_labels == 3
    same = {name: value for name, value in before.items() if not name.startswith(OUTPUT.get(kind, "classifier."))}
    torch.testing.assert_close({name: ptp.state_dict()[name] for name in same}, same, rtol=0, atol=0)

    optimizer = torch.optim.SGD(ptp.parameters(), lr=0.1)
    outputs = ptp(**batch, labels=torch.tensor([0, 3]))
    assert outputs.logits.shape == (2, 4)
    assert not torch.equal(other(**batch).logits, outputs.logits)
    outputs.loss.backward()
    optimizer.step()
    found = with_body_of(student, ptp)
    assert found.num_parameters() == student.num_parameters()
    learned, output = ptp.state_dict(), OUTPUT.get(kind, "classifier.")
    for name, value in found.state_dict().items():  # the head's other layers too are what was learned
        torch.testing.assert_close(value, before[name] if name.startswith(output) else learned[name], rtol=0, atol=0)
    if "." in output.rstrip("."):
        assert not torch.equal(found.state_dict()["classifier.dense.weight"], before["classifier.dense.weight"])
    torch.testing.assert_close(student.state_dict(), before, rtol=0, atol=0)
    assert found(**batch).logits.shape == (2, 3)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_the_students(training: bool) -> None:
    for kind in ("bert", "electra", "vit"):
        ptp = ptp_student(classifier(kind).train(training))
        assert all(module.training == training for module in ptp.modules())


def test_of_a_task_of_four_classes_too_the_output_is_replaced() -> None:
    student = tiny.bert(num_labels=4)
    assert not torch.equal(ptp_student(student, seed=1).classifier.weight, student.classifier.weight)
    again = with_body_of(student, ptp_student(student, seed=1))
    torch.testing.assert_close(again.classifier.weight, student.classifier.weight, rtol=0, atol=0)


def test_a_model_on_labels_of_one_class() -> None:
    """A class without examples is a class all the same."""
    ptp = ptp_student(tiny.bert())
    batch = {"input_ids": torch.randint(5, 60, (4, 6)), "labels": torch.ones(4, dtype=torch.int64)}
    ptp(**batch).loss.backward()
    assert all(p.grad.isfinite().all() for p in ptp.parameters() if p.grad is not None)
