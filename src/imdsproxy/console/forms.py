"""Conversion of records to forms and back. Inputs have the names of the fields in the admin API's problems.

`make_form` returns the inputs of a record, `read_form` the record from a browser, and `plan_patch` the difference.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from imdsproxy.console.fields import SECTIONS, TABLES, PlainField, TableField
from imdsproxy.errors import Problem
from imdsproxy.model.policy import RULES

Sent: TypeAlias = Mapping[str, str]
"""Form data from a browser: the text of each input, by name."""

_CELL: Final = re.compile(r"(?P<group>[a-z_.]+)\[(?P<row>[0-9]{1,4})\]\.(?P<column>[a-z_]+)")
_SPARE_ROWS: Final = 1


@dataclass(frozen=True, slots=True)
class Input:
    """Input of a form.

    Attributes:
        name: Field in the record: `policy.tokens`, `ports[0].mac`.
        kind: `text`, `choice`, or `long` for text of several lines.
        options: Options of a choice: sent value and shown text.
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
        return bool(self.value or self.errors)


@dataclass(frozen=True, slots=True)
class Rows:
    """Table of inputs; the last row is blank for a new entry."""

    name: str
    label: str
    help: str
    rows: tuple[tuple[Input, ...], ...]
    errors: tuple[Problem, ...] = ()

    @property
    def in_use(self) -> bool:
        return len(self.rows) > _SPARE_ROWS or bool(self.errors)


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    parts: tuple[Input | Rows, ...]

    @property
    def folded(self) -> bool:
        """Return whether the section has policy rules, which are many and rarely set."""
        return self.parts[0].name.startswith("policy.")

    @property
    def in_use(self) -> bool:
        return any(one.in_use for one in self.parts)


@dataclass(frozen=True, slots=True)
class Form:
    """Form of a record.

    Attributes:
        errors: Problems that belong to no input.
    """

    sections: tuple[Section, ...]
    errors: tuple[Problem, ...]


def make_form(kind: str, sent: Sent, problems: Sequence[Problem]) -> Form:
    """Build the form of a record, with the daemon's problems at their inputs.

    Args:
        sent: Texts of the inputs, from `show_record` or the browser.
    """
    left = list(problems)

    def take(name: str) -> tuple[Problem, ...]:
        found = [one for one in left if re.match(rf"{re.escape(name)}(?![a-z_0-9])", one.field)]
        left[:] = [one for one in left if one not in found]
        return tuple(found)

    def make(one: PlainField | TableField) -> Input | Rows:
        help_text = _help(kind, one.name)
        if isinstance(one, PlainField):
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

    sections = tuple(Section(title, tuple(map(make, parts))) for title, parts in SECTIONS[kind])
    return Form(sections, tuple(left))


def _help(kind: str, name: str) -> str:
    group, _, rule = name.partition(".")
    if group == "policy":
        return RULES[rule].help
    return next((key.help for key in TABLES[kind].keys if key.name == name), "")


def show_record(kind: str, record: Mapping[str, Any]) -> dict[str, str]:
    shown: dict[str, str] = {}
    for one in (part for _, parts in SECTIONS[kind] for part in parts):
        group, _, inner = one.name.partition(".")
        value = (record.get(group) or {}).get(inner) if inner else record.get(group)
        if isinstance(one, PlainField):
            shown[one.name] = one.show(value)
            continue
        for number, row in enumerate(one.split(value) if value else ()):
            shown |= {f"{one.name}[{number}].{name}": text for name, text in row.items()}
    return shown


def read_form(kind: str, sent: Sent) -> tuple[dict[str, Any], list[Problem]]:
    """Return the record's keys from the browser's form, and problems that prevent a record."""
    record: dict[str, Any] = {}
    problems: list[Problem] = []
    required = TABLES[kind].required
    for one in (part for _, parts in SECTIONS[kind] for part in parts):
        value: object = None
        if isinstance(one, TableField):
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


def _repeated(one: TableField, rows: Sequence[object], value: object) -> list[Problem]:
    if isinstance(value, dict) and len(value) < len(rows):
        return [Problem(one.name, "has a name twice", "take one of the two away")]
    return []


def _read_rows(group: str, sent: Sent) -> list[dict[str, str]]:
    """Return the rows of a table in order, without blank cells and blank rows."""
    rows: dict[int, dict[str, str]] = {}
    for name, text in sent.items():
        cell = _CELL.fullmatch(name)
        if cell is not None and cell["group"] == group and text.strip():
            rows.setdefault(int(cell["row"]), {})[cell["column"]] = text
    return [rows[number] for number in sorted(rows)]


def plan_patch(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the merge patch from one mapping to another (RFC 7396): null removes a key; equal mappings give `{}`."""
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
    parts = (part for _, every in SECTIONS[kind] for part in every)
    return frozenset(one.name.partition(".")[0] for one in parts)
