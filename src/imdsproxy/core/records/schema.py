"""What a record is made of: keys, each with what it takes. Parser, renderer and JSON Schema are derived from it.

A decoded document is read field by field, and everything that is wrong with it is gathered.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Final, Generic, TypeAlias, TypeVar

from imdsproxy.core.model import ID_PATTERN
from imdsproxy.errors import Problem, quoted

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"
"""What JSON can carry."""

Path: TypeAlias = tuple[str | int, ...]
"""Where in a document: keys of mappings and indexes of lists, from the document's root."""

LineOf: TypeAlias = Callable[[Path], int | None]
"""The 1-based line where a path's value stands, or that of its nearest known parent."""

ReadFile: TypeAlias = "Callable[[Field], bytes]"
"""Reads the file that a field names; raises a `Fault`."""

MAX_TEXT: Final = 255

MAX_PAYLOAD: Final = 16 * 1024 * 1024
"""The most bytes of user data, and of vendor data, of one instance."""

_MOST_BITS: Final = 60
_T = TypeVar("_T")

_PLAIN_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
# Control characters, C1 included, the two Unicode line ends and lone surrogates: none may reach a
# header, a map, a log line or a listing of names.
CONTROL: Final = r"\x00-\x1f\x7f-\x9f\u2028\u2029"
_UNPRINTABLE: Final = re.compile(rf"[{CONTROL}\ud800-\udfff]")


@dataclass(slots=True, eq=False)
class Fault(Exception):
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


@dataclass(slots=True)  # not frozen: that triples the time to make one, and they never leave here
class Field:
    """A value and where it stands. Its readers raise a `Fault` where the value is not acceptable."""

    value: Any
    path: Path
    findings: Findings

    def error(self, reason: str, hint: str = "") -> Fault:
        """What is wrong with this field."""
        return Fault(self.path, reason, hint)

    def refuse(self, reason: str, hint: str = "") -> None:
        """Note a problem of this field, and go on."""
        self.findings.add(self.error(reason, hint))

    def read(self, parse: Callable[[Field], _T]) -> _T | None:
        """What `parse` makes of it; `None` once its problem is noted."""
        try:
            return parse(self)
        except Fault as fault:
            self.findings.add(fault)
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
                self.child(key, value).refuse("unknown key", nearest(key, known))
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


def nearest(key: str, known: Collection[str]) -> str:
    """A hint for a key that is none of the known ones."""
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value may be.

    Attributes:
        parse: Gives the core's value, or `None` once its problems are noted; or raises a `Fault`.
        schema: As JSON Schema; `None` where `tables` are all of it.
        render: From the core's value to JSON.
        tables: The mappings that it may be.
        item: What each item of a list may be.
    """

    parse: Callable[[Field], Any]
    schema: Mapping[str, Json] | None = None
    render: Callable[[Any], Json] = lambda value: value
    tables: tuple[Table[Any], ...] = ()
    item: Kind | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a mapping. A null is the same as no key.

    Attributes:
        attribute: The dataclass's, where it has another name.
        required: It must be there.
        only_in_files: The admin API does not take it, and no record is shown with it.
        since: The level of records that it came with (`core.records.levels`).
        limits: A host of a fleet that does not know the key may not ignore it.
    """

    name: str
    kind: Kind
    help: str = ""
    attribute: str = ""
    required: bool = False
    only_in_files: bool = False
    since: int = 1
    limits: bool = True

    @property
    def field(self) -> str:
        """The name in the dataclass."""
        return self.attribute or self.name

    @property
    def summary(self) -> str:
        """The first sentence of `help`, which is all that `--help` shows."""
        return self.help.partition(". ")[0].removesuffix(".") + "."


class Table(Generic[_T]):
    """A mapping with known keys.

    Attributes:
        name: In the OpenAPI document.
        help: What it is, in one sentence.
        names: Of all keys, in their order.
        required: Of the keys that must be there.
    """

    def __init__(
        self,
        name: str,
        of: Callable[..., _T],
        help_text: str,
        *keys: Key,
        check: Callable[[Mapping[str, Field], dict[str, Any]], None] = lambda *_: None,
    ) -> None:
        """Describe a mapping.

        Args:
            name: As of the class.
            of: Makes the value, given the parsed values of those keys that are there: most often a dataclass. Its
                defaults are those of the keys.
            help_text: What it is.
            keys: In the order in which problems are reported and records are shown.
            check: Refuses what does not go together, and may change values.
        """
        self.name = name
        self.help = help_text
        self.keys = keys
        self.names = tuple(key.name for key in keys)
        self.required = tuple(key.name for key in keys if key.required)
        self._make = of
        self._check = check
        parameters = signature(of).parameters.values()
        self._defaults = {one.name: one.default for one in parameters if one.default != one.empty}

    def default(self, key: Key) -> Any:  # noqa: ANN401 - as the dataclass has it
        """What a missing key stands for; `None` where that is nothing."""
        return self._defaults.get(key.field)

    def read(
        self,
        record: object,
        path: Path = (),
        findings: Findings | None = None,
        faults: Iterable[Fault] = (),
    ) -> _T | Refused:
        """The value of a record, or everything that is wrong with it.

        Args:
            record: The mapping, as YAML or JSON gives it.
            path: Where it stands in its document.
            findings: Without problems yet.
            faults: Those that the decoder found inside this record.
        """
        findings = findings or Findings()
        for fault in faults:
            findings.add(fault)
        parsed = Field(record, path, findings).read(self.parse)
        if parsed is None or findings.problems:
            named = record.get("id") if isinstance(record, Mapping) else None
            known = isinstance(named, str) and re.fullmatch(ID_PATTERN, named)
            return Refused(tuple(findings.problems), named if known else None)
        return parsed

    def parse(self, field: Field) -> _T | None:
        """The value of a mapping."""
        return self.build(field.mapping(self.names, self.required))

    def build(self, entries: Mapping[str, Field]) -> _T | None:
        """The value of a mapping's entries, which are known keys."""
        values: dict[str, Any] = {}
        for key in self.keys:
            if key.name in entries:
                value = entries[key.name].read(key.kind.parse)
                if value is not None:
                    values[key.field] = value
        self._check(entries, values)
        if any(key.required and key.field not in values for key in self.keys):
            return None
        return self._make(**values)

    def render(self, value: _T) -> dict[str, Json]:
        """The value's mapping, without what is its default."""
        return {
            key.name: key.kind.render(found)
            for key in self.keys
            if not key.only_in_files and (found := getattr(value, key.field)) != self.default(key)
        }

    @property
    def kind(self) -> Kind:
        """For a key that holds such a mapping."""
        return Kind(self.parse, render=self.render, tables=(self,))


def list_of(
    kind: Kind, check: Callable[[Sequence[tuple[Field, Any]]], None] = lambda _items: None
) -> Kind:
    """A list.

    Args:
        kind: Of each item.
        check: Refuses what does not go together; given the items that are good, and where they stand.
    """

    def parse(field: Field) -> tuple[Any, ...]:
        items = [(item, item.read(kind.parse)) for item in field.items()]
        check([one for one in items if one[1] is not None])
        # One that is refused is `None`, so that the others keep their places: the record is refused anyway.
        return tuple(value for _, value in items)

    return Kind(parse, render=lambda items: [kind.render(one) for one in items], item=kind)
