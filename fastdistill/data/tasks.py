"""The tasks known by name: their labels, metric and maximum length, and where the hub keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fastdistill.data.docstrings import LABEL_NAMES as DOCSTRING_LABELS

METRICS = ("accuracy", "f1", "spearman", "matthews")
MULTI_LABEL_METRICS = ("f1_micro", "f1_macro")

_SINGLE = ("sentence1",)
_PAIR = ("sentence1", "sentence2")


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hugging Face hub: its repository, configuration, text columns and split names.

    `validation` is None where the hub has no such split; a tenth of train then serves. `test` is None where
    there is none or its labels are withheld. `mismatched` is validation of other sources than train has
    (MNLI's), which is reported beside.
    """

    path: str
    config: str | None
    text_columns: tuple[str, ...]
    validation: str | None = "validation"
    test: str | None = None
    mismatched: str | None = None


@dataclass(frozen=True)
class Task:
    """A task of sentences, of pairs of sentences, or of images.

    name: what it is called.
    text_columns: ("sentence1",) or ("sentence1", "sentence2"); () where the examples are images.
    label_names: the classes in the order of their numbers, or None for a regression task (one output).
    metric: "accuracy", "f1", "spearman" or "matthews", with several labels "f1_micro" or "f1_macro"; see
        `fastdistill.data.metrics.compute_metrics`.
    max_length: tokens an example is cut to, special tokens included; of no meaning for images.
    label_range: least and greatest label of a regression task, or None where any finite number will do.
    hub: where `load_task` finds it by name, or None.
    multi_label: whether an example may have several of the labels, or none.
    """

    name: str
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...] | None
    metric: str
    max_length: int
    label_range: tuple[float, float] | None = None
    hub: HubDataset | None = None
    multi_label: bool = False

    def __post_init__(self) -> None:
        if self.text_columns not in (_SINGLE, _PAIR, ()):
            raise ValueError(f"text_columns is {self.text_columns!r}; expected {_SINGLE}, {_PAIR} or () for images")
        if self.multi_label and self.label_names is None:
            raise ValueError("multi_label is True but label_names is None; expected the labels")
        metrics = MULTI_LABEL_METRICS if self.multi_label else METRICS
        if self.metric not in metrics:
            raise ValueError(f"metric is {self.metric!r}; expected one of {', '.join(metrics)}")
        if (self.metric == "spearman") != self.is_regression:
            raise ValueError(
                f"metric {self.metric!r} does not fit label_names={self.label_names!r}: "
                "'spearman' is for regression (None), the others are for classes"
            )
        if self.label_names is not None and len(set(self.label_names)) != len(self.label_names):
            raise ValueError(f"label_names is {self.label_names!r}; expected different ones")
        if self.label_names is not None and len(self.label_names) < 2:
            raise ValueError(f"label_names is {self.label_names!r}; expected two or more, or None for regression")
        if self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length!r}; expected at least 1")

    @property
    def is_of_images(self) -> bool:
        return not self.text_columns

    @property
    def is_regression(self) -> bool:
        return self.label_names is None

    @property
    def num_labels(self) -> int:
        """The width of a model's output: the number of classes, or 1 for regression."""
        return 1 if self.label_names is None else len(self.label_names)

    @property
    def problem_type(self) -> str:
        """What transformers' configs call it."""
        if self.is_regression:
            return "regression"
        return "multi_label_classification" if self.multi_label else "single_label_classification"


def _glue(
    name: str,
    hub_columns: tuple[str, ...],
    label_names: tuple[str, ...] | None,
    metric: str = "accuracy",
    max_length: int = 128,
    label_range: tuple[float, float] | None = None,
    validation: str = "validation",
    mismatched: str | None = None,
) -> Task:
    hub = HubDataset("nyu-mll/glue", name, hub_columns, validation, mismatched=mismatched)
    return Task(name, _PAIR[: len(hub_columns)], label_names, metric, max_length, label_range, hub)


_GLUE = (
    _glue("cola", ("sentence",), ("unacceptable", "acceptable"), "matthews"),
    _glue("sst2", ("sentence",), ("negative", "positive"), max_length=64),
    _glue("mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), "f1"),
    _glue("stsb", ("sentence1", "sentence2"), None, "spearman", label_range=(0.0, 5.0)),
    _glue("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), "f1"),
    _glue(
        "mnli",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        validation="validation_matched",
        mismatched="validation_mismatched",
    ),
    _glue("qnli", ("question", "sentence"), ("entailment", "not_entailment")),
    _glue("rte", ("sentence1", "sentence2"), ("entailment", "not_entailment")),
    _glue("wnli", ("sentence1", "sentence2"), ("not_entailment", "entailment")),
)
_AG_NEWS = Task(
    "ag_news",
    _SINGLE,
    ("World", "Sports", "Business", "Sci/Tech"),
    "accuracy",
    max_length=128,
    hub=HubDataset("fancyzhx/ag_news", None, ("text",), validation=None, test="test"),
)
_EMOTION = Task(
    "emotion",
    _SINGLE,
    ("sadness", "joy", "love", "anger", "fear", "surprise"),
    "accuracy",
    max_length=64,
    hub=HubDataset("dair-ai/emotion", "split", ("text",), test="test"),
)
_IMDB = Task(
    "imdb",
    _SINGLE,
    ("neg", "pos"),
    "accuracy",
    max_length=256,
    hub=HubDataset("stanfordnlp/imdb", None, ("text",), validation=None, test="test"),
)
_DOCSTRINGS = Task("docstrings", _SINGLE, DOCSTRING_LABELS, "accuracy", max_length=64)

TASKS: Mapping[str, Task] = MappingProxyType(
    {task.name: task for task in (*_GLUE, _AG_NEWS, _EMOTION, _IMDB, _DOCSTRINGS)}
)
"""Every task known by name. "docstrings" comes from the running Python's own library and needs no network."""
