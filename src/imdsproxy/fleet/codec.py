"""Codec of everything that hosts, hubs and etcd exchange as JSON: dataclasses as objects, checked field by field. Pure.

Another machine may be compromised and another program can write to etcd, so readers rely only on the checks here. Keys
of a newer version are ignored.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any, Final, Generic, TypeAlias, TypeVar, cast

from imdsproxy.model.entities import ID_PATTERN

ID_SHAPE: Final = ID_PATTERN.removeprefix("^").removesuffix("$")
"""`ID_PATTERN` as a part of a longer expression."""

MOST_NUMBER: Final = 2**63 - 1
"""Largest number that etcd, SQLite and HAProxy take."""

MOST_TEXT: Final = 1000
"""Maximum characters of a text that a machine of the fleet reports."""

SHA256: Final = re.compile("[0-9a-f]{64}")
"""Hexadecimal, in lower case."""

_ID: Final = re.compile(ID_PATTERN)
_URL: Final = re.compile(r"(?=.{1,300}\Z)https?://(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}")

Json: TypeAlias = dict[str, Any]
_T = TypeVar("_T")
_A = TypeVar("_A")


class Unreadable(ValueError):
    """Value that no program of the fleet wrote. Hubs never treat it as absent."""


def attempt(read: Callable[[_A], _T], value: _A) -> _T | None:
    """Return the result of a function that may raise `Unreadable`; `None` if it does."""
    try:
        return read(value)
    except Unreadable:
        return None


def is_id(text: str) -> bool:
    return _ID.fullmatch(text) is not None


def is_number(value: object) -> bool:
    """Return whether a JSON value is a whole number from 0 to `MOST_NUMBER`."""
    return type(value) is int and 0 <= value <= MOST_NUMBER


def plain(text: str, most: int = MOST_TEXT) -> str:
    """Make a text of another machine fit to store and show: printable, one line, cut after `most` characters."""
    cut = text if len(text) <= most else f"{text[: most - 1]}…"
    return cut if cut.isprintable() else "".join(one if one.isprintable() else "?" for one in cut)


def encode(value: Json) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def decode(value: bytes) -> Json:
    """Parse a value as a JSON object; raises `Unreadable`."""
    try:
        found = json.loads(value.decode())
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"the value is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise Unreadable("the value is no object")
    return cast("Json", found)


@dataclass(frozen=True, slots=True)
class Kind:
    """Kind of a field's value.

    Attributes:
        read: Returns the value of a JSON value; raises `Unreadable`.
        needed: Whether the key must be present. A missing key has the default of the dataclass.
    """

    read: Callable[[Any], Any]
    write: Callable[[Any], Any] = lambda value: value
    needed: bool = True


def checked(accepts: Callable[[Any], bool], wanted: str) -> Kind:
    """Return the kind of values that a function accepts; `wanted` describes them."""

    def read(value: object) -> Any:
        if not accepts(value):
            raise Unreadable(f"is no {wanted}")
        return value

    return Kind(read)


def matching(pattern: re.Pattern[str], wanted: str) -> Kind:
    return checked(lambda value: isinstance(value, str) and bool(pattern.fullmatch(value)), wanted)


def omissible(kind: Kind) -> Kind:
    return replace(kind, needed=False)


def nullable(kind: Kind) -> Kind:
    return Kind(
        lambda value: None if value is None else kind.read(value),
        lambda value: None if value is None else kind.write(value),
        kind.needed,
    )


def list_of(kind: Kind) -> Kind:
    def read(value: object) -> tuple[Any, ...]:
        return tuple(map(kind.read, LIST.read(value)))

    return Kind(read, lambda items: [kind.write(one) for one in items])


def mapping_of(key: Kind, kind: Kind) -> Kind:
    """Return the kind of an object with keys that are no fields."""

    def read(value: object) -> Json:
        return {key.read(name): kind.read(one) for name, one in OBJECT.read(value).items()}

    return Kind(
        read, lambda found: {key.write(name): kind.write(one) for name, one in found.items()}
    )


def row_of(of: Callable[..., Any], *kinds: Kind) -> Kind:
    """Return the kind of a tuple or dataclass that JSON has as a list of all of its fields."""

    def read(value: object) -> Any:
        items = LIST.read(value)
        if len(items) != len(kinds):
            raise Unreadable(f"has not {len(kinds)} items")
        return of(*(kind.read(one) for kind, one in zip(kinds, items, strict=True)))

    def write(found: Any) -> list[Any]:
        items = (
            found
            if isinstance(found, tuple)
            else (getattr(found, one.name) for one in fields(found))
        )
        return [kind.write(one) for kind, one in zip(kinds, items, strict=True)]

    return Kind(read, write)


def word_of(words: type[StrEnum], *never: StrEnum) -> Kind:
    """Return the kind of a word of an enumeration, without the words that are never sent."""
    known = {str(one.value): one for one in words if one not in never}

    def read(value: object) -> StrEnum:
        if not isinstance(value, str) or value not in known:
            raise Unreadable(f"is none of {', '.join(known)}")
        return known[value]

    return Kind(read, str)


def _read_plain(value: object) -> str:
    return plain(cast("str", ANY_TEXT.read(value)))


def _read_bytes(value: object) -> bytes:
    try:
        return base64.b64decode(cast("str", ANY_TEXT.read(value)), validate=True)
    except ValueError as error:
        raise Unreadable("is no base64") from error


def _read_seconds(value: object) -> float:
    if type(value) is int and abs(value) <= MOST_NUMBER:
        return float(value)
    if type(value) is float and math.isfinite(value):
        return value
    raise Unreadable("is no number of seconds")


ANY: Final = Kind(lambda value: value)
ANY_TEXT: Final = checked(lambda value: isinstance(value, str), "text")
TEXT: Final = Kind(_read_plain, plain)
"""Text to store and show: cut and made printable by both sides."""

NUMBER: Final = checked(is_number, f"whole number from 0 to {MOST_NUMBER}")
COUNT: Final = checked(
    lambda value: is_number(value) and value <= MOST_NUMBER // 2, "counter that can be raised"
)
"""Number far below `MOST_NUMBER`, so that no sum exceeds it."""

SECONDS: Final = Kind(_read_seconds)
SWITCH: Final = Kind(lambda value: value is True)
LIST: Final = checked(lambda value: isinstance(value, list), "list")
OBJECT: Final = checked(lambda value: isinstance(value, dict), "object")
ID: Final = matching(_ID, "id")
DIGEST: Final = matching(SHA256, "SHA-256")
URL: Final = matching(_URL, "URL of a hub")
BYTES: Final = Kind(_read_bytes, lambda raw: base64.b64encode(raw).decode())


class Codec(Generic[_T]):
    def __init__(
        self,
        of: type[_T],
        check: Callable[[_T], str | None] = lambda _: None,
        /,
        *,
        sparse: bool = False,
        **keys: Kind,
    ) -> None:
        """Describe the object of a dataclass: names of all keys, in the order of the fields, and kinds of their values.

        `check` returns the reason why fields contradict each other. With `sparse`, keys that may be missing are not
        written with an empty value.
        """
        names = (one.name for one in fields(cast("Any", of)))
        self.keys = tuple(
            (key, name, kind) for (key, kind), name in zip(keys.items(), names, strict=True)
        )
        self._make: Callable[..., _T] = of
        self._check = check
        self._sparse = sparse

    def read(self, found: Mapping[str, Any]) -> _T:
        """Return the value of an object; raises `Unreadable`."""
        values: Json = {}
        for key, name, kind in self.keys:
            if key in found:
                try:
                    values[name] = kind.read(found[key])
                except Unreadable as error:
                    raise Unreadable(f"`{key}` {error}") from error
            elif kind.needed:
                raise Unreadable(f"`{key}` is missing")
        value = self._make(**values)
        if (problem := self._check(value)) is not None:
            raise Unreadable(problem)
        return value

    def write(self, value: _T) -> Json:
        every = ((key, kind, getattr(value, name)) for key, name, kind in self.keys)
        return {
            key: kind.write(one)
            for key, kind, one in every
            if one or kind.needed or not self._sparse
        }

    def parse(self, value: bytes) -> _T:
        """Parse the JSON of an object; raises `Unreadable`."""
        return self.read(decode(value))

    def render(self, value: _T) -> bytes:
        return encode(self.write(value))

    @property
    def kind(self) -> Kind:
        return Kind(lambda value: self.read(OBJECT.read(value)), self.write)
