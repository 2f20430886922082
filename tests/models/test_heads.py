from __future__ import annotations

import pytest
import transformers

from fastdistill.models.heads import head_of, named_task

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 40}


@pytest.mark.parametrize(
    ("name", "task", "kind"),
    [
        ("RoFormerForSequenceClassification", "SequenceClassification", "BertForSequenceClassification"),
        ("RoFormerForTokenClassification", "TokenClassification", "BertForTokenClassification"),
        ("BertForMaskedLM", "MaskedLM", "RoFormerForMaskedLM"),
    ],
)
def test_a_class_whose_name_has_for_twice(name: str, task: str, kind: str) -> None:
    def make(name: str) -> transformers.PreTrainedModel:
        config = transformers.RoFormerConfig if name.startswith("RoFormer") else transformers.BertConfig
        return getattr(transformers, name)(config(**SIZES))  # type: ignore[no-any-return]

    model = make(name)
    assert named_task(model) == task
    assert head_of(model) == head_of(make(kind))


def test_a_model_without_a_head_has_no_task() -> None:
    assert named_task(transformers.BertModel(transformers.BertConfig(**SIZES))) == ""
