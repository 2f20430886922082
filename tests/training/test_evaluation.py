"""What evaluation tells of each kind of head."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Seq2SeqTrainer,
)

import fastdistill
from fastdistill import (
    DistillationTrainer,
    LogitsKD,
    Seq2SeqDistillationConfig,
    Seq2SeqDistillationTrainer,
)
from fastdistill.data.sequence_metrics import answer_metrics, entity_metrics, text_metrics
from fastdistill.models import packed
from fastdistill.training import trainer as trainer_module
from tests import heads, tiny
from tests.training.trained import GENERATORS, bert_trainer, trainer, without_labels

# Evaluation without labels


def test_without_labels_the_objective_is_evaluated(tmp_path: Path) -> None:
    data, unseen = (tiny.dataset(16, seed=s).remove_columns("labels") for s in (1, 2))
    student, teacher = tiny.bert(1, dropout=0.0), tiny.bert(2)
    t = DistillationTrainer(
        student,
        teacher_model=teacher,
        objective=LogitsKD(ce_weight=0.0),
        train_dataset=data,
        eval_dataset=unseen,
        args=tiny.config(
            tmp_path,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            metric_for_best_model="eval_loss",
            load_best_model_at_end=True,
            per_device_eval_batch_size=16,
        ),
        processing_class=tiny.tokenizer(),
    )
    t.train()
    batch = DataCollatorWithPadding(tiny.tokenizer())(list(unseen.remove_columns("length")))
    with torch.no_grad():
        p, q = ((m.eval()(**batch).logits.double() / 2).softmax(-1) for m in (teacher, t.model))
    expected = 4 * (p * (p / q).log()).sum(-1).mean().item()
    assert t.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert t.state.best_metric is not None
    stored = fastdistill.store(
        unseen, teacher, collate=DataCollatorWithPadding(tiny.tokenizer()), cache_file=tmp_path / "x.arrow"
    )
    teacher.forward = None
    assert t.evaluate(stored)["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert t.predict(unseen).metrics.keys().isdisjoint({"test_loss"})  # which runs no teacher
    with pytest.raises(ValueError, match="metric_for_best_model is 'eval_loss', but eval_dataset has no labels"):
        DistillationTrainer(
            tiny.bert(1),
            teacher_model=tiny.bert(2),
            train_dataset=tiny.dataset(8),
            eval_dataset=unseen,
            args=tiny.config(tmp_path, metric_for_best_model="eval_loss"),
        )


# Metrics in evaluation


@pytest.mark.parametrize("name", GENERATORS)
def test_texts_are_generated_as_by_transformers_own_trainer(tmp_path: Path, name: str) -> None:
    options = vars(tiny.config(tmp_path))
    kept = ("output_dir", "use_cpu", "disable_tqdm", "log_level", "save_strategy", "dataloader_pin_memory")
    args = Seq2SeqDistillationConfig(
        **{k: options[k] for k in kept}, max_steps=1, predict_with_generate=True, generation_max_length=6
    )
    tokenizer, rows = tiny.tokenizer(), heads.rows(name, 4)
    given = {"args": args, "eval_dataset": rows, "compute_metrics": text_metrics(tokenizer)}
    student = heads.model(name, 1)
    collate = DataCollatorForSeq2Seq(tokenizer, student)
    t = Seq2SeqDistillationTrainer(
        student, teacher_model=heads.model(name, 2), train_dataset=rows, data_collator=collate, **given
    )
    found = t.evaluate()
    expected = Seq2SeqTrainer(heads.model(name, 1), data_collator=collate, **given).evaluate()
    metrics = ("eval_loss", "eval_exact_match", "eval_f1", "eval_rouge_l")
    assert [found[k] for k in metrics] == pytest.approx([expected[k] for k in metrics], rel=1e-5)
    assert t.train().training_loss > 0
    with pytest.raises(TypeError, match="args is a DistillationConfig; expected Seq2SeqDistillationConfig"):
        Seq2SeqDistillationTrainer(student, tiny.config(tmp_path))


def test_a_decoder_without_labels_is_refused(tmp_path: Path) -> None:
    rows = without_labels(heads.rows("T5ForConditionalGeneration"))
    with pytest.raises(ValueError, match="train_dataset has no column 'labels', of which a decoder's inputs are made"):
        trainer(tmp_path, "T5ForConditionalGeneration", train_dataset=rows)


def test_entities_and_answers_are_measured(tmp_path: Path) -> None:
    """Over batches of several lengths, with padding that is no answer."""
    name = "BertForTokenClassification"
    names = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    args = {"per_device_eval_batch_size": 3}
    t = trainer(tmp_path, name, eval_dataset=heads.rows(name), compute_metrics=entity_metrics(names), args=args)
    assert 0 < t.evaluate()["eval_accuracy"] < 1
    name = "BertForQuestionAnswering"
    rows = heads.rows(name)
    t = trainer(tmp_path, name, eval_dataset=rows, compute_metrics=answer_metrics(), args=args)
    collators = (heads.collate, partial(heads.collate, more=9))
    found = []
    for t.data_collator in collators:
        found.append(t.evaluate())
    assert [found[1][k] for k in ("eval_f1", "eval_exact_match", "eval_loss")] == pytest.approx(
        [found[0][k] for k in ("eval_f1", "eval_exact_match", "eval_loss")], rel=1e-5
    )


# Copies of weights


@pytest.mark.parametrize("bf16", [False, True])
def test_weights_are_copied_in_what_they_are_multiplied_in(
    tmp_path: Path, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not for DataParallel, each of whose replicas would have the first one's."""
    given = []
    frozen = trainer_module.frozen
    monkeypatch.setattr(
        trainer_module, "frozen", lambda model, **options: given.append((model, options)) or frozen(model)
    )
    t = bert_trainer(tmp_path, eval_dataset=tiny.dataset(16), args_bf16=bf16)
    t.evaluate()
    t.args._n_gpu = 2
    t.evaluate()
    autocast = {"autocast": torch.bfloat16 if bf16 else None}
    assert given == [(t.model, autocast), (None, autocast)]


# Padding


def test_much_padding_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dataset is in no order of lengths; predictions are in the dataset's."""
    data, student = tiny.dataset(16), tiny.bert(1)
    arguments = {"eval_dataset": data, "processing_class": tiny.tokenizer()}
    t = DistillationTrainer(student, teacher_model=tiny.bert(2), args=tiny.config(tmp_path), **arguments)
    times = []
    inner = packed.packed
    monkeypatch.setattr(packed, "packed", lambda *given: times.append(given) or inner(*given))
    predicted = t.predict(data)
    assert times
    expected = [student(input_ids=torch.tensor([ids])).logits[0].tolist() for ids in data["input_ids"]]
    torch.testing.assert_close(torch.tensor(predicted.predictions), torch.tensor(expected))
    labels = torch.tensor(data["labels"][:])
    loss = torch.nn.functional.cross_entropy(torch.tensor(expected), labels)
    assert predicted.metrics["test_loss"] == pytest.approx(float(loss))


@pytest.mark.parametrize("width", [32, 20])
def test_evaluation_in_fewer_bits(tmp_path: Path, width: int) -> None:
    """transformers moves the model once it evaluates."""
    student = tiny.bert(1, intermediate_size=width)
    t = bert_trainer(tmp_path, student, eval_dataset=tiny.dataset(16), args_bf16_full_eval=True)
    loss = t.evaluate()["eval_loss"]
    assert next(student.parameters()).dtype == torch.bfloat16 and math.isfinite(loss)
