"""The `fastdistill` command."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from fastdistill import recipes
from fastdistill.recipes.settings import RECIPES, RecipeSettings
from fastdistill.recipes.settings.arguments import add_arguments, from_arguments

EXPORT = (
    "write a model that fastdistill reshaped as a plain one, which transformers, and all that reads its folders, load"
)

TURNS = "10000"
"""That a thread of OpenMP waits for others of its group before it sleeps. With GNU's default, some hundred thousand,
a training beside other busy processes gets much less than its share of the cores (a step of a 2-layer MiniLM by two
threads on two cores, beside four busy processes: 1.9 s, with so many turns 0.9 s; alone 0.17 s with either)."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """One line, in place of the usage and a line."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, 2 for something wrong with what was asked, 130 if interrupted."""
    parser = _Parser(prog="fastdistill", description="Distil transformers with compiled kernels.")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    commands.add_parser("doctor", help="which backend serves each operator here, and why the others do not")
    exporting = commands.add_parser("export", help=EXPORT, description=f"{EXPORT[0].upper()}{EXPORT[1:]}.")
    exporting.add_argument("source", help="the folder of a model that was pruned with uniform widths, or shares layers")
    exporting.add_argument("target", help="the new folder")
    exporting.add_argument("--traceback", action="store_true", help="show where an error comes from")
    for name, settings in RECIPES.items():
        does = settings.does
        recipe_parser = commands.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.")
        recipe_parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
        add_arguments(recipe_parser, settings)
    asked, unknown = parser.parse_known_args(arguments)
    if unknown:
        commands.choices[asked.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    if asked.command == "doctor":
        return _doctor()
    return _run(_export if asked.command == "export" else partial(_recipe, RECIPES[asked.command]), asked)


def _doctor() -> int:
    from fastdistill.ops.doctor import doctor  # brings PyTorch, for which --help does not wait

    print(doctor())
    return 0


def _recipe(settings: type[RecipeSettings], asked: argparse.Namespace) -> None:
    recipe = getattr(recipes, asked.command)
    gc.freeze()  # each training collects garbage, and would go through all that was just imported: .25 s
    try:
        recipe(from_arguments(settings, asked)).show()
    finally:
        gc.unfreeze()  # else Triton's module says at the end that it leaks


def _export(asked: argparse.Namespace) -> None:
    from fastdistill.models.export import export
    from fastdistill.models.loading import from_pretrained, load_tokenizer

    if Path(asked.target).exists():
        raise FileExistsError(f"{asked.target} is there; expected a new folder")
    export(from_pretrained(asked.source), asked.target)
    if (Path(asked.source) / "tokenizer_config.json").is_file():
        load_tokenizer(asked.source).save_pretrained(asked.target)
    print(f"{asked.target}: a plain model of transformers")


def _run(does: Callable[[argparse.Namespace], None], asked: argparse.Namespace) -> int:
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", TURNS)  # read when PyTorch is imported, which comes next

    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call] # of loading weights only
    try:
        does(asked)
    except (ValueError, OSError, ImportError) as error:  # what was asked cannot be: say it in a line
        if asked.traceback:
            raise
        print(f"fastdistill {asked.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nfastdistill {asked.command}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0
