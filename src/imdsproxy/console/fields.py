"""Fields of record forms, and conversion between JSON values and texts of inputs."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from imdsproxy.model.entities import Dialect, Upstream
from imdsproxy.model.path_rules import PathWord
from imdsproxy.model.policy import RULES, TokenMode
from imdsproxy.model.records import INSTANCE, NETWORK
from imdsproxy.model.records.schema import Table

_NOT_SET: Final = ("", "not set")
_ON_OFF: Final = (("true", "on"), ("false", "off"))
_NUMBER: Final = re.compile(r"-?[0-9]{1,12}")


@dataclass(frozen=True, slots=True)
class PlainField:
    """Key of the record, or of a mapping in the record, as one input."""

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
        """Return the value for an input's text. An invalid number stays text, so that the daemon reports the error."""
        if self.options and text in {"true", "false"}:
            return text == "true"
        if self.number and _NUMBER.fullmatch(text.strip()):
            return int(text)
        return text


@dataclass(frozen=True, slots=True)
class TableField:
    """Key with a list or mapping as its value, shown as rows.

    Attributes:
        split: Function that splits the value into rows of texts.
        join: Function that joins rows, without blank cells, to the value.
    """

    name: str
    label: str
    columns: tuple[PlainField, ...]
    split: Callable[[Any], Iterable[Mapping[str, str]]]
    join: Callable[[Sequence[Mapping[str, str]]], object]


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _rows_of_list(value: Sequence[Mapping[str, object]]) -> Iterable[Mapping[str, str]]:
    return ({name: _words(one) for name, one in row.items()} for row in value)


def _list_of_rows(
    *several: str,
) -> Callable[[Sequence[Mapping[str, str]]], list[dict[str, object]]]:
    """Return a converter of rows to mappings; columns in `several` contain values separated by blanks or commas."""

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
    """Return SSH keys as mappings; a key without a name becomes a text, which the daemon names by its comment."""
    return [dict(row) if "name" in row else row["key"] for row in rows]


def _choice(words: Iterable[str]) -> tuple[tuple[str, str], ...]:
    return tuple((word, word) for word in words)


def _rule(name: str) -> PlainField:
    rule, label = RULES[name], name.replace("_", " ")
    if rule.kind is bool:
        return PlainField(f"policy.{name}", label, (_NOT_SET, *_ON_OFF))
    if rule.kind is TokenMode:
        return PlainField(f"policy.{name}", label, (_NOT_SET, *_choice(TokenMode)))
    return PlainField(f"policy.{name}", label, number=True)


_POLICY: Final[tuple[PlainField | TableField, ...]] = (
    *(_rule(name) for name in RULES if name != "paths"),
    TableField(
        "policy.paths",
        "paths",
        (PlainField("path", "Path"), PlainField("word", "Rule", (_NOT_SET, *_choice(PathWord)))),
        _rows_of_mapping("path", "word"),
        _mapping_of_rows("path", "word"),
    ),
)

_Section: TypeAlias = tuple[str, tuple["PlainField | TableField", ...]]

_INSTANCE: Final[tuple[_Section, ...]] = (
    (
        "What it is",
        (
            PlainField("name", "Name"),
            PlainField("hostname", "Host name"),
            PlainField("project", "Project"),
            PlainField("availability_zone", "Availability zone"),
            PlainField("instance_type", "Instance type"),
            PlainField("upstream", "Documents", _choice(Upstream), default=Upstream.EMBEDDED),
        ),
    ),
    (
        "Where it is",
        (
            TableField(
                "ports",
                "Ports",
                (
                    PlainField("network", "Network"),
                    PlainField("mac", "MAC"),
                    PlainField("addresses", "Addresses"),
                    PlainField("project", "Project of its own"),
                ),
                _rows_of_list,
                _list_of_rows("addresses"),
            ),
        ),
    ),
    (
        "What it reads",
        (
            TableField(
                "tags",
                "Tags",
                (PlainField("name", "Name"), PlainField("value", "Value")),
                _rows_of_mapping("name", "value"),
                _mapping_of_rows("name", "value"),
            ),
            TableField(
                "ssh_keys",
                "SSH keys",
                (PlainField("name", "Name"), PlainField("key", "Public key")),
                _rows_of_list,
                _join_keys,
            ),
            *(
                PlainField(f"dialects.{one}", f"Documents of {one}", _ON_OFF, default="true")
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
            PlainField("name", "Name"),
            PlainField("project", "Project"),
            PlainField("mtu", "MTU", number=True),
            PlainField("mac_check", "Check MACs", _ON_OFF, default="true"),
        ),
    ),
    (
        "How it is reached",
        (
            PlainField("listener.namespace", "Namespace"),
            PlainField("listener.device", "Device in the namespace"),
            PlainField(
                "listener.manage_addresses", "Manage its addresses", _ON_OFF, default="false"
            ),
            PlainField("listener.bridge", "Bridge"),
            PlainField("listener.interface", "Interface"),
        ),
    ),
    (
        "Subnets",
        (
            TableField(
                "subnets",
                "Subnets",
                (
                    PlainField("cidr", "Range"),
                    PlainField("gateway", "Gateway"),
                    PlainField("dns", "Name servers"),
                ),
                _rows_of_list,
                _list_of_rows("dns"),
            ),
        ),
    ),
    ("What its guests may", _POLICY),
)
SECTIONS: Final[Mapping[str, tuple[_Section, ...]]] = {"instance": _INSTANCE, "network": _NETWORK}
"""Headings and their fields, by kind of record."""
TABLES: Final[Mapping[str, Table[Any]]] = {"instance": INSTANCE, "network": NETWORK}
"""Record tables, by kind of record."""
