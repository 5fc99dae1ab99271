from __future__ import annotations

from dataclasses import replace

import pytest

from imdsproxy.core.compiled import (
    DocumentRecord,
    compile_instance,
    compiled_path,
    parse_compiled,
)
from imdsproxy.core.model import Dialect, Instance, InstanceId, NetworkId, Port
from imdsproxy.errors import RecordCorrupt
from support.guest_records import BLUE, GUEST, compiled, guest, port, with_head


def read(instance: Instance) -> DocumentRecord:
    return parse_compiled(compiled(instance).content)


def test_a_port_in_a_network_that_is_gone_keeps_its_addresses() -> None:
    (gone,) = read(guest(ports=(Port(NetworkId("gone"), None, port().addresses),)))["ports"]
    assert [one["ip"] for one in gone["addresses"]] == ["10.0.0.5", "2001:db8::5"]
    assert (gone["mtu"], {one["cidr"] for one in gone["addresses"]}) == (None, {None})


@pytest.mark.parametrize(
    "change",
    [
        {"hostname": "other"},
        {"user_data": b"#!/bin/sh\necho hellp\n"},
        {"vendor_data": b"{}"},
        {"tags": ()},
        {"dialects": frozenset({Dialect.EC2})},
    ],
)
def test_every_change_of_the_instance_changes_the_revision(change: dict[str, object]) -> None:
    assert compiled(guest()) == compiled(GUEST)
    assert compiled(guest(**change)).revision != compiled(GUEST).revision
    other = compile_instance(GUEST, {BLUE.id: replace(BLUE, mtu=9000)})
    assert other.revision != compiled(GUEST).revision


def test_a_record_that_was_changed_cut_or_lengthened_is_refused() -> None:
    whole = compiled(guest(vendor_data=b"#!/bin/sh\n", user_data=b"x" * 300)).content
    flipped = [bytearray(whole) for _ in range(0, len(whole), 7)]
    for number, content in enumerate(flipped):
        content[number * 7] ^= 0x10
    cut = [whole[:-missing] for missing in (1, 10, 21, 300, 10_000)]
    longer = [compiled(guest(user_data=data)).content + b"\n" for data in (b"a", b"", None)]
    for wrong in (*map(bytes, flipped), *cut, *longer):
        with pytest.raises(RecordCorrupt):
            parse_compiled(wrong)


@pytest.mark.parametrize(
    ("old", "new", "revision"),
    [
        (b'format":2,', b'format":99,"more":1,', False),
        (b'format":2,', b'format":1,', False),
        (b'"region":null,', b"", True),
    ],
)
def test_a_record_of_another_format_is_read_without_a_revision(
    old: bytes, new: bytes, *, revision: bool
) -> None:
    record, here = parse_compiled(with_head(old, new)), read(GUEST)
    assert bool(record["revision"]) is revision
    for name in ("id", "hostname", "ports", "tags", "vendor_data"):
        assert record[name] == here[name]


def test_a_format_that_lacks_what_is_needed_is_refused_by_its_number() -> None:
    with pytest.raises(RecordCorrupt, match="format 99"):
        parse_compiled(with_head(b'format":2,"id":', b'format":99,"name_of_it":'))


def test_paths_spread_over_directories_and_never_move() -> None:
    paths = [compiled_path(InstanceId(f"vm-{number}")) for number in range(4000)]
    assert len(set(paths)) == 4000
    assert len({path.split("/")[0] for path in paths}) == 256
    assert compiled_path(InstanceId("vm-1")) == "14/vm-1.rec"
