from __future__ import annotations

import time
from dataclasses import replace

import pytest

from imdsproxy.core.compiled import Blob, compile_instance, compiled_path, parse_compiled
from imdsproxy.core.model import Dialect, InstanceId, NetworkId, Port
from imdsproxy.errors import RecordCorrupt
from support.guest_records import BLUE, GUEST, NETWORKS, compiled, guest, port, with_head


def test_a_record_comes_back_as_it_went_in() -> None:
    instance = guest(vendor_data=b"#cloud-config\n{}", dialects=frozenset({Dialect.NOCLOUD}))
    record = parse_compiled(compiled(instance).content)
    names = "id uuid ec2_id name hostname project availability_zone instance_type ssh_keys tags"
    for name in [*names.split(), "dialects", "vendor_data"]:
        assert getattr(record, name) == getattr(instance, name), name


def test_user_data_lies_raw_in_the_content() -> None:
    data = bytes(range(256)) * 3
    content = compiled(guest(user_data=data, vendor_data=b"{}\n\n")).content
    blob = parse_compiled(content).user_data
    assert blob == Blob(len(content) - len(data), len(data))
    assert content.endswith(data)


def test_no_user_data_is_not_empty_user_data() -> None:
    assert parse_compiled(compiled(guest(user_data=None)).content).user_data is None
    empty = parse_compiled(compiled(guest(user_data=b"")).content).user_data
    assert empty is not None
    assert empty.length == 0


def test_what_the_network_says_is_copied_in() -> None:
    record = parse_compiled(compiled(GUEST).content)
    (found,) = record.ports
    assert found.mtu == 1450
    assert [(one.ip, one.cidr, one.gateway, one.dns) for one in found.addresses] == [
        ("10.0.0.5", "10.0.0.0/24", "10.0.0.1", ("10.0.0.2",)),
        ("2001:db8::5", "2001:db8::/64", "2001:db8::1", ()),
    ]


def test_a_port_of_an_unknown_network_keeps_its_addresses() -> None:
    lost = Port(NetworkId("gone"), None, port().addresses)
    record = parse_compiled(compile_instance(guest(ports=(lost,)), NETWORKS).content)
    assert [address.ip for address in record.ports[0].addresses] == ["10.0.0.5", "2001:db8::5"]
    assert record.ports[0].mtu is None
    # One in no subnet has none, and a link-local one is not for documents.
    ports = (port(addresses=["192.0.2.9", "fe80::1"]),)
    (address,) = parse_compiled(compiled(guest(ports=ports)).content).ports[0].addresses
    assert (address.ip, address.cidr) == ("192.0.2.9", None)


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


def test_the_record_says_its_own_revision() -> None:
    record = compiled(GUEST)
    assert parse_compiled(record.content).revision == record.revision
    assert len(record.revision) == 16
    assert int(record.revision, 16) >= 0


@pytest.mark.parametrize("position", range(0, 900, 7))
def test_a_flipped_bit_is_found(position: int) -> None:
    content = bytearray(compiled(guest(vendor_data=b"#!/bin/sh\n", user_data=b"x" * 300)).content)
    content[position % len(content)] ^= 0x10
    with pytest.raises(RecordCorrupt):
        parse_compiled(bytes(content))


@pytest.mark.parametrize("missing", [1, 10, 21, 300, 10_000])
def test_a_cut_record_is_found(missing: int) -> None:
    with pytest.raises(RecordCorrupt):
        parse_compiled(compiled(GUEST).content[:-missing])


@pytest.mark.parametrize("instance", [GUEST, guest(user_data=None), guest(user_data=b"")])
def test_bytes_too_many_are_found(instance: object) -> None:
    with pytest.raises(RecordCorrupt, match="bytes where"):
        parse_compiled(compiled(instance).content + b"\n")  # type: ignore[arg-type] # instances all


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'format":2,', b'format":99,"more":1,'),
        (b'format":2,', b'format":1,'),
        (b'"region":null,', b""),
    ],
)
def test_a_record_of_another_format_is_read_without_a_revision(old: bytes, new: bytes) -> None:
    record = parse_compiled(with_head(old, new))
    here = parse_compiled(compiled(GUEST).content)
    assert replace(record, revision="", user_data=None) == replace(
        here, revision="", user_data=None
    )
    assert bool(record.revision) is (old == b'"region":null,')


def test_a_format_that_lacks_what_is_needed_is_refused_by_its_number() -> None:
    with pytest.raises(RecordCorrupt, match="format 99"):
        parse_compiled(with_head(b'format":2,"id":', b'format":99,"name_of_it":'))


def test_paths_spread_over_directories_and_never_move() -> None:
    paths = [compiled_path(InstanceId(f"vm-{number}")) for number in range(4000)]
    assert len(set(paths)) == 4000
    assert len({path.split("/")[0] for path in paths}) == 256
    assert compiled_path(InstanceId("vm-1")) == "14/vm-1.rec"


def test_ten_thousand_instances_compile_in_about_a_second() -> None:
    started = time.process_time()
    for _ in range(1000):
        compiled(GUEST)
    assert time.process_time() - started < 0.3
