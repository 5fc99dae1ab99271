from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.core.addresses import link_local_of, mac_of, normalise_address
from imdsproxy.core.identity import (
    Ambiguous,
    Found,
    How,
    Learned,
    Mismatch,
    Unknown,
    UnknownReason,
    holds,
    identify,
)
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import MacAddress, NetworkId
from imdsproxy.core.observation import Claimant
from support.record_builders import full, instance, network, port
from support.record_strategies import ipv4, macs

N1 = NetworkId("n1")
MAC = MacAddress("52:54:00:12:34:56")
OTHER = MacAddress("52:54:00:00:00:01")
A = instance("a", "10.0.0.5", mac=MAC, ports=[port("n1", "10.0.0.9")])


@pytest.fixture
def inventory() -> Inventory:
    made = Inventory()
    made.observe(full("file", [network("n1"), network("n2", bridge="br1")], [A]))
    return made


@pytest.mark.parametrize(
    ("address", "number", "how"),
    [
        ("10.0.0.5", 0, How.ADDRESS),
        ("::ffff:10.0.0.5", 0, How.ADDRESS),
        ("10.0.0.9", 1, How.ADDRESS),
        ("fe80::5054:ff:fe12:3456", 0, How.EUI64),
        ("fe80::5054:ff:fe12:3456%eth0", 0, How.EUI64),
    ],
)
def test_a_guest_is_known_by_each_of_its_addresses(
    inventory: Inventory, address: str, number: int, how: How
) -> None:
    assert identify(inventory, N1, ip_address(address)) == Found(A, A.ports[number], how)


def test_a_random_link_local_address_is_known_by_the_neighbour_table(inventory: Inventory) -> None:
    address = ip_address("fe80::1234:5678:9abc:def0")
    assert identify(inventory, N1, address) == Unknown(UnknownReason.ADDRESS)
    found = identify(inventory, N1, address, neighbour_mac=MAC)
    assert found == Found(A, A.ports[0], How.NEIGHBOUR)


def test_an_ipv4_link_local_address_is_known_by_the_neighbour_table(inventory: Inventory) -> None:
    found = identify(inventory, N1, ip_address("169.254.7.7"), neighbour_mac=MAC)
    assert isinstance(found, Found)


def test_an_address_that_may_be_behind_a_router_is_not_known_by_a_mac(
    inventory: Inventory,
) -> None:
    inventory.observe(full("file", [network("n1", mac_check=False)], [A]))
    found = identify(inventory, N1, ip_address("10.0.0.77"), neighbour_mac=MAC)
    assert found == Unknown(UnknownReason.ADDRESS)


def test_where_macs_are_not_checked_an_address_is_believed_whatever_mac_has_it(
    inventory: Inventory,
) -> None:
    inventory.observe(full("file", [network("n1", mac_check=False)], [A]))
    found = identify(inventory, N1, ip_address("10.0.0.5"), neighbour_mac=OTHER)
    assert found == Found(A, A.ports[0], How.ADDRESS)


@pytest.mark.parametrize("address", ["10.0.0.5", "fe80::5054:ff:fe12:3456"])
def test_an_address_goes_with_its_port_s_mac_only(inventory: Inventory, address: str) -> None:
    found = identify(inventory, N1, ip_address(address), neighbour_mac=MAC)
    assert isinstance(found, Found)
    found = identify(inventory, N1, ip_address(address), neighbour_mac=OTHER)
    assert found == Mismatch(A, expected=MAC)


def test_an_address_of_a_port_without_a_mac_goes_with_any(inventory: Inventory) -> None:
    found = identify(inventory, N1, ip_address("10.0.0.9"), neighbour_mac=OTHER)
    assert found == Found(A, A.ports[1], How.ADDRESS)


def test_a_port_that_lists_addresses_of_a_family_has_no_others_of_it(inventory: Inventory) -> None:
    found = identify(inventory, N1, ip_address("10.0.0.77"), neighbour_mac=MAC)
    assert found == Unknown(UnknownReason.OTHER_ADDRESS)
    # Of the other family it lists none.
    found = identify(inventory, N1, ip_address("2001:db8::77"), neighbour_mac=MAC)
    assert found == Found(A, A.ports[0], How.NEIGHBOUR)


def test_a_link_local_address_in_a_record_does_not_say_where_its_others_are() -> None:
    record = instance("a", "fe80::7", mac=MAC)
    made = Inventory()
    made.observe(full("file", [network("n1")], [record]))
    found = identify(made, N1, ip_address("2001:db8::77"), neighbour_mac=MAC)
    assert found == Found(record, record.ports[0], How.NEIGHBOUR)


def test_what_was_learned_holds_as_long_as_the_record_says_so() -> None:
    made = Inventory()
    key = N1, ip_address("10.0.0.77")
    entry = Learned(A.id, 0.0, mac=MAC)
    made.observe(full("file", [network("n1")], [instance("a", mac=MAC)]))
    assert holds(made, key, entry)
    for other in (
        instance("a", mac=OTHER),
        instance("a", "10.0.0.5", mac=MAC),
        instance("b", mac=MAC),
    ):
        made.observe(full("file", [network("n1")], [other]))
        assert not holds(made, key, entry)


def test_an_unknown_mac_is_nobody(inventory: Inventory) -> None:
    found = identify(
        inventory, N1, ip_address("fe80::1"), neighbour_mac=MacAddress("52:54:00:00:00:01")
    )
    assert found == Unknown(UnknownReason.MAC)


def test_the_same_address_in_another_network_is_nobody(inventory: Inventory) -> None:
    assert identify(inventory, NetworkId("n2"), ip_address("10.0.0.5")) == Unknown(
        UnknownReason.ADDRESS
    )


def test_a_network_nobody_told_of_is_unknown(inventory: Inventory) -> None:
    assert identify(inventory, NetworkId("n9"), ip_address("10.0.0.5")) == Unknown(
        UnknownReason.NETWORK
    )


@pytest.mark.parametrize("address", ["10.0.0.5", "fe80::5054:ff:fe12:3456", "fe80::99"])
def test_two_claimants_are_never_guessed_between(inventory: Inventory, address: str) -> None:
    inventory.observe(full("sqlite", [], [instance("b", "10.0.0.5", mac=MAC)]))
    found = identify(inventory, N1, ip_address(address), neighbour_mac=MAC)
    assert found == Ambiguous((Claimant("file", "a"), Claimant("sqlite", "b")))


@given(macs)
def test_a_mac_comes_back_from_its_link_local_address(mac: MacAddress) -> None:
    address = link_local_of(mac)
    assert address.is_link_local
    assert mac_of(address) == mac


@given(st.integers(0, 2**128 - 1).map(IPv6Address))
def test_no_mac_is_seen_where_there_is_none(address: IPv6Address) -> None:
    mac = mac_of(address)
    assert mac is None or link_local_of(mac) == address


def test_the_example_of_rfc_4291_appendix_a() -> None:
    # 34-56-78-9A-BC-DE gives the interface identifier 3656:78FF:FE9A:BCDE.
    assert link_local_of(MacAddress("34:56:78:9a:bc:de")) == ip_address("fe80::3656:78ff:fe9a:bcde")


def test_an_ipv4_address_has_no_mac() -> None:
    assert mac_of(ip_address("10.0.0.5")) is None


@given(ipv4)
def test_a_mapped_address_is_the_ipv4_one(address: IPv4Address) -> None:
    assert normalise_address(IPv6Address(f"::ffff:{address}")) == address
    assert normalise_address(address) == address


def test_an_ordinary_ipv6_address_stays() -> None:
    address = IPv6Address("2001:db8::5")
    assert normalise_address(address) is address
