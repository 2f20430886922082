"""Settings as Python has them; tests/test_cli.py has them as options."""

from __future__ import annotations

import argparse
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from fastdistill.ops.kd_ce_loss import DIVERGENCES
from fastdistill.ops.select_uncertain import STRATEGIES
from fastdistill.recipes.settings import (
    RECIPES,
    AutoSKDSettings,
    DeKDSettings,
    KDSettings,
    PeaKDSettings,
    RecipeSettings,
    StarkSettings,
)
from fastdistill.recipes.settings.arguments import add_arguments, from_arguments

ASKED = {"task": "sst2", "teacher": "minilm", "student_layers": 2, "output": "run"}


def test_what_is_not_given_is_the_default() -> None:
    asked = StarkSettings(**ASKED)
    assert (asked.epochs, asked.batch_size, asked.selection, asked.sparsity) == (3.0, 32, ("knowledge",), None)
    assert asked.sparsities == tuple(n / 10 for n in range(1, 10))
    assert asked.output == asked.folder == Path("run")
    with pytest.raises(FrozenInstanceError):
        asked.epochs = 2.0  # type: ignore[misc]


@pytest.mark.parametrize("settings", RECIPES.values())
def test_the_command_line_asks_the_same(settings: type[RecipeSettings]) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser, settings)
    asked: dict[str, Any] = {name: value for name, value in ASKED.items() if name not in settings.unused}
    given = [str(part) for name, value in asked.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert from_arguments(settings, parser.parse_args(given)) == settings(**asked)
    assert all(field.metadata["option"].help for field in fields(settings))


def test_lists_are_kept_as_tuples() -> None:
    asked = DeKDSettings(**ASKED, ratio=[0.25, 0.5], without=[["ds"], ["ta", "doa"]])  # type: ignore[arg-type]
    assert asked.ratio == (0.25, 0.5)
    assert asked.without == (("ds",), ("ta", "doa"))


def test_baselines_without_names_are_those_of_true() -> None:
    for settings, meant in (
        (KDSettings, ("none", "kd")),
        (AutoSKDSettings, ("none", "kd", "single", "avgkd", "mtbert")),
    ):
        parser = argparse.ArgumentParser()
        add_arguments(parser, settings)
        given = ["--task", "sst2", "--teacher", "minilm", "--student-layers", "2", "--output", "run"]
        alone = from_arguments(settings, parser.parse_args([*given, "--baselines"]))
        assert alone == settings(**ASKED, baselines=True)
        assert alone.baselines == meant
        assert settings(**ASKED, baselines=False) == settings(**ASKED)
        named = from_arguments(settings, parser.parse_args([*given, "--baselines", "pkd, takd"]))
        assert named == settings(**ASKED, baselines=["pkd", "takd"])
        assert named.baselines == ("pkd", "takd")


def test_a_flag_without_a_default_may_be_refused() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser, PeaKDSettings)
    given = ["--task", "sst2", "--teacher", "minilm", "--student-layers", "2", "--output", "run"]
    for more, meant in (([], None), (["--store-hidden-states"], True), (["--no-store-hidden-states"], False)):
        asked = from_arguments(PeaKDSettings, parser.parse_args([*given, *more]))
        assert asked == PeaKDSettings(**ASKED, store_hidden_states=meant)
        assert asked.store_hidden_states is meant


def test_what_is_offered_is_what_the_ops_have() -> None:
    kinds = {field.name: field.metadata["option"].kind for field in fields(StarkSettings)}
    assert set(kinds["divergence"].among) <= set(DIVERGENCES)
    kinds = {field.name: field.metadata["option"].kind for field in fields(DeKDSettings)}
    assert set(kinds["strategy"].item.among) == set(STRATEGIES)


@pytest.mark.parametrize(
    "settings, given, message",
    [
        (KDSettings, {"epochs": 0}, "epochs is 0; expected a finite number above 0"),
        (KDSettings, {"epochs": "3"}, "epochs is '3'; expected a finite number above 0"),
        (KDSettings, {"epochs": float("nan")}, "epochs is nan; expected a finite number"),
        (KDSettings, {"epochs": None}, "epochs is None; expected a finite number"),
        (KDSettings, {"batch_size": True}, "batch_size is True; expected an integer of at least 1"),
        (KDSettings, {"seed": -1}, "seed is -1; expected an integer from 0 to 4294967295"),
        (KDSettings, {"bf16": 1}, "bf16 is 1; expected True or False"),
        (KDSettings, {"task": Path("x")}, "task is PosixPath.*; expected a text"),
        (KDSettings, {"output": 3}, "output is 3; expected a path"),
        (KDSettings, {"teacher": None}, "teacher is None; expected a text"),
        (KDSettings, {"student_layers": None}, "student_layers is None; expected an integer of at least 1"),
        (KDSettings, {"divergence": "js"}, "divergence is 'js'; expected one of forward_kl, soft_ce, reverse_kl"),
        (KDSettings, {"seeds": (1, 1)}, r"seeds is \(1, 1\); expected one or more, each an integer .*, all different"),
        (
            KDSettings,
            {"baselines": ("dk",)},
            r"baselines is \('dk',\); expected one or more, each one of none, kd, dkd",
        ),
        (KDSettings, {"baselines": "kd"}, "baselines is 'kd'; expected one or more"),
        (KDSettings, {"student_layers": 1, "baselines": ("ckd",)}, "--student-layers is 1; --baselines ckd relates"),
        (
            KDSettings,
            {"baselines": ("none",), "kd_temperature": 3.0},
            "--kd-temperature would have no effect without --baselines",
        ),
        (KDSettings, {"seeds": 1}, "seeds is 1; expected one or more"),
        (
            StarkSettings,
            {"selection": ("dynabert",), "unstructured": True},
            "--selection dynabert is of heads and neurons",
        ),
        (StarkSettings, {"selection": ("dynabert",), "tradeoff": (0.1,)}, "--tradeoff would have no effect"),
        (KDSettings, {"seeds": ()}, r"seeds is \(\); expected one or more"),
        (
            StarkSettings,
            {"sparsity": (1.0,)},
            r"sparsity is \(1.0,\); expected one or more, each a finite number above 0",
        ),
        (StarkSettings, {"student_sparsity": 0.5}, "expected either --student-layers or --student-sparsity"),
        (DeKDSettings, {"without": ("ds",)}, "without is 'ds'; expected one or more, each one of ds, ta, doa"),
        (DeKDSettings, {"without": "ds"}, "without is 'ds'; expected a list"),
        (DeKDSettings, {"align_layers": 3}, "--align-layers is 3; the student has 2"),
        (PeaKDSettings, {"threshold": (0.6, 0.7, 0.8)}, "--threshold has 3 numbers; expected one or two"),
        (PeaKDSettings, {"without": (("sps", "swap"),)}, "swap changes nothing without sps"),
        (AutoSKDSettings, {"order": 3}, "order is 3; expected one of 1, 2"),
        (AutoSKDSettings, {"kd_temperature": 2.0}, "--kd-temperature would have no effect"),
    ],
)
def test_what_cannot_be_asked(settings: type[RecipeSettings], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**ASKED | given)
