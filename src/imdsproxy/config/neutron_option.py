"""What is known of one option of Neutron's: what it takes, and what becomes of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

__all__ = [
    "ANY",
    "COUNT",
    "FLAG",
    "IP_VERSIONS",
    "LIST",
    "NUMBER",
    "PORT",
    "TEXT",
    "TRUE_WORDS",
    "Fate",
    "Kind",
    "NeutronOption",
    "integer",
    "one_of",
]

TRUE_WORDS: Final = frozenset({"true", "1", "on", "yes"})
_FALSE_WORDS: Final = frozenset({"false", "0", "off", "no"})


class Fate(StrEnum):
    """What becomes of an option."""

    TAKEN = "taken over"
    BY_HAND = "by hand"
    """It says something that imdsproxy needs, and cannot be translated."""
    NONE = "no equivalent"


@dataclass(frozen=True, slots=True)
class Kind:
    """What Neutron takes: what it takes not, it does not start with."""

    words: str
    accepts: Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class NeutronOption:
    """One option.

    Attributes:
        whose: Who reads it.
        section: As its documentation writes it.
        default: As its documentation writes it; empty for none.
        becomes: The setting of imdsproxy, if there is one.
        why: Why it has no equivalent, or how it is taken over.
        deprecated: Its older names, `(section, name)`.
        secret: Its value is never shown.
    """

    whose: str
    section: str
    name: str
    default: str
    kind: Kind
    fate: Fate
    becomes: str
    why: str
    deprecated: tuple[tuple[str, str], ...] = ()
    secret: bool = False

    @property
    def names(self) -> tuple[tuple[str, str], ...]:
        """Where it may stand in a parsed file, today's name first."""
        return tuple((_folded(section), name) for section, name in self.all_names)

    @property
    def all_names(self) -> tuple[tuple[str, str], ...]:
        """Its names as they are documented, today's first."""
        return ((self.section, self.name), *self.deprecated)


def _folded(section: str) -> str:
    return section if section == "DEFAULT" else section.lower()


def integer(low: int, high: int | None = None) -> Kind:
    """Whole numbers in a range."""

    def accepts(value: str) -> bool:
        if not value:
            return True  # as if it were not there
        if not re.fullmatch(r"[-+]?[0-9]{1,18}", value, re.ASCII):
            return False
        return low <= int(value) <= (int(value) if high is None else high)

    return Kind(f"an integer from {low} {'on' if high is None else f'to {high}'}", accepts)


def one_of(*words: str) -> Kind:
    """Exactly one of some words."""
    return Kind(f"one of {', '.join(words)}", frozenset(words).__contains__)


def _ip_versions(value: str) -> bool:
    return all(one.strip() in {"4", "6"} for one in value.split(","))


TEXT: Final = Kind("a text on one line", lambda value: "\n" not in value)
LIST: Final = Kind("a list with commas", lambda _value: True)
FLAG: Final = Kind(
    "true or false", lambda value: value.lower() in TRUE_WORDS or value.lower() in _FALSE_WORDS
)
PORT: Final = integer(1, 65535)
COUNT: Final = integer(1)
ANY: Final = Kind("anything", lambda _value: True)
IP_VERSIONS: Final = Kind("4, 6 or both with a comma", _ip_versions)
NUMBER: Final = Kind(
    "a number", lambda value: re.fullmatch(r"([0-9]+(\.[0-9]+)?)?", value, re.ASCII) is not None
)
