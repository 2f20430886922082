"""Proximity-weighted convolution (PWCN): the sentiment of aspects, by what is near them; and LSTMs to compare with."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fastdistill.data.aspects import word_tokenizer
from fastdistill.data.parsing import Parser
from fastdistill.models import word_vectors
from fastdistill.models.pwcn import PWCNForSequenceClassification, aspect_classifier
from fastdistill.objectives.logits import LogitsKD, TaskLoss
from fastdistill.recipes import plots
from fastdistill.recipes.begin import load, stages_of
from fastdistill.recipes.comparison import Comparison
from fastdistill.recipes.examples import of_aspects
from fastdistill.recipes.executors import executor_of
from fastdistill.recipes.output import of_one_run
from fastdistill.recipes.report import Report
from fastdistill.recipes.settings import PWCNSettings
from fastdistill.recipes.splits import Splits

RATE = 1e-3
REFERENCES = ("lstm", "pwcn-pos")


@of_one_run
def pwcn(settings: PWCNSettings) -> Report:
    """Do the recipe, and write results.json and the plot.

    1. Sentences are divided into words, and each word's distance from the aspect is measured: in words and, with a
       parser, in the dependency tree.
    2. Words get vectors, from a file, of an encoder's tokens, or at random.
    3. The models learn from the labels, each seed's with weights of its own, drawn alike.
    """
    if not settings.no_plots:
        plots.require_matplotlib()
    executor_of(settings)  # if it cannot be, say so before anything is written
    parser = None if settings.parser is None else Parser(settings.parser)
    data = load(settings, aspects=True)
    if data.task.is_regression or data.task.multi_label:
        raise ValueError(f"--task {settings.task} has no classes, one an example; expected such labels")
    tokenizer = _tokenizer(data)
    vectors, known = _vectors(settings, tokenizer)

    learning_rate = settings.learning_rate or RATE
    stages = stages_of(settings, of_aspects(data, tokenizer, parser))
    objective = TaskLoss(settings.smoothing)
    comparison = Comparison(
        settings,
        data,
        stages,
        learning_rate,
        kd=LogitsKD(),  # of which there is none
        student_from=None,
        in_place=True,
        references=REFERENCES,
    )

    def model(variant: str, seed: int) -> PWCNForSequenceClassification:
        return aspect_classifier(
            data.task,
            vectors,
            seed=seed,
            variant=variant,
            hidden_size=settings.hidden_size,
            form=settings.form,
            dropout=settings.dropout,
            trains_vectors=settings.train_vectors or settings.vectors == "random",
        )

    trained = comparison.train(
        (one, comparison.training(variant, model(variant, one.seed), (objective, None)))
        for variant in settings.variants
        for one in comparison.seeded
    )
    for variant in settings.variants:
        comparison.summarize(variant, [next(trained).result for _ in comparison.seeded])

    drawn = [] if settings.no_plots else _plot(settings, comparison)
    record: dict[str, Any] = settings.record() | {"learning_rate": learning_rate} | data.names
    return comparison.finish(record, plots=drawn, words={"all": len(vectors), "with_vectors": known})


def _tokenizer(data: Splits) -> PreTrainedTokenizerFast:
    """Of the words of all splits: the vectors of those that train lacks are known from elsewhere."""
    splits = (data.train, data.select, data.report, data.mismatched)
    return word_tokenizer(chain.from_iterable(split["sentence1"][:] for split in splits if split is not None))


def _vectors(settings: PWCNSettings, tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, int]:
    """Of all the tokenizer's words, in the order of their numbers, and how many are known."""
    vocabulary = tokenizer.get_vocab()
    words = sorted(vocabulary, key=lambda word: vocabulary[word])
    if settings.vectors == "random":
        return word_vectors.at_random(len(words), settings.hidden_size, settings.seed), 0
    of = word_vectors.from_file if Path(settings.vectors).is_file() else word_vectors.from_encoder
    return of(settings.vectors, words)


def _plot(settings: PWCNSettings, comparison: Comparison) -> list[Path]:
    """models.svg."""
    levels: dict[str, plots.Levels] = {
        name: comparison.interval(comparison.results[name]) for name in settings.variants
    }
    return [plots.levels(settings.folder / "models.svg", comparison.metric, levels, str(comparison.told))]
