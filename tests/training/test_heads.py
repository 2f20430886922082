"""Every kind of head is trained and evaluated by its own meaning of labels."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    DataCollatorWithPadding,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    EarlyStoppingCallback,
)

import fastdistill
from fastdistill import (
    MSE,
    DistillationTrainer,
    LogitsKD,
)
from fastdistill.models.heads import head_of
from fastdistill.models.inputs import inputs_of
from tests import heads, tiny
from tests.training.trained import GENERATORS, log, trainer, without_labels

PER_TOKEN = ("BertForTokenClassification", "BertForMaskedLM", "LlamaForCausalLM", "GPT2LMHeadModel")
ALL = (*PER_TOKEN, *GENERATORS, "BertForQuestionAnswering", "BertForSequenceClassification")
KD = LogitsKD(ce_weight=0.0)


# The task's own loss


@pytest.mark.parametrize("name", ALL)
def test_the_evaluation_is_transformers_own_loss(tmp_path: Path, name: str) -> None:
    rows = heads.rows(name, 8, seed=3, length=7 if name.endswith("Answering") else None)  # whose padding it counts
    t = trainer(tmp_path, name, eval_dataset=rows)
    with torch.no_grad():
        expected = t.model.eval().double()(**heads.collate(rows)).loss.item()
    assert t.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)  # it computes in float32


@pytest.mark.parametrize("name", ALL)
def test_the_student_learns_by_both_terms_of_the_same_rows(tmp_path: Path, name: str) -> None:
    """An eager loop in float64: softmax by softmax over the rows of logits whose label counts."""
    rows = heads.rows(name, 6)
    t = trainer(tmp_path, name, train_dataset=rows, args={"max_steps": 1, "train_sampling_strategy": "sequential"})
    batch = heads.collate(rows)
    with torch.no_grad():
        ours, theirs = (model.double().eval()(**batch) for model in (heads.model(name, 1), heads.model(name, 2)))
    kd, ce, counted = 0.0, 0.0, 0
    for z_s, z_t, labels in eager(name, ours, theirs, batch):
        for row, label in enumerate(labels.tolist()):
            if label != -100:
                p, q = (z_t[row] / 2).softmax(-1), (z_s[row] / 2).softmax(-1)
                kd, counted = kd + 4 * float((p * (p / q).log()).sum()), counted + 1
                ce -= float(z_s[row].log_softmax(-1)[label])
    t.train()
    entry = t.state.log_history[0]
    assert entry["kd"] == pytest.approx(kd / counted, rel=1e-4)
    assert entry["ce"] == pytest.approx(ce / counted, rel=1e-4)
    assert entry["loss"] == pytest.approx((kd + ce) / counted, rel=1e-4)


def eager(name: str, ours: Any, theirs: Any, batch: dict[str, Tensor]) -> Any:
    """Student's logits, teacher's, and labels, example by example."""
    for b in range(len(batch["input_ids"])):
        if name.endswith("QuestionAnswering"):
            tokens = int(batch["attention_mask"][b].sum())
            for side in ("start", "end"):
                z_s, z_t = (out[f"{side}_logits"][b : b + 1, :tokens] for out in (ours, theirs))
                yield z_s, z_t, batch[f"{side}_positions"][b : b + 1]
        elif name.endswith("SequenceClassification"):
            yield ours.logits[b : b + 1], theirs.logits[b : b + 1], batch["labels"][b : b + 1]
        elif name in ("LlamaForCausalLM", "GPT2LMHeadModel"):
            yield ours.logits[b, :-1], theirs.logits[b, :-1], batch["labels"][b, 1:]
        else:
            yield ours.logits[b], theirs.logits[b], batch["labels"][b]


# What counts


@pytest.mark.slow
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("name", [*PER_TOKEN, "BertForQuestionAnswering"])
def test_padding_counts_nowhere(tmp_path: Path, name: str, labelled: bool) -> None:
    """The same rows padded by 0 and by 12 tokens; without labels distillation knows of padding by attention alone."""
    rows = heads.rows(name, 4)
    objective, data = (LogitsKD(), rows) if labelled else (KD, without_labels(rows))
    collators = (heads.collate, partial(heads.collate, more=12))
    one, other = (
        log(trainer(tmp_path, name, objective, train_dataset=data, data_collator=collate)) for collate in collators
    )
    assert len(one) == 2
    assert other == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForTokenClassification"])
def test_padding_on_the_left_counts_nowhere(name: str) -> None:
    """Nor is a token predicted from padding, where transformers' collators would label it."""
    rows = heads.rows(name, 3)
    head = head_of(heads.model(name))
    for left in (False, True):
        batch = heads.collate(rows, more=3, left=left)
        batch["labels"] = batch["labels"].where(batch["labels"] != -100, 7)  # labels of padding count no more
        labels, counted = head.labels(batch), head.counted(None, batch)
        assert labels is not None and counted is not None
        assert (labels != -100).sum(1).tolist() == [len(r["input_ids"]) - (name == "LlamaForCausalLM") for r in rows]
        assert ((labels != -100) == (counted == 0)).all()


def test_answers_beyond_the_text_do_not_count(tmp_path: Path) -> None:
    name = "BertForQuestionAnswering"
    rows = heads.rows(name, 4, length=6)
    beyond = [{**rows[0], "start_positions": 30, "end_positions": 30}, *rows[1:]]
    t = trainer(tmp_path, name, eval_dataset=beyond)
    with torch.no_grad():
        expected = t.model.eval()(**heads.collate(beyond)).loss.item()
    assert t.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert head_of(t.model).labels(heads.collate(beyond)).tolist()[0] == [-100, -100]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["BertForTokenClassification", "LlamaForCausalLM", "T5ForConditionalGeneration"])
@pytest.mark.parametrize("labelled", [True, False])
def test_accumulated_tokens_weigh_alike(tmp_path: Path, name: str, labelled: bool) -> None:
    if not labelled and name.startswith("T5"):
        pytest.skip("a decoder's inputs are made of labels")
    rows = heads.rows(name, 8)
    objective, data = (LogitsKD(), rows) if labelled else (KD, without_labels(rows))
    states = []
    for size, accumulate in ((8, 1), (2, 4)):
        args = {
            "max_steps": 1,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulate,
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "train_sampling_strategy": "sequential",
        }
        t = trainer(tmp_path, name, objective, train_dataset=data, args=args)
        losses = log(t)
        states.append((losses, {k: v.clone() for k, v in t.model.state_dict().items()}))
    assert states[0][0] == pytest.approx(states[1][0], rel=1e-4)
    torch.testing.assert_close(states[0][1], states[1][1], rtol=1e-4, atol=1e-6)


# What each model is given


def distilbert(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 65, "max_position_embeddings": 32}
    return DistilBertForSequenceClassification(DistilBertConfig(**sizes, num_labels=2, dropout=0.0))


def typed(number: int = 8) -> Any:
    data = tiny.dataset(number)
    types = [[place % 2 for place in range(len(ids))] for ids in data["input_ids"]]
    return data.add_column("token_type_ids", types)


def test_each_model_is_given_what_its_forward_takes(tmp_path: Path) -> None:
    seen = []
    teacher = tiny.bert(2)
    teacher.bert.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["token_type_ids"].sum().item()), with_kwargs=True
    )
    student, data = distilbert(1), typed()
    options = {"args": tiny.config(tmp_path, max_steps=2, logging_steps=1), "processing_class": tiny.tokenizer()}
    live = DistillationTrainer(student, teacher_model=teacher, train_dataset=data, eval_dataset=data, **options)
    losses = log(live, "kd")
    assert len(seen) == 2
    assert min(seen) > 0
    assert live.evaluate()["eval_loss"] > 0
    stored = fastdistill.store(
        data, teacher, collate=DataCollatorWithPadding(tiny.tokenizer()), cache_file=tmp_path / "x.arrow"
    )
    kept = DistillationTrainer(distilbert(1), train_dataset=stored, **options)
    assert log(kept, "kd") == pytest.approx(losses, rel=1e-5)


def test_an_input_that_no_model_takes_is_refused() -> None:
    student, teacher = distilbert(1), tiny.bert(2)
    batch = {"input_ids": 0, "token_type_ids": 1, "labels": 2, "odd": 3}
    assert inputs_of(student, batch, others=[teacher]).keys() == {"input_ids", "odd"}
    assert inputs_of(teacher, batch).keys() == {"input_ids", "token_type_ids"}


@pytest.mark.parametrize("name", GENERATORS)
def test_each_decoder_begins_with_its_own_token(tmp_path: Path, name: str) -> None:
    teacher = heads.model(name, 2, decoder_start_token_id=5)
    begun = []
    teacher.get_decoder().register_forward_pre_hook(
        lambda m, a, k: begun.append(k["input_ids"][:, 0].unique().tolist()), with_kwargs=True
    )
    log(trainer(tmp_path, name, teacher_model=teacher))
    assert begun == [[5]] * 2


# Refused when constructed


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("LlamaForCausalLM", {"objective": fastdistill.PKD()}, "of the one token that a classifier looks at"),
        (
            "BertForTokenClassification",
            {"objective": fastdistill.DeKD(da_weight=0)},
            "is of examples, but model is for",
        ),
        ("BertForTokenClassification", {"objective": MSE()}, "for one output, but model has 5; expected LogitsKD"),
        (
            "BertForTokenClassification",
            {"teacher_model": heads.model("BertForMaskedLM", 2, num_labels=5)},
            "teacher_model is for masked_lm but model for token_classification",
        ),
        (
            "LlamaForCausalLM",
            {"train_dataset": [{**row, "teacher_logits": [0.0] * 64} for row in heads.rows("LlamaForCausalLM")]},
            "the column 'teacher_logits', of one row of logits an example, but model is for causal_lm",
        ),
    ],
)
def test_what_a_head_is_not_for_is_named(tmp_path: Path, name: str, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, name, **options)


@pytest.mark.parametrize("name", ["BertForTokenClassification", "BertForQuestionAnswering"])
def test_logits_of_every_token_are_not_stored(name: str) -> None:
    with pytest.raises(ValueError, match=f"model {name} is for .*, with logits of every token; expected a classifier"):
        fastdistill.store(tiny.dataset(4), heads.model(name), collate=heads.collate)


def test_a_head_of_unknown_labels_is_named(tmp_path: Path) -> None:
    from transformers import BertForPreTraining

    models = [BertForPreTraining(heads.model("BertForMaskedLM").config) for _ in range(2)]
    with pytest.raises(ValueError, match="model is a BertForPreTraining, of whose head it is not known"):
        trainer(tmp_path, "BertForMaskedLM", model=models[0], teacher_model=models[1])


# The token that a classifier looks at


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "GPT2ForSequenceClassification"])
@pytest.mark.parametrize("left", [False, True])
def test_pkd_of_decoders_is_of_the_token_that_the_head_takes(tmp_path: Path, name: str, left: bool) -> None:
    rows = heads.rows(name, 6)
    found = []

    class Seen(fastdistill.PKD):
        def parts(self, student: Any, teacher: Any, labels: Any) -> Any:
            found.append((student, teacher))
            return super().parts(student, teacher, labels)

    collate = partial(heads.collate, more=2, left=left)
    t = trainer(tmp_path, name, Seen(), train_dataset=rows, data_collator=collate, args={"max_steps": 1})
    t.train()
    student, teacher = found[0]
    assert student.hidden_states[-1].shape == (6, 1, 16)
    with torch.no_grad():
        given = t.teacher_model.score(teacher.hidden_states[-1][:, 0])
    torch.testing.assert_close(given, teacher.logits)
    expected = F.normalize(teacher.hidden_states[1][:, 0], dim=-1) - F.normalize(student.hidden_states[1][:, 0], dim=-1)
    assert t.state.log_history[0]["loss"] == pytest.approx(expected.square().mean().item(), rel=1e-5)


# What Trainer's options do


def test_outputs_are_returned_with_the_loss(tmp_path: Path) -> None:
    t = trainer(tmp_path, "BertForTokenClassification")
    batch = heads.collate(heads.rows("BertForTokenClassification", 3))
    t.current_gradient_accumulation_steps = 1
    for mode in (True, False):
        loss, outputs = t.compute_loss(t.model.train(mode), dict(batch), return_outputs=True)
        assert loss.dim() == 0
        assert outputs.logits.shape == (*batch["input_ids"].shape, 5)


def test_a_run_stops_early(tmp_path: Path) -> None:
    args = {
        "max_steps": 20,
        "learning_rate": 0.0,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    }
    rows = heads.rows("BertForSequenceClassification")
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    t = trainer(tmp_path, "BertForSequenceClassification", eval_dataset=rows, callbacks=[stop], args=args)
    t.train()
    assert t.state.global_step == 3


def test_a_student_may_be_made_when_it_is_trained(tmp_path: Path) -> None:
    made = []

    def make() -> Any:
        made.append(heads.model("LlamaForCausalLM", 1))
        return made[-1]

    given, late = (
        log(trainer(tmp_path, "LlamaForCausalLM", **options)) for options in ({}, {"model": None, "model_init": make})
    )
    assert late == pytest.approx(given, rel=1e-5)
    assert made
