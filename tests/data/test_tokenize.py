import random

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from fastdistill.data.load import tokenize
from fastdistill.data.tasks import TASKS, Task
from tests.data.written import single


@pytest.fixture
def tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "a"]
    core = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"], model_max_length=12,
    )  # fmt: skip


SST2, STSB = TASKS["sst2"], TASKS["stsb"]
CLASSES = datasets.Dataset.from_list(single([("a good film", 1), ("bad", 0)]))


def test_tokenized_columns(tokenizer):
    found = tokenize(CLASSES, tokenizer, SST2)
    assert set(found.column_names) == {"input_ids", "attention_mask", "token_type_ids", "labels", "length"}
    assert found["input_ids"][:] == [[2, 7, 4, 6, 3], [2, 5, 3]]
    assert found["attention_mask"][:] == [[1] * 5, [1] * 3]
    assert found["length"][:] == [5, 3]
    assert found["labels"][:] == [1, 0] and found.features["labels"] == datasets.Value("int64")


def test_pairs_are_tokenized_together(tokenizer):
    rows = datasets.Dataset.from_list([{"sentence1": "a film", "sentence2": "bad", "label": 2.5, "genre": "x"}])
    found = tokenize(rows, tokenizer, STSB)
    assert found[0] == {
        "input_ids": [2, 7, 6, 3, 5, 3], "token_type_ids": [0, 0, 0, 0, 1, 1], "attention_mask": [1] * 6,
        "labels": 2.5, "length": 6,
    }  # fmt: skip
    assert found.features["labels"] == datasets.Value("float32")


def test_labels_of_other_types_are_cast(tokenizer):
    small = CLASSES.cast_column("label", datasets.ClassLabel(names=["negative", "positive"]))
    assert tokenize(small, tokenizer, SST2).features["labels"] == datasets.Value("int64")


def test_texts_are_cut(tokenizer):
    long = datasets.Dataset.from_list(single([("good " * 40, 1)]))
    assert tokenize(long, tokenizer, SST2)["length"][:] == [12]  # the tokenizer's, less than the task's 64
    assert tokenize(long, tokenizer, SST2, max_length=6)["input_ids"][:] == [[2, 4, 4, 4, 4, 3]]
    tokenizer.model_max_length = 512
    assert tokenize(long, tokenizer, Task("t", ("sentence1",), ("a", "b"), "accuracy", 9))["length"][:] == [9]
    pair = datasets.Dataset.from_list([{"sentence1": "good " * 40, "sentence2": "bad", "label": 1.0}])
    assert tokenize(pair, tokenizer, STSB, max_length=8)["input_ids"][:] == [[2, 4, 4, 4, 4, 3, 5, 3]]


def test_a_tokenizer_without_token_types(tokenizer):
    tokenizer.model_input_names = ["input_ids"]
    found = tokenize(CLASSES, tokenizer, SST2)
    assert set(found.column_names) == {"input_ids", "attention_mask", "labels", "length"}


def test_tokenizing_again_has_the_same_fingerprint(tokenizer):
    fingerprints = [tokenize(CLASSES, tokenizer, SST2)._fingerprint for _ in range(2)]
    tokenizer("something else", padding="max_length", truncation=True, max_length=3)
    fingerprints.append(tokenize(CLASSES, tokenizer, SST2)._fingerprint)
    assert len(set(fingerprints)) == 1
    assert tokenize(CLASSES, tokenizer, SST2, max_length=4)._fingerprint != fingerprints[0]


def test_what_cannot_be_tokenized(tokenizer):
    with pytest.raises(ValueError, match=r"lacks the columns \['sentence2'\] of task 'stsb'; it has"):
        tokenize(CLASSES, tokenizer, STSB)
    with pytest.raises(ValueError, match=r"lacks the columns \['label'\]"):
        tokenize(CLASSES.remove_columns("label"), tokenizer, SST2)
    with pytest.raises(ValueError, match="dataset has no rows; expected one or more"):
        tokenize(CLASSES.select([]), tokenizer, SST2)
    for length in (0, 13):
        with pytest.raises(ValueError, match=f"max_length is {length}; expected from 1 to the tokenizer's 12"):
            tokenize(CLASSES, tokenizer, SST2, max_length=length)
    with pytest.raises(TypeError, match="max_length is 6.0; expected an integer"):
        tokenize(CLASSES, tokenizer, SST2, max_length=6.0)


def test_trainer_groups_batches_by_length_and_pads_them(tokenizer, tmp_path):
    lengths = random.Random(0)
    rows = datasets.Dataset.from_list(single([("good " * lengths.randint(1, 10), k % 2) for k in range(256)]))
    train = tokenize(rows, tokenizer, SST2)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(vocab_size=8, **sizes))

    def padding(strategy):
        options = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=8, train_sampling_strategy=strategy,
            use_cpu=True, report_to="none",
        )  # fmt: skip
        trainer = Trainer(model, options, train_dataset=train, processing_class=tokenizer)
        batches = list(trainer.get_train_dataloader())
        assert sum(int(batch["attention_mask"].sum()) for batch in batches) == sum(train["length"])
        assert {str(batch["labels"].dtype) for batch in batches} == {"torch.int64"}
        return sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)

    assert padding("group_by_length") < 0.2 * padding("random")
