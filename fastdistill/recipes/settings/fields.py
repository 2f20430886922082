"""Fields of settings: each has a help text and says which values it takes. The command line is made of them.

Nothing here imports PyTorch, so that ``--help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol


class Kind(Protocol):
    """Which values a field takes."""

    @property
    def name(self) -> str:
        """As argparse has it: "invalid NAME value"."""

    @property
    def expected(self) -> str: ...

    def parse(self, text: str) -> Any:
        """The value that a text on the command line means; ValueError where it means none."""

    def takes(self, value: Any) -> bool: ...


@dataclass(frozen=True)
class Integer:
    """An integer of at least `low` and at most `high`."""

    low: int | None = None
    high: int | None = None
    name: ClassVar[str] = "integer"

    @property
    def expected(self) -> str:
        if self.low is None:
            return "an integer"
        return "an integer " + (f"of at least {self.low}" if self.high is None else f"from {self.low} to {self.high}")

    def parse(self, text: str) -> int:
        return int(text)

    def takes(self, value: Any) -> bool:
        if not isinstance(value, int) or isinstance(value, bool):
            return False
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


@dataclass(frozen=True)
class Number:
    """A finite number of at least `low`, or greater than `above`, and less than `below`, or at most `most`."""

    low: float | None = None
    above: float | None = None
    below: float | None = None
    most: float | None = None
    name: ClassVar[str] = "number"

    @property
    def expected(self) -> str:
        limits = {"of at least": self.low, "above": self.above, "below": self.below, "at most": self.most}
        told = [f"{name} {limit}" for name, limit in limits.items() if limit is not None]
        return "a finite number " + " and ".join(told)

    def parse(self, text: str) -> float:
        return float(text)

    def takes(self, value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            return False
        return (
            (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.most is None or value <= self.most)
        )


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    among: tuple[Any, ...]
    name: ClassVar[str] = "choice"

    @property
    def expected(self) -> str:
        return f"one of {', '.join(map(str, self.among))}"

    def parse(self, text: str) -> Any:
        return type(self.among[0])(text)

    def takes(self, value: Any) -> bool:
        return value in self.among


@dataclass(frozen=True)
class Text:
    """Any text."""

    expected: str = "a text"
    name: ClassVar[str] = "text"

    def parse(self, text: str) -> str:
        return text

    def takes(self, value: Any) -> bool:
        return isinstance(value, str)


@dataclass(frozen=True)
class Folder:
    """A path, or its text."""

    expected: str = "a path"
    name: ClassVar[str] = "path"

    def parse(self, text: str) -> Path:
        return Path(text)

    def takes(self, value: Any) -> bool:
        return isinstance(value, str | Path)


@dataclass(frozen=True)
class Listed:
    """One or more values of a kind, with commas between them on the command line, which must be `different`."""

    item: Kind
    different: bool = True

    @property
    def name(self) -> str:
        return f"list of {self.item.name}s"

    @property
    def expected(self) -> str:
        return f"one or more, each {self.item.expected}" + (", all different" if self.different else "")

    def parse(self, text: str) -> tuple[Any, ...]:
        return tuple(self.item.parse(part.strip()) for part in text.split(","))

    def takes(self, value: Any) -> bool:
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            return False
        return all(map(self.item.takes, value)) and not (self.different and len(set(value)) < len(value))


@dataclass(frozen=True)
class Option:
    """What the command line knows of a field. `repeated`: it may be given many times, and the field is a tuple."""

    kind: Kind | None
    """None for a flag."""
    help: str
    metavar: str | None = None
    repeated: bool = False
    alone: Any = None
    """What the option means without a value, which is then what True means in Python, and False is None."""

    def converted(self, name: str, value: Any) -> Any:
        """The value as it is kept: lists as tuples, a folder as a Path. ValueError for what it cannot be."""
        if self.alone is not None and isinstance(value, bool):
            return self.alone if value else None
        if self.repeated:
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ValueError(f"{name} is {value!r}; expected a list")
            return tuple(dataclasses.replace(self, repeated=False).converted(name, one) for one in value)
        if self.kind is None:
            if not isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}; expected True or False")
        elif not self.kind.takes(value):
            raise ValueError(f"{name} is {value!r}; expected {self.kind.expected}")
        if isinstance(self.kind, Folder):
            return Path(value)
        return tuple(value) if isinstance(self.kind, Listed) else value


def option(
    default: Any = dataclasses.MISSING, *, kind: Kind, help: str, metavar: str | None = None, alone: Any = None
) -> Any:
    """A field; one without a default is required, and one whose default is None may be None."""
    return dataclasses.field(default=default, metadata={"option": Option(kind, help, metavar, alone=alone)})


def options(*, kind: Kind, help: str, metavar: str) -> Any:
    """A field that holds all that was given for an option that may be repeated."""
    return dataclasses.field(default=(), metadata={"option": Option(kind, help, metavar, repeated=True)})


def flag(help: str, default: bool | None = False) -> Any:
    """A field that is False but where the option is given; or one by default None, with ``--no-`` as well."""
    return dataclasses.field(default=default, metadata={"option": Option(None, help)})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked of a recipe; it never changes. Each class that adds fields has a `title` for them in the help."""

    title: ClassVar[str]
    unused: ClassVar[tuple[str, ...]] = ()
    """Fields of the classes that it is made of which mean nothing here: not offered, and refused."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in self.unused and value != field.default:
                raise ValueError(
                    f"{field.name} is {value!r}, for which {type(self).__name__} has no use; expected none"
                )
            if value is not None or field.default is not None:
                object.__setattr__(self, field.name, field.metadata["option"].converted(field.name, value))
        self.check()

    def check(self) -> None:
        """Raises ValueError for fields that do not go together."""
