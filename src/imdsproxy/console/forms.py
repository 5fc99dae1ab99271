"""Records as forms and back: each input is named as the admin API names the field in its problems.

`make_form` gives the inputs of a record, `read_form` the record that a browser sends, and `plan_patch` what differs.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from imdsproxy.core.model import Dialect, Upstream
from imdsproxy.core.path_rules import PathWord
from imdsproxy.core.policy import RULES, TokenMode
from imdsproxy.core.records import INSTANCE, NETWORK
from imdsproxy.core.records.schema import Table
from imdsproxy.errors import Problem

Sent: TypeAlias = Mapping[str, str]
"""What a browser sends: the text of each input, by its name."""

_NOT_SET: Final = ("", "not set")
_ON_OFF: Final = (("true", "on"), ("false", "off"))
_CELL: Final = re.compile(r"(?P<group>[a-z_.]+)\[(?P<row>[0-9]{1,4})\]\.(?P<column>[a-z_]+)")
_NUMBER: Final = re.compile(r"-?[0-9]{1,12}")
_SPARE_ROWS: Final = 1


@dataclass(frozen=True, slots=True)
class Input:
    """One input.

    Attributes:
        name: The field in the record: `policy.tokens`, `ports[0].mac`.
        kind: `text`, `choice`, or `long` for text of several lines.
        options: Of a choice: what is sent, and what is shown.
        errors: What the daemon does not accept.
    """

    name: str
    label: str
    value: str
    help: str = ""
    kind: str = "text"
    options: tuple[tuple[str, str], ...] = ()
    errors: tuple[Problem, ...] = ()

    @property
    def in_use(self) -> bool:
        """Whether it holds something, or what it held is not accepted."""
        return bool(self.value or self.errors)


@dataclass(frozen=True, slots=True)
class Rows:
    """A table of inputs; the last row is blank, for one more."""

    name: str
    label: str
    help: str
    rows: tuple[tuple[Input, ...], ...]
    errors: tuple[Problem, ...] = ()

    @property
    def in_use(self) -> bool:
        """As of an input."""
        return len(self.rows) > _SPARE_ROWS or bool(self.errors)


@dataclass(frozen=True, slots=True)
class Section:
    """Inputs under a heading."""

    title: str
    parts: tuple[Input | Rows, ...]

    @property
    def folded(self) -> bool:
        """Whether it is of the many rules that few records set."""
        return self.parts[0].name.startswith("policy.")

    @property
    def in_use(self) -> bool:
        """Whether the record sets something of it, or the daemon does not accept it."""
        return any(one.in_use for one in self.parts)


@dataclass(frozen=True, slots=True)
class Form:
    """All of a record.

    Attributes:
        errors: Those that belong to no input.
    """

    sections: tuple[Section, ...]
    errors: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class _Plain:
    """A key of the record, or of a mapping in it, as one input."""

    name: str
    label: str
    options: tuple[tuple[str, str], ...] = ()
    number: bool = False
    default: str = ""

    def show(self, value: object) -> str:
        if isinstance(value, bool):
            return "true" if value else "false"
        return self.default if value is None else str(value)

    def read(self, text: str) -> object:
        """A number that is none stays text, so that the daemon says what is wrong with it."""
        if self.options and text in {"true", "false"}:
            return text == "true"
        if self.number and _NUMBER.fullmatch(text.strip()):
            return int(text)
        return text


@dataclass(frozen=True, slots=True)
class _Table:
    """A key whose value is a list or mapping, as rows.

    Attributes:
        columns: Names, labels and what kind of input.
        split: The value as rows of texts.
        join: Rows, without blank cells, as the value.
    """

    name: str
    label: str
    columns: tuple[_Plain, ...]
    split: Callable[[Any], Iterable[Mapping[str, str]]]
    join: Callable[[Sequence[Mapping[str, str]]], object]


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _rows_of_list(value: Sequence[Mapping[str, object]]) -> Iterable[Mapping[str, str]]:
    return ({name: _words(one) for name, one in row.items()} for row in value)


def _list_of_rows(
    *several: str,
) -> Callable[[Sequence[Mapping[str, str]]], list[dict[str, object]]]:
    """Rows as mappings; in columns that may have several values these are apart by blanks or commas."""

    def join(rows: Sequence[Mapping[str, str]]) -> list[dict[str, object]]:
        return [
            {
                name: [*filter(None, re.split(r"[\s,]+", text))] if name in several else text
                for name, text in row.items()
            }
            for row in rows
        ]

    return join


def _rows_of_mapping(first: str, second: str) -> Callable[[Mapping[str, str]], Any]:
    return lambda value: ({first: name, second: one} for name, one in value.items())


def _mapping_of_rows(first: str, second: str) -> Callable[[Sequence[Mapping[str, str]]], object]:
    return lambda rows: {row.get(first, ""): row.get(second, "") for row in rows}


def _join_keys(rows: Sequence[Mapping[str, str]]) -> list[object]:
    """A key without a name is named by its comment."""
    return [dict(row) if "name" in row else row["key"] for row in rows]


def _choice(words: Iterable[str]) -> tuple[tuple[str, str], ...]:
    return tuple((word, word) for word in words)


def _rule(name: str) -> _Plain:
    rule, label = RULES[name], name.replace("_", " ")
    if rule.kind is bool:
        return _Plain(f"policy.{name}", label, (_NOT_SET, *_ON_OFF))
    if rule.kind is TokenMode:
        return _Plain(f"policy.{name}", label, (_NOT_SET, *_choice(TokenMode)))
    return _Plain(f"policy.{name}", label, number=True)


_POLICY: Final[tuple[_Plain | _Table, ...]] = (
    *(_rule(name) for name in RULES if name != "paths"),
    _Table(
        "policy.paths",
        "paths",
        (_Plain("path", "Path"), _Plain("word", "Rule", (_NOT_SET, *_choice(PathWord)))),
        _rows_of_mapping("path", "word"),
        _mapping_of_rows("path", "word"),
    ),
)

_Section: TypeAlias = tuple[str, tuple["_Plain | _Table", ...]]

_INSTANCE: Final[tuple[_Section, ...]] = (
    (
        "What it is",
        (
            _Plain("name", "Name"),
            _Plain("hostname", "Host name"),
            _Plain("project", "Project"),
            _Plain("availability_zone", "Availability zone"),
            _Plain("instance_type", "Instance type"),
            _Plain("upstream", "Documents", _choice(Upstream), default=Upstream.EMBEDDED),
        ),
    ),
    (
        "Where it is",
        (
            _Table(
                "ports",
                "Ports",
                (
                    _Plain("network", "Network"),
                    _Plain("mac", "MAC"),
                    _Plain("addresses", "Addresses"),
                    _Plain("project", "Project of its own"),
                ),
                _rows_of_list,
                _list_of_rows("addresses"),
            ),
        ),
    ),
    (
        "What it reads",
        (
            _Table(
                "tags",
                "Tags",
                (_Plain("name", "Name"), _Plain("value", "Value")),
                _rows_of_mapping("name", "value"),
                _mapping_of_rows("name", "value"),
            ),
            _Table(
                "ssh_keys",
                "SSH keys",
                (_Plain("name", "Name"), _Plain("key", "Public key")),
                _rows_of_list,
                _join_keys,
            ),
            *(
                _Plain(f"dialects.{one}", f"Documents of {one}", _ON_OFF, default="true")
                for one in Dialect
            ),
        ),
    ),
    ("What it may", _POLICY),
)

_NETWORK: Final[tuple[_Section, ...]] = (
    (
        "What it is",
        (
            _Plain("name", "Name"),
            _Plain("project", "Project"),
            _Plain("mtu", "MTU", number=True),
            _Plain("mac_check", "Check MACs", _ON_OFF, default="true"),
        ),
    ),
    (
        "How it is reached",
        (
            _Plain("listener.namespace", "Namespace"),
            _Plain("listener.device", "Device in the namespace"),
            _Plain("listener.manage_addresses", "Manage its addresses", _ON_OFF, default="false"),
            _Plain("listener.bridge", "Bridge"),
            _Plain("listener.interface", "Interface"),
        ),
    ),
    (
        "Subnets",
        (
            _Table(
                "subnets",
                "Subnets",
                (
                    _Plain("cidr", "Range"),
                    _Plain("gateway", "Gateway"),
                    _Plain("dns", "Name servers"),
                ),
                _rows_of_list,
                _list_of_rows("dns"),
            ),
        ),
    ),
    ("What its guests may", _POLICY),
)
_SECTIONS: Final = {"instance": _INSTANCE, "network": _NETWORK}
_TABLES: Final[Mapping[str, Table[Any]]] = {"instance": INSTANCE, "network": NETWORK}


def make_form(kind: str, sent: Sent, problems: Sequence[Problem]) -> Form:
    """The inputs of a record, with what the daemon does not accept at each.

    Args:
        kind: `instance` or `network`.
        sent: What the inputs hold (`show_record`, or what the browser has sent).
        problems: Of the daemon.
    """
    left = list(problems)

    def take(name: str) -> tuple[Problem, ...]:
        found = [one for one in left if re.match(rf"{re.escape(name)}(?![a-z_0-9])", one.field)]
        left[:] = [one for one in left if one not in found]
        return tuple(found)

    def make(one: _Plain | _Table) -> Input | Rows:
        help_text = _help(kind, one.name)
        if isinstance(one, _Plain):
            value = sent.get(one.name, "")
            shape = "choice" if one.options else "text"
            return Input(one.name, one.label, value, help_text, shape, one.options, take(one.name))
        rows = _read_rows(one.name, sent)
        made = tuple(
            tuple(
                Input(
                    name := f"{one.name}[{number}].{column.name}",
                    column.label,
                    row.get(column.name, ""),
                    kind="choice" if column.options else "text",
                    options=column.options,
                    errors=take(name),
                )
                for column in one.columns
            )
            for number, row in enumerate([*rows, *({},) * _SPARE_ROWS])
        )
        return Rows(one.name, one.label, help_text, made, take(one.name))

    sections = tuple(Section(title, tuple(map(make, parts))) for title, parts in _SECTIONS[kind])
    return Form(sections, tuple(left))


def _help(kind: str, name: str) -> str:
    """What the record's table says of a key, or that of the rules of a rule."""
    group, _, rule = name.partition(".")
    if group == "policy":
        return RULES[rule].help
    return next((key.help for key in _TABLES[kind].keys if key.name == name), "")


def show_record(kind: str, record: Mapping[str, Any]) -> dict[str, str]:
    """What the inputs of a record hold at first."""
    shown: dict[str, str] = {}
    for one in (part for _, parts in _SECTIONS[kind] for part in parts):
        group, _, inner = one.name.partition(".")
        value = (record.get(group) or {}).get(inner) if inner else record.get(group)
        if isinstance(one, _Plain):
            shown[one.name] = one.show(value)
            continue
        for number, row in enumerate(one.split(value) if value else ()):
            shown |= {f"{one.name}[{number}].{name}": text for name, text in row.items()}
    return shown


def read_form(kind: str, sent: Sent) -> tuple[dict[str, Any], list[Problem]]:
    """The keys of the record as the browser has them, and what cannot be put into a record."""
    record: dict[str, Any] = {}
    problems: list[Problem] = []
    required = _TABLES[kind].required
    for one in (part for _, parts in _SECTIONS[kind] for part in parts):
        value: object = None
        if isinstance(one, _Table):
            rows = _read_rows(one.name, sent)
            value = one.join(rows) or None
            problems += _repeated(one, rows, value)
        elif (text := sent.get(one.name, "")) not in ("", one.default) or one.name in required:
            value = one.read(text)
        if value is not None:
            group, _, inner = one.name.partition(".")
            if inner:
                record.setdefault(group, {})[inner] = value
            else:
                record[group] = value
    return record, problems


def _repeated(one: _Table, rows: Sequence[object], value: object) -> list[Problem]:
    if isinstance(value, dict) and len(value) < len(rows):
        return [Problem(one.name, "has a name twice", "take one of the two away")]
    return []


def _read_rows(group: str, sent: Sent) -> list[dict[str, str]]:
    """The rows of a table in their order, without blank cells and blank rows."""
    rows: dict[int, dict[str, str]] = {}
    for name, text in sent.items():
        cell = _CELL.fullmatch(name)
        if cell is not None and cell["group"] == group and text.strip():
            rows.setdefault(int(cell["row"]), {})[cell["column"]] = text
    return [rows[number] for number in sorted(rows)]


def plan_patch(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What makes one mapping of another (RFC 7396): null takes a key away; empty where they are equal."""
    patch: dict[str, Any] = {}
    for key in {**known, **wanted}:
        before, after = known.get(key), wanted.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            if inner := plan_patch(before, after):
                patch[key] = inner
        elif before != after:
            patch[key] = after
    return patch


def edited_keys(kind: str) -> frozenset[str]:
    """The keys of the record that the form has."""
    parts = (part for _, every in _SECTIONS[kind] for part in every)
    return frozenset(one.name.partition(".")[0] for one in parts)
