"""docs/reference/records.md has every field of a record, and its examples are records that are taken."""

import re
from typing import Final

import pytest
from jsonschema import Draft7Validator

from imdsproxy.config.strict_yaml import parse_yaml
from imdsproxy.model.entities import BridgeListener, InterfaceListener, NamespaceListener, Scope
from imdsproxy.model.records import parse_records
from imdsproxy.model.records.json_schema import schema_of_records
from support.demonstration import REPOSITORY

_PAGE: Final = (REPOSITORY / "docs/reference/records.md").read_text()
_EXAMPLES: Final = re.findall(r"^```yaml\n(.*?)^```", _PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("example", _EXAMPLES)
def test_every_example_is_taken_whole_and_valid_in_an_editor(example: str) -> None:
    document = parse_yaml(example, "page").value
    records = parse_records(document)
    assert records.all_problems == ()
    assert isinstance(document, dict)
    written = [*document.get("networks", []), *document.get("instances", [])]
    assert len(records.networks) + len(records.instances) == len(written)
    assert list(Draft7Validator(schema_of_records()).iter_errors(document)) == []


def test_there_is_an_example_of_each_kind_of_network() -> None:
    found = [
        one for each in _EXAMPLES for one in parse_records(parse_yaml(each, "").value).networks
    ]
    assert {type(one.listener) for one in found} == {
        BridgeListener,
        InterfaceListener,
        NamespaceListener,
    }
    assert {one.scope for one in found} == set(Scope)
    assert {one.mac_check for one in found} == {True, False}


def test_every_field_of_every_table_is_explained() -> None:
    wanted = [list(one["properties"]) for one in schema_of_records()["$defs"].values()]
    tables = re.findall(r"^\| field \|.*\n\| ---.*\n((?:\|.*\n?)+)", _PAGE, re.MULTILINE)
    found = [re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) for table in tables]
    assert sorted(found) == sorted(wanted)
