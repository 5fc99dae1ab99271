"""JSON Schema of record files, derived from the tables of records: for editors, and checks in other programs.

It accepts every file that `parse_records` accepts. It cannot express conditions on several values (two ports with the
same address) or arithmetic (a multicast MAC).
"""

from collections.abc import Mapping
from typing import Any, Final

from imdsproxy.model.records import TABLES
from imdsproxy.model.records.schema import Json, Key, Kind, Table

DIALECT: Final = "http://json-schema.org/draft-07/schema#"
"""Dialect that yaml-language-server, and so most editors, support best."""

_DEFINITIONS: Final = "$defs"


def schema_of_records() -> dict[str, Any]:
    """Return the schema of a document `{networks: [...], instances: [...]}`."""
    definitions: dict[str, Json] = {}
    for table in TABLES.values():
        _define(table, definitions)
    lists: dict[str, Json] = {
        name: {"type": ["array", "null"], "items": _reference(table), "description": table.help}
        for name, table in TABLES.items()
    }
    return {
        "$schema": DIALECT,
        "title": "imdsproxy records",
        "description": "Networks and instances of imdsproxy.",
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": lists,
        _DEFINITIONS: definitions,
    }


def _define(
    table: Table[Any], definitions: dict[str, Json], siblings: tuple[str, ...] = ()
) -> None:
    """Add a table, and the tables of its keys, to the definitions by name; `siblings` may be present with null."""
    if table.name in definitions:
        return
    definitions[table.name] = None  # holds its place in the order
    for key in table.keys:
        _define_parts(key.kind, definitions)
    others: Mapping[str, Json] = {"additionalProperties": False}
    if siblings:
        others = {
            "propertyNames": {"enum": [*siblings]},
            "additionalProperties": {"type": "null"},
        }
    definitions[table.name] = {
        "title": table.name.removesuffix("Record"),
        "description": table.help,
        "type": "object",
        "required": [*table.required],
        **others,
        "properties": {key.name: _property(table, key) for key in table.keys},
    }


def _define_parts(kind: Kind, definitions: dict[str, Json]) -> None:
    several = kind.tables if len(kind.tables) > 1 else ()
    siblings = tuple(name for table in several for name in table.names)
    for table in kind.tables:
        _define(table, definitions, siblings)
    if kind.item is not None:
        _define_parts(kind.item, definitions)


def _property(table: Table[Any], key: Key) -> dict[str, Json]:
    found = _schema_of(key.kind)
    default = None
    if not key.required:
        found = _or_null(found)
        default = table.default(key)
    named = {"title": key.name, "description": key.help, **found}
    rendered = None if default is None else key.kind.render(default)
    return named if rendered in (None, [], {}, "") else {**named, "default": rendered}


def _schema_of(kind: Kind) -> dict[str, Json]:
    if kind.item is not None:
        return {"type": "array", "items": _schema_of(kind.item)}
    options = [] if kind.schema is None else [dict(kind.schema)]
    options += map(_reference, kind.tables)
    return options[0] if len(options) == 1 else {"anyOf": [*options]}


def _reference(table: Table[Any]) -> dict[str, Json]:
    return {"$ref": f"#/{_DEFINITIONS}/{table.name}"}


def _or_null(schema: dict[str, Json]) -> dict[str, Json]:
    match schema:
        case {"enum": [*words]}:
            others = {name: value for name, value in schema.items() if name != "type"}
            return {**others, "enum": [*words, None]}
        case {"type": str(kind)} if "anyOf" not in schema:
            return {**schema, "type": [kind, "null"]}
        case _:
            return {"anyOf": [schema, {"type": "null"}]}
