from __future__ import annotations

import pytest

from imdsproxy.core.model import (
    BridgeListener,
    InterfaceListener,
    NamespaceListener,
    Network,
)
from imdsproxy.core.records import Refused, parse_network

PLAIN: dict[str, object] = {"id": "blue", "listener": {"bridge": "br0"}}


def problems(record: object) -> dict[str, str]:
    found = parse_network(record)
    assert isinstance(found, Refused), f"accepted: {found}"
    return {problem.field: f"{problem.reason} ({problem.hint})" for problem in found.problems}


@pytest.mark.parametrize(
    ("listener", "wanted"),
    [
        ({"bridge": "br0"}, BridgeListener("br0")),
        ({"interface": "eth0.5"}, InterfaceListener("eth0.5")),
        ({"namespace": "qdhcp-1"}, NamespaceListener("qdhcp-1")),
        (
            {"namespace": "ns", "device": "tap1", "manage_addresses": True},
            NamespaceListener("ns", "tap1", manage_addresses=True),
        ),
        ({"namespace": "ns", "device": None}, NamespaceListener("ns")),
    ],
)
def test_each_kind_of_listener_is_read(listener: object, wanted: object) -> None:
    network = parse_network({"id": "n", "listener": listener})
    assert isinstance(network, Network)
    assert network.listener == wanted


@pytest.mark.parametrize(
    ("listener", "field"),
    [
        ({}, "listener"),
        ({"bridge": "br0", "interface": "eth0"}, "listener"),
        ({"bridge": "br0", "device": "eth0"}, "listener.device"),
        ({"interface": "eth0", "manage_addresses": True}, "listener.manage_addresses"),
        ({"namespace": "ns", "manage_addresses": True}, "listener.manage_addresses"),
        ({"namespace": "ns", "manage_addresses": "no"}, "listener.manage_addresses"),
        ({"namespace": "../../etc/passwd"}, "listener.namespace"),
        ({"namespace": "ns name"}, "listener.namespace"),
        ({"namespace": "ns\n"}, "listener.namespace"),
        ({"namespace": "."}, "listener.namespace"),
        ({"bridge": "a-name-of-16-chars"}, "listener.bridge"),
        ({"interface": "eth0/x"}, "listener.interface"),
        ("br0", "listener"),
        ({"vlan": 5, "bridge": "br0"}, "listener.vlan"),
    ],
)
def test_a_listener_that_cannot_be_is_refused_at_its_field(listener: object, field: str) -> None:
    assert field in problems({"id": "n", "listener": listener})


@pytest.mark.parametrize(
    "bad", ["", ".x", "-x", "a b", "a/b", "a|b", "a\n", "ä", "x" * 65, 7, None, True, b"x", ["x"]]
)
def test_an_id_outside_the_charset_is_refused(bad: object) -> None:
    assert "id" in problems(PLAIN | {"id": bad})


@pytest.mark.parametrize(
    ("subnet", "field"),
    [
        ({"cidr": "10.0.0.1/24"}, "subnets[0].cidr"),
        ({"cidr": "10.0.0.0"}, "subnets[0].cidr"),
        ({"cidr": "10.0.0.0/255.255.255.0"}, "subnets[0].cidr"),
        ({"cidr": "10.0.0.0/33"}, "subnets[0].cidr"),
        ({"cidr": "224.0.0.0/24"}, "subnets[0].cidr"),
        ({"cidr": 10}, "subnets[0].cidr"),
        ({}, "subnets[0].cidr"),
        ({"cidr": "10.0.0.0/24", "gateway": "2001:db8::1"}, "subnets[0].gateway"),
        ({"cidr": "10.0.0.0/24", "gateway": "10.0.0"}, "subnets[0].gateway"),
        ({"cidr": "10.0.0.0/24", "dns": "10.0.0.2"}, "subnets[0].dns"),
        ({"cidr": "10.0.0.0/24", "dns": ["10.0.0.2", "0.0.0.0"]}, "subnets[0].dns[1]"),
        ({"cidr": "10.0.0.0/24", "dhcp": True}, "subnets[0].dhcp"),
    ],
)
def test_a_bad_subnet_is_refused_at_its_field(subnet: object, field: str) -> None:
    assert field in problems(PLAIN | {"subnets": [subnet]})


def test_a_subnet_with_host_bits_is_told_what_to_write() -> None:
    found = problems(PLAIN | {"subnets": [{"cidr": "10.0.0.7/24"}]})
    assert "10.0.0.0/24" in found["subnets[0].cidr"]


def test_the_same_subnet_twice_is_refused() -> None:
    subnets = [{"cidr": "10.0.0.0/24"}, {"cidr": "10.0.0.0/24"}]
    assert "subnets[1]" in problems(PLAIN | {"subnets": subnets})


@pytest.mark.parametrize("mtu", [67, 65536, "1500", 1500.0, True])
def test_an_mtu_that_no_link_has_is_refused(mtu: object) -> None:
    assert "mtu" in problems(PLAIN | {"mtu": mtu})


def test_a_number_too_long_to_spell_is_refused_all_the_same() -> None:
    assert "mtu" in problems(PLAIN | {"mtu": 10**5000})


def test_all_problems_of_a_record_are_told_at_once() -> None:
    found = problems({"id": "a b", "listener": {"bridge": ""}, "mtu": 1, "sub_nets": []})
    assert found.keys() == {"id", "listener.bridge", "mtu", "sub_nets"}


def test_a_mistyped_key_is_told_the_key_that_was_meant() -> None:
    assert "did you mean subnets?" in problems(PLAIN | {"subnet": []})["subnet"]


@pytest.mark.parametrize("record", [None, [], "blue", 7, b"x"])
def test_a_record_that_is_no_mapping_is_refused(record: object) -> None:
    assert problems(record)


def test_a_refused_record_keeps_the_id_that_could_be_read() -> None:
    found = parse_network(PLAIN | {"mtu": 1})
    assert isinstance(found, Refused)
    assert found.id == "blue"
