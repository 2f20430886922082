"""The `fastdistill` command."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# recipe -> what it does; a recipe is a module of fastdistill.recipes with add_arguments(parser) and
# run(options)
RECIPES = {
    "kd": "fine-tune a teacher and distil it into its own first layers, beside a student that has no teacher",
    "stark": "prune a teacher of what its student finds unfriendly, and distil the sparse teacher (STARK)",
    "dekd": "distil what a student is unsure of, from a teacher and its assistant, aligning informative layers (DeKD)",
    "autoskd": "distil from a team of teachers, one sampled a step, as likely as is learned to be best (AutoSKDBERT)",
    "peakd": "distil into layers that are applied twice, after a pretraining with the teacher's predictions (Pea-KD)",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """One line, in place of the usage and a line."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, 2 for something wrong with what was asked, 130 if interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _Parser(prog="fastdistill", description="Distil transformers with compiled kernels.")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    commands.add_parser("doctor", help="which backend serves each operator here, and why the others do not")
    for name, does in RECIPES.items():
        recipe_parser = commands.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.")
        if name in arguments[:1]:  # only the recipe that is asked for is imported
            recipe_parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
            importlib.import_module(f"fastdistill.recipes.{name}").add_arguments(recipe_parser)
    options = parser.parse_args(arguments)
    return _doctor() if options.command == "doctor" else _run(options)


def _doctor() -> int:
    from fastdistill.ops.doctor import doctor

    print(doctor())
    return 0


def _run(options: argparse.Namespace) -> int:
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call] # of loading weights only
    from fastdistill.recipes.output import claimed

    try:
        with claimed(options.output, options.command, overwrite=options.overwrite):
            importlib.import_module(f"fastdistill.recipes.{options.command}").run(options)
    except (ValueError, OSError, ImportError) as error:  # what was asked cannot be: say it in a line
        if options.traceback:
            raise
        print(f"fastdistill {options.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nfastdistill {options.command}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0
