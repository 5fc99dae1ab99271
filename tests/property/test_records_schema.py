"""The JSON Schema of record files against the parser: what that takes is valid, what is not valid it refuses."""

import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator

from imdsproxy.model.records import TABLES, render_record
from imdsproxy.model.records.json_schema import schema_of_records
from imdsproxy.model.records.schema import Kind, Table
from imdsproxy.sources.file.record_file import decode_records
from support.record_strategies import instances, networks

_SCHEMA: Final = schema_of_records()
_VALIDATOR: Final = Draft7Validator(_SCHEMA, format_checker=Draft7Validator.FORMAT_CHECKER)


def _is_taken(document: object) -> bool:
    text = json.dumps(document).encode()
    return not decode_records(text, file="records.json").all_problems


_documents = st.builds(
    lambda of_networks, of_instances: {
        "networks": [render_record(one) for one in of_networks],
        "instances": [render_record(one) for one in of_instances],
    },
    st.lists(networks, max_size=2),
    st.lists(instances, max_size=2),
)


@given(_documents)
def test_every_record_that_can_be_written_is_valid(document: object) -> None:
    assert _is_taken(document)
    assert list(_VALIDATOR.iter_errors(document)) == []


_anything = st.sampled_from(
    [None, True, False, 0, -1, 1, 64, 1500, 1.5, "", "x", "off", "required", "10.0.0.5", "::5", "fe80::1%e",
     "10.0.0.0/24", "52:54:00:12:34:56", "a b", "a\nb", "2026-11-26T12:00:00Z", "ssh-rsa AAAA x", "/latest", [],
     ["x"], {}, {"x": None}, {"x": "y"}, {"base64": "AA=="}, {"namespace": "x", "bridge": None}, {"/": "deny"},
     {"ec2": False}, {"name": "x", "key": "ssh-rsa AAAA"}]
)  # fmt: skip


def _places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if path:
        yield path
    if isinstance(value, dict | list):
        for step, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(part, (*path, step))


def _with(document: object, path: tuple[str | int, ...], value: object) -> Any:
    changed: Any = copy.deepcopy(document)
    place = changed
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return changed


_NAMES: Final = sorted({"x", *(name for table in TABLES.values() for name in table.names)})


@settings(max_examples=settings().max_examples * 5 // 2, deadline=None)
@given(_documents, st.data())
def test_whatever_is_changed_in_a_document_the_parser_takes_only_what_is_valid(
    document: Any,
    data: st.DataObject,
) -> None:
    path = data.draw(st.sampled_from(list(_places(document))))
    if data.draw(st.booleans()):
        path = (
            (*path[:-1], data.draw(st.sampled_from(_NAMES))) if isinstance(path[-1], str) else path
        )
    changed = _with(document, path, data.draw(_anything))
    if _is_taken(changed):
        assert list(_VALIDATOR.iter_errors(changed)) == []


@pytest.mark.parametrize("name", ["", "x", "a\nb", "x" * 300, "availability_zone"])
@pytest.mark.parametrize(("kind", "word"), [("tags", "a"), ("paths", "deny")])
def test_an_entry_that_is_null_is_omitted_whatever_its_name_is(
    kind: str, word: str, name: str
) -> None:
    def document(value: object) -> dict[str, object]:
        entries: dict[str, object] = {kind: {"/latest/x": word, name: value}}
        rest = entries if kind == "tags" else {"policy": entries}
        return {"instances": [{"id": "a", "name": "a", **rest}]}

    assert _is_taken(document(None))
    assert list(_VALIDATOR.iter_errors(document(None))) == []
    assert _is_taken(document(word)) == (not list(_VALIDATOR.iter_errors(document(word))))


_Wrap: TypeAlias = Callable[[Any], object]
"""Puts a mapping into a document."""

_SMALLEST: Final[dict[str, dict[str, Any]]] = {
    "NetworkRecord": {"id": "red", "listener": {"bridge": "br0"}},
    "NamespaceListenerRecord": {"namespace": "red"},
    "InterfaceListenerRecord": {"interface": "eth0"},
    "BridgeListenerRecord": {"bridge": "br0"},
    "SubnetRecord": {"cidr": "10.0.0.0/24"},
    "InstanceRecord": {"id": "web", "name": "web"},
    "PortRecord": {"network": "red"},
    "SshKeyRecord": {"name": "me", "key": "ssh-rsa AAAA"},
    "Base64": {"base64": "AA=="},
    "PolicyRecord": {},
    "DialectsRecord": {},
}
"""The least that each table takes."""

_WRONG: Final[tuple[object, ...]] = (1.5, [[]])
"""What no field takes."""


def _tables(table: Table[Any], wrap: _Wrap) -> Iterator[tuple[Table[Any], _Wrap]]:
    """A table and those inside it, each with what puts a mapping of it into a document."""
    yield table, wrap
    for key in table.keys:
        for inner, is_list in _inside(key.kind):
            yield from _tables(inner, partial(_put, wrap, table.name, key.name, is_list))


def _put(wrap: _Wrap, table: str, key: str, is_list: bool, value: object) -> object:  # noqa: FBT001 - of `partial`
    return wrap({**_SMALLEST[table], key: [value] if is_list else value})


def _inside(kind: Kind) -> Iterator[tuple[Table[Any], bool]]:
    yield from ((table, False) for table in kind.tables)
    if kind.item is not None:
        yield from ((table, True) for table in kind.item.tables)


def _document_of(name: str, record: object) -> object:
    return {name: [record]}


_EVERY: Final = [
    (f"{name}.{table.name}", table, wrap)
    for name, root in TABLES.items()
    for table, wrap in _tables(root, partial(_document_of, name))
]
_tables_of_records = pytest.mark.parametrize(
    ("table", "wrap"), [one[1:] for one in _EVERY], ids=[one[0] for one in _EVERY]
)


@_tables_of_records
def test_wrong_values_of_every_field_are_refused_by_both(table: Table[Any], wrap: _Wrap) -> None:
    smallest = _SMALLEST[table.name]
    assert _is_taken(wrap(smallest))
    assert _VALIDATOR.is_valid(wrap(smallest))
    wrongs: list[object] = [
        *({**smallest, key.name: value} for key in table.keys for value in _WRONG),
        {**smallest, "nothing": "x"},
        *({name: smallest[name] for name in smallest if name != left} for left in table.required),
        *({**smallest, left: None} for left in table.required),
        *([] if table.name in {"SshKeyRecord", "Base64"} else ["text"]),
    ]
    for wrong in wrongs:
        assert not _is_taken(wrap(wrong)), wrong
        assert not _VALIDATOR.is_valid(wrap(wrong)), wrong


_MISTAKES: Final[dict[str, tuple[dict[str, object], ...]]] = {
    "NetworkRecord": (
        {"id": "a b"}, {"id": ".x"}, {"mtu": 67}, {"mtu": 65536}, {"mtu": "1500"}, {"scope": "subnet"},
        {"name": ""}, {"name": "x" * 256}, {"name": "a\x1bb"}, {"listener": {"bridge": "b", "interface": "e"}},
        {"listener": {}}, {"listener": {"bridge": "br0", "device": "eth0"}},
        {"listener": {"bridge": "a-name-of-16-chars"}}, {"subnets": [{"cidr": "10.0.0.0"}]},
        {"subnets": [{"cidr": "10.0.0.0/24", "gateway": "10.0.0"}]}, {"policy": {"tokens": "on"}},
        {"policy": {"hop_limit": 65}}, {"policy": {"paths": {"/latest": "refuse"}}},
        {"policy": {"paths": {"latest": "deny"}}},
    ),
    "InstanceRecord": (
        {"hostname": "a b"}, {"hostname": "-web"}, {"hostname": "x" * 254}, {"created_at": -1},
        {"created_at": "2026-11-26"}, {"tags": {"a": 1}}, {"tags": {"": "x"}}, {"tags": {"a": "x" * 4097}},
        {"ssh_keys": ["-----BEGIN"]}, {"ssh_keys": [{"name": "a=b", "key": "ssh-rsa AAAA"}]},
        {"user_data": {"base64": "H4sA /w=="}}, {"user_data": 7}, {"user_data_file": ""},
        {"upstream": "novaa"}, {"dialects": {"ec2": "no"}}, {"vendor_data": 7},
        {"ports": [{"network": "red", "mac": "52:54:00:12:34"}]},
        {"ports": [{"network": "red", "addresses": ["10.0.0.5/24"]}]}, {"port": []},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("table", "change"), [(table, one) for table, each in _MISTAKES.items() for one in each]
)
def test_the_usual_mistakes_are_refused_by_both(table: str, change: dict[str, object]) -> None:
    kind = "networks" if table == "NetworkRecord" else "instances"
    document = {kind: [_SMALLEST[table] | change]}
    assert not _is_taken(document)
    assert not _VALIDATOR.is_valid(document)


def test_the_schema_is_one_of_its_dialect_and_describes_every_field() -> None:
    Draft7Validator.check_schema(_SCHEMA)
    for _, table, _ in _EVERY:
        definition = _SCHEMA["$defs"][table.name]
        assert definition["description"] == table.help
        found = definition["properties"]
        assert found.keys() == set(table.names)
        assert [name for name in found if not found[name]["description"]] == []
