"""docs/reference/records.md names every field of a record, and its examples are records that are taken."""

import re
from typing import Final

import pytest

from imdsproxy.config.strict_yaml import parse_yaml
from imdsproxy.core.records import INSTANCE, NETWORK, parse_records
from imdsproxy.core.records.instance import PORT
from support.demonstration import REPOSITORY
from support.document_blocks import section

_PAGE: Final = REPOSITORY / "docs/reference/records.md"
_EXAMPLES: Final = re.findall(r"^```yaml\n(.*?)^```", _PAGE.read_text(), re.MULTILINE | re.DOTALL)


def _fields(heading: str) -> list[set[str]]:
    """The fields in the first column of each table below a heading."""
    text = "\n".join(section(_PAGE, heading)[1])
    tables = re.findall(r"^\| field \| is \|\n\| --- \| --- \|\n((?:\|.*\n?)+)", text, re.MULTILINE)
    return [
        {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
        for table in tables
    ]


@pytest.mark.parametrize("example", _EXAMPLES)
def test_every_example_is_taken_whole(example: str) -> None:
    document = parse_yaml(example, "page").value
    records = parse_records(document)
    assert records.problems == ()
    assert isinstance(document, dict)
    written = [*document.get("networks", []), *document.get("instances", [])]
    assert len(records.networks) + len(records.instances) == len(written) > 0


def test_every_field_of_a_network_an_instance_and_a_port_is_explained() -> None:
    assert _fields("## A network") == [set(NETWORK.names)]
    assert _fields("## An instance") == [set(INSTANCE.names), set(PORT.names)]
