"""Record schema: tables, their keys and value kinds. Parser, renderer and JSON Schema are derived from it.

The parser reads a decoded document field by field and collects all of its problems.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Final, Generic, TypeAlias, TypeVar

from imdsproxy.errors import Problem, quoted
from imdsproxy.model.entities import ID_PATTERN

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"
"""Any JSON value."""

Path: TypeAlias = tuple[str | int, ...]
"""Place in a document: keys of mappings and indexes of lists, from the document's root."""

LineOf: TypeAlias = Callable[[Path], int | None]
"""Lookup of the 1-based line of a path's value, or of its nearest known parent."""

ReadFile: TypeAlias = "Callable[[Field], bytes]"
"""Reader of the file that a field names; raises a `Fault`."""

MAX_TEXT: Final = 255

MAX_PAYLOAD: Final = 16 * 1024 * 1024
"""Maximum bytes of one instance's user data, and of its vendor data."""

_MOST_BITS: Final = 60
_T = TypeVar("_T")

_PLAIN_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
# Control characters, C1 included, the two Unicode line ends and lone surrogates: none may reach a
# header, a map, a log line or a listing of names.
CONTROL: Final = r"\x00-\x1f\x7f-\x9f\u2028\u2029"
_UNPRINTABLE: Final = re.compile(rf"[{CONTROL}\ud800-\udfff]")


@dataclass(slots=True, eq=False)
class Fault(Exception):
    """Problem at a path. Decoders also report by it problems that the decoded value no longer shows.

    Attributes:
        line: Exact line, if it is not the line of `path`.
    """

    path: Path
    reason: str
    hint: str = ""
    line: int | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """Record that is refused, with its id if it could be read."""

    problems: tuple[Problem, ...]
    id: str | None = None


def render_path(path: Path) -> str:
    """Render a path for operators: `instances[3].ports[0].addresses[1]`."""
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
    """Problems of one record, and the helpers that read its fields.

    Attributes:
        line_of: Lines of the record's parts in that file.
        read_file: Reads the file of `user_data_file`; without it the key is refused.
    """

    file: str | None = None
    line_of: LineOf | None = None
    read_file: ReadFile | None = None
    problems: list[Problem] = field(default_factory=list)

    def add(self, fault: Fault) -> None:
        """Add a problem with file and line. The line is looked up only here: most records have no problem."""
        line = fault.line
        if line is None and self.line_of is not None:
            line = self.line_of(fault.path)
        field = render_path(fault.path) or "record"
        self.problems.append(Problem(field, fault.reason, fault.hint, self.file, line))


@dataclass(slots=True)  # not frozen: that triples the time to make one, and they never leave here
class Field:
    """Value and its path. The readers raise a `Fault` if the value is not acceptable."""

    value: Any
    path: Path
    findings: Findings

    def error(self, reason: str, hint: str = "") -> Fault:
        return Fault(self.path, reason, hint)

    def refuse(self, reason: str, hint: str = "") -> None:
        self.findings.add(self.error(reason, hint))

    def read(self, parse: Callable[[Field], _T]) -> _T | None:
        """Return the result of `parse`; on a fault, add its problem and return `None`."""
        try:
            return parse(self)
        except Fault as fault:
            self.findings.add(fault)
            return None

    def child(self, step: str | int, value: object) -> Field:
        return Field(value, (*self.path, step), self.findings)

    def mapping(
        self, known: Collection[str] | None = None, required: Collection[str] = ()
    ) -> dict[str, Field]:
        """Return the entries of a mapping that are not null; add a problem for each unknown or missing key.

        `None` allows any text as a key.
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
        if not isinstance(self.value, list | tuple):
            raise self.error(f"expected a list, found {_kind(self.value)}", "write [a, b] or - a")
        return [self.child(index, item) for index, item in enumerate(self.value)]

    def any_text(self) -> str:
        if isinstance(self.value, str):
            return self.value
        hint = "put it in quotes" if isinstance(self.value, bool | int | float) else ""
        hint = "only user_data may be binary" if isinstance(self.value, bytes) else hint
        raise self.error(f"expected text, found {_kind(self.value)}", hint)

    def text(self, *, longest: int = MAX_TEXT) -> str:
        """Return one line of text, not empty, that is safe in a header, a log or a listing."""
        value = self.any_text()
        if not value:
            raise self.error("is empty", "remove the key, or write a text")
        if _UNPRINTABLE.search(value):
            raise self.error(
                f"{quoted(value)} holds a line break or another control character",
                "one line of printable text",
            )
        if len(value) > longest:
            raise self.error(f"is {len(value)} characters long", f"at most {longest}")
        if value != value.strip():
            raise self.error(f"{quoted(value)} begins or ends with a blank", "remove the blank")
        return value

    def matched(self, pattern: re.Pattern[str], wanted: str) -> str:
        """Return text that `pattern` matches as a whole; `wanted` describes the pattern in words."""
        value = self.any_text()
        if pattern.fullmatch(value) is None:
            raise self.error(f"{quoted(value)} is not acceptable", wanted)
        return value

    def one_of(self, words: Sequence[str]) -> str:
        value = self.any_text()
        if value not in words:
            raise self.error(f"{quoted(value)} is not acceptable", f"one of {', '.join(words)}")
        return value

    def whole_number(self, lowest: int, highest: int) -> int:
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int):
            found = f"expected a whole number, found {_kind(value)}"
            raise self.error(found, f"{lowest} to {highest}")
        if not lowest <= value <= highest:
            raise self.error(f"{_kind(value)} is out of range", f"{lowest} to {highest}")
        return value

    def boolean(self) -> bool:
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
    """Return a hint for an unknown key: the closest known key, or all known keys."""
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


@dataclass(frozen=True, slots=True)
class Kind:
    """Type of a value: parser, renderer and JSON Schema.

    Attributes:
        parse: Returns the core's value, or `None` after adding its problems; may raise a `Fault`.
        schema: JSON Schema of the value; `None` if `tables` define it completely.
        render: Converts the core's value to JSON.
        tables: Mappings that the value may be.
    """

    parse: Callable[[Field], Any]
    schema: Mapping[str, Json] | None = None
    render: Callable[[Any], Json] = lambda value: value
    tables: tuple[Table[Any], ...] = ()
    item: Kind | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """Key of a mapping. A null is the same as no key.

    Attributes:
        attribute: Name of the dataclass's attribute, if it differs.
        only_in_files: Whether only files may have the key: the admin API refuses it, and no shown record has it.
        since: Level of records that introduced the key (`model.records.levels`).
        limits: Whether a fleet host that does not know the key must not ignore it.
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
        return self.attribute or self.name

    @property
    def summary(self) -> str:
        """First sentence of `help`; `--help` shows only this sentence."""
        return self.help.partition(". ")[0].removesuffix(".") + "."


class Table(Generic[_T]):
    """Mapping with known keys; the name is that in the OpenAPI document."""

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
            of: Makes the value from the parsed values of the present keys: most often a dataclass. Its defaults are the
                defaults of the keys.
            keys: Keys, in the order in which problems are reported and records are shown.
            check: Refuses values that contradict each other; may change values.
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

    def default(self, key: Key) -> Any:
        """Return the default of a missing key; `None` if it has no default."""
        return self._defaults.get(key.field)

    def read(
        self,
        record: object,
        path: Path = (),
        findings: Findings | None = None,
        faults: Iterable[Fault] = (),
    ) -> _T | Refused:
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
        return self.build(field.mapping(self.names, self.required))

    def build(self, entries: Mapping[str, Field]) -> _T | None:
        """Parse a mapping's entries; all of their keys are known."""
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
        """Return the value's mapping, without values that equal their defaults."""
        return {
            key.name: key.kind.render(found)
            for key in self.keys
            if not key.only_in_files and (found := getattr(value, key.field)) != self.default(key)
        }

    @property
    def kind(self) -> Kind:
        return Kind(self.parse, render=self.render, tables=(self,))


def refuse_repeated(
    items: Sequence[tuple[Field, Any]], of: Callable[[Any], object] = lambda value: value
) -> None:
    """Refuse each item that equals an earlier item in what `of` returns: a check of `list_of`."""
    seen: list[object] = []
    for item, value in items:
        if of(value) in seen:
            item.refuse("appears twice")
        seen.append(of(value))


def list_of(
    kind: Kind, check: Callable[[Sequence[tuple[Field, Any]]], None] = lambda _items: None
) -> Kind:
    """Return the kind of a list; `check` refuses items that contradict each other, and gets the valid ones."""

    def parse(field: Field) -> tuple[Any, ...]:
        items = [(item, item.read(kind.parse)) for item in field.items()]
        check([one for one in items if one[1] is not None])
        # A refused item stays as `None`, so that the others keep their indexes; the record is refused anyway.
        return tuple(value for _, value in items)

    return Kind(parse, render=lambda items: [kind.render(one) for one in items], item=kind)
