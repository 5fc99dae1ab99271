from __future__ import annotations

from ipaddress import IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.core.addresses import link_local_of, mac_of
from imdsproxy.core.identity import (
    Ambiguous,
    Found,
    How,
    Identity,
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
from support.record_strategies import macs

N1 = NetworkId("n1")
MAC = MacAddress("52:54:00:12:34:56")
OTHER = MacAddress("52:54:00:00:00:01")
A = instance("a", "10.0.0.5", mac=MAC, ports=[port("n1", "10.0.0.9")])


@pytest.fixture
def inventory() -> Inventory:
    made = Inventory()
    made.observe(full("file", [network("n1"), network("n2", bridge="br1")], [A]))
    return made


_BY = Found(A, A.ports[0], How.NEIGHBOUR)
_UNKNOWN = Unknown(UnknownReason.ADDRESS)
_RANDOM = "fe80::1234:5678:9abc:def0"


@pytest.mark.parametrize(
    ("address", "mac", "wanted"),
    [
        # By each of its addresses, with its port's MAC, or where the MAC is unknown.
        *(("10.0.0.5", mac, Found(A, A.ports[0], How.ADDRESS)) for mac in (None, MAC)),
        ("::ffff:10.0.0.5", None, Found(A, A.ports[0], How.ADDRESS)),
        *(("10.0.0.9", mac, Found(A, A.ports[1], How.ADDRESS)) for mac in (None, OTHER)),
        *(("fe80::5054:ff:fe12:3456", mac, Found(A, A.ports[0], How.EUI64)) for mac in (None, MAC)),
        ("fe80::5054:ff:fe12:3456%eth0", None, Found(A, A.ports[0], How.EUI64)),
        *((one, OTHER, Mismatch(A, expected=MAC)) for one in ("10.0.0.5", "fe80::5054:ff:fe12:3456")),
        # By the neighbour table, where the port lists no address of the family.
        (_RANDOM, None, _UNKNOWN),
        *((one, MAC, _BY) for one in (_RANDOM, "169.254.7.7", "2001:db8::77")),
        ("10.0.0.77", MAC, Unknown(UnknownReason.OTHER_ADDRESS)),
        ("fe80::1", OTHER, Unknown(UnknownReason.MAC)),
    ],
)  # fmt: skip
def test_a_guest_is_known_by_its_addresses_together_with_its_mac(
    inventory: Inventory, address: str, mac: MacAddress | None, wanted: Identity
) -> None:
    assert identify(inventory, N1, ip_address(address), neighbour_mac=mac) == wanted


@pytest.mark.parametrize(
    ("address", "wanted"),
    [("10.0.0.77", _UNKNOWN), ("10.0.0.5", Found(A, A.ports[0], How.ADDRESS)), (_RANDOM, _BY)],
)
def test_where_macs_are_not_checked_only_link_local_addresses_are_known_by_one(
    inventory: Inventory, address: str, wanted: Identity
) -> None:
    inventory.observe(full("file", [network("n1", mac_check=False)], [A]))
    mac = OTHER if isinstance(wanted, Found) and wanted.how is How.ADDRESS else MAC
    assert identify(inventory, N1, ip_address(address), neighbour_mac=mac) == wanted


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


@pytest.mark.parametrize(
    ("name", "reason"), [("n2", UnknownReason.ADDRESS), ("n9", UnknownReason.NETWORK)]
)
def test_the_same_address_in_another_network_is_unknown(
    inventory: Inventory, name: str, reason: UnknownReason
) -> None:
    assert identify(inventory, NetworkId(name), ip_address("10.0.0.5")) == Unknown(reason)


@pytest.mark.parametrize("address", ["10.0.0.5", "fe80::5054:ff:fe12:3456", "fe80::99"])
def test_two_claimants_are_never_guessed_between(inventory: Inventory, address: str) -> None:
    inventory.observe(full("sqlite", [], [instance("b", "10.0.0.5", mac=MAC)]))
    found = identify(inventory, N1, ip_address(address), neighbour_mac=MAC)
    assert found == Ambiguous((Claimant("file", "a"), Claimant("sqlite", "b")))


@given(macs, st.integers(0, 2**128 - 1).map(IPv6Address))
def test_a_mac_comes_back_from_its_link_local_address_and_from_no_other(
    mac: MacAddress, other: IPv6Address
) -> None:
    assert link_local_of(mac).is_link_local
    assert mac_of(link_local_of(mac)) == mac
    seen = mac_of(other)
    assert seen is None or link_local_of(seen) == other
    # RFC 4291 appendix A: 34-56-78-9A-BC-DE gives the interface identifier 3656:78FF:FE9A:BCDE.
    assert link_local_of(MacAddress("34:56:78:9a:bc:de")) == ip_address("fe80::3656:78ff:fe9a:bcde")
