"""Settings from the command line: argparse's options are made of the fields."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from fastdistill.recipes.settings.fields import Choice, Kind, Listed, Option, Settings

Asked = TypeVar("Asked", bound=Settings)


def add_arguments(parser: argparse.ArgumentParser, settings: type[Settings]) -> None:
    """An option for each field, in a group for each class that has a title: what is shared first, then the recipe's."""
    titled = [owner for owner in settings.__mro__ if issubclass(owner, Settings) and "title" in vars(owner)]
    for owner in sorted(titled, key=lambda owner: owner.title != "what to run"):
        group = parser.add_argument_group(owner.title)
        for field in _offered(settings):
            if owner is next(each for each in reversed(titled) if field.name in each.__annotations__):
                option: Option = field.metadata["option"]
                name = f"--{field.name.replace('_', '-')}"
                group.add_argument(name, dest=field.name, help=option.help, **_action(option, field.default))


def from_arguments(settings: type[Asked], arguments: argparse.Namespace) -> Asked:
    return settings(**{field.name: getattr(arguments, field.name) for field in _offered(settings)})


def _offered(settings: type[Settings]) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(settings) if field.name not in settings.unused]


def _action(option: Option, default: Any) -> dict[str, Any]:
    if option.kind is None:
        return {"action": "store_true" if default is False else argparse.BooleanOptionalAction, "default": default}
    asked: dict[str, Any] = {"type": _parser(option.kind)}
    if option.alone is not None:
        asked |= {"nargs": "?", "const": option.alone}
    if option.metavar is not None:
        asked["metavar"] = option.metavar
    if isinstance(option.kind, Choice):
        asked["choices"] = option.kind.among
    if option.repeated:
        return asked | {"action": "append", "default": []}
    return asked | ({"required": True} if default is dataclasses.MISSING else {"default": default})


def _parser(kind: Kind) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind.parse(text)
        if not isinstance(kind, Choice) and (why := _refusal(kind, value, text)):
            raise argparse.ArgumentTypeError(why)
        return value

    parse.__name__ = kind.name  # "invalid integer value"
    return parse


def _refusal(kind: Kind, value: Any, text: str) -> str:
    """Why it cannot be; nothing where it can."""
    if kind.takes(value):
        return ""
    if not isinstance(kind, Listed):
        return f"{text} is not {kind.expected}"
    for one, part in zip(value, map(str.strip, text.split(",")), strict=True):
        if not kind.item.takes(one):
            if isinstance(kind.item, Choice):
                return f"{part!r} is not among {', '.join(kind.item.among)}"
            return _refusal(kind.item, one, part)
    return f"{text} has a value twice"
