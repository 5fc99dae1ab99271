"""Read a decoded document field by field, and gather everything that is wrong with it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, TypeVar

from imdsproxy.errors import Problem, quoted

Path: TypeAlias = tuple[str | int, ...]
"""Where in a document: keys of mappings and indexes of lists, from the document's root."""

LineOf: TypeAlias = Callable[[Path], int | None]
"""The 1-based line where a path's value stands, or that of its nearest known parent."""

MAX_TEXT: Final = 255

MAX_PAYLOAD: Final = 16 * 1024 * 1024
"""The most bytes of user data, and of vendor data, of one instance."""

_MOST_BITS: Final = 60
_T = TypeVar("_T")

_PLAIN_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
# Control characters, C1 included, the two Unicode line ends and lone surrogates: none may reach a
# header, a map, a log line or a listing of names.
_UNPRINTABLE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong at a path; decoders report so what their values do not show any more.

    Attributes:
        path: Where.
        reason: What, in one sentence.
        hint: What would be right.
        line: Where exactly, if not where `path` begins.
    """

    path: Path
    reason: str
    hint: str = ""
    line: int | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """A record that is not accepted.

    Attributes:
        problems: Everything wrong with it, in its own order.
        id: Its id, as far as that could be read.
    """

    problems: tuple[Problem, ...]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Why a file that a record names gave no bytes."""

    reason: str
    hint: str = ""


ReadFile: TypeAlias = Callable[[str], bytes | Unreadable]
"""Reads the file that `user_data_file` names, written as in the record."""


def render_path(path: Path) -> str:
    """The path as operators read it: `instances[3].ports[0].addresses[1]`."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif _PLAIN_KEY.fullmatch(step):
            text += f".{step}" if text else step
        else:
            text += f"[{quoted(step)}]"
    return text


@dataclass(slots=True)
class Findings:
    """The problems of one record, as they are found, and what its fields are read with.

    Attributes:
        file: The file it comes from, for the problems.
        line_of: Where its parts stand in that file.
        read_file: Reads what `user_data_file` names; without it the key is refused.
    """

    file: str | None = None
    line_of: LineOf | None = None
    read_file: ReadFile | None = None
    problems: list[Problem] = field(default_factory=list)

    def add(self, fault: Fault) -> None:
        """Note a problem, with file and line, which is looked up only now: most records have none."""
        line = fault.line
        if line is None and self.line_of is not None:
            line = self.line_of(fault.path)
        field = render_path(fault.path) or "record"
        self.problems.append(Problem(field, fault.reason, fault.hint, self.file, line))


class FieldError(Exception):
    """A field's value is not acceptable."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.reason)
        self.fault = fault


@dataclass(slots=True)  # not frozen: that triples the time to make one, and they never leave here
class Field:
    """A value and where it stands. Its readers raise `FieldError` where the value is not acceptable."""

    value: Any
    path: Path
    findings: Findings

    def error(self, reason: str, hint: str = "") -> FieldError:
        """What is wrong with this field."""
        return FieldError(Fault(self.path, reason, hint))

    def refuse(self, reason: str, hint: str = "") -> None:
        """Note a problem of this field, and go on."""
        self.findings.add(Fault(self.path, reason, hint))

    def read(self, parse: Callable[[Field], _T]) -> _T | None:
        """What `parse` makes of it; `None` once its problem is noted."""
        try:
            return parse(self)
        except FieldError as error:
            self.findings.add(error.fault)
            return None

    def child(self, step: str | int, value: object) -> Field:
        """A part of this field's value."""
        return Field(value, (*self.path, step), self.findings)

    def mapping(
        self, known: Collection[str] | None = None, required: Collection[str] = ()
    ) -> dict[str, Field]:
        """The entries of a mapping, without those that are null; a problem is noted for each unknown or missing key.

        Args:
            known: The keys that may be there; `None` for any text.
            required: Those of them that must.
        """
        if not isinstance(self.value, Mapping):
            raise self.error(f"expected a mapping (key: value), found {_kind(self.value)}")
        entries: dict[str, Field] = {}
        for key, value in self.value.items():
            if not isinstance(key, str):
                self.refuse(f"the key {key!r} is {_kind(key)}, not text", "put it in quotes")
            elif known is not None and key not in known:
                self.child(key, value).refuse("unknown key", _nearest(key, known))
            elif value is not None:
                entries[key] = self.child(key, value)
        for key in required:
            if key not in entries:
                self.child(key, None).refuse("is missing")
        return entries

    def items(self) -> list[Field]:
        """The items of a list."""
        if not isinstance(self.value, list | tuple):
            raise self.error(f"expected a list, found {_kind(self.value)}", "write [a, b] or - a")
        return [self.child(index, item) for index, item in enumerate(self.value)]

    def any_text(self) -> str:
        """Any text."""
        if isinstance(self.value, str):
            return self.value
        hint = "put it in quotes" if isinstance(self.value, bool | int | float) else ""
        hint = "only user_data may be binary" if isinstance(self.value, bytes) else hint
        raise self.error(f"expected text, found {_kind(self.value)}", hint)

    def text(self, *, longest: int = MAX_TEXT) -> str:
        """Text of one line, not empty, that a header, a log or a listing may carry."""
        value = self.any_text()
        if not value:
            raise self.error("is empty", "leave it out, or write something")
        if _UNPRINTABLE.search(value):
            raise self.error(
                f"{quoted(value)} holds a line break or another control character",
                "one line of printable text",
            )
        if len(value) > longest:
            raise self.error(f"is {len(value)} characters long", f"at most {longest}")
        if value != value.strip():
            raise self.error(f"{quoted(value)} begins or ends with a blank", "take it away")
        return value

    def matched(self, pattern: re.Pattern[str], wanted: str) -> str:
        """Text that `pattern` matches as a whole; `wanted` says in words what that is."""
        value = self.any_text()
        if pattern.fullmatch(value) is None:
            raise self.error(f"{quoted(value)} is not acceptable", wanted)
        return value

    def one_of(self, words: Sequence[str]) -> str:
        """One of these words."""
        value = self.any_text()
        if value not in words:
            raise self.error(f"{quoted(value)} is not acceptable", f"one of {', '.join(words)}")
        return value

    def whole_number(self, lowest: int, highest: int) -> int:
        """A whole number within bounds."""
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int):
            found = f"expected a whole number, found {_kind(value)}"
            raise self.error(found, f"{lowest} to {highest}")
        if not lowest <= value <= highest:
            raise self.error(f"{_kind(value)} is out of range", f"{lowest} to {highest}")
        return value

    def boolean(self) -> bool:
        """True or false."""
        if isinstance(self.value, bool):
            return self.value
        found = f"expected true or false, found {_kind(self.value)}"
        raise self.error(found, "write true or false")


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {quoted(value)}"
    if isinstance(value, int | float):
        # Python refuses to spell an integer of more than 4,300 digits.
        huge = isinstance(value, int) and value.bit_length() > _MOST_BITS
        return "a huge number" if huge else f"the number {value}"
    names = ((bytes, "bytes"), (Mapping, "a mapping"), (list | tuple, "a list"))
    return next(
        (name for kind, name in names if isinstance(value, kind)), f"a {type(value).__name__}"
    )


def _nearest(key: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
