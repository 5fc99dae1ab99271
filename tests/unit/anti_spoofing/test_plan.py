"""Where the kernel is to look at MACs, who answers there, and which address goes with which MAC."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from imdsproxy.anti_spoofing.plan import (
    ANY_MAC,
    LEARNED_PER_MAC,
    MacFilter,
    MacFilterPlan,
    excess_learned,
    plan_mac_filters,
    plan_pair,
    plan_pairs,
)
from imdsproxy.core.endpoints import Endpoint
from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hoststate import NamespaceRef, ObservedDevice, ObservedHost, ObservedNamespace
from imdsproxy.core.identity import Learned
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import (
    METADATA_IPV4,
    METADATA_IPV6,
    InstanceId,
    InterfaceListener,
    MacAddress,
    NamespaceListener,
    Network,
    NetworkId,
    Scope,
)
from imdsproxy.core.observation import AddressKey
from imdsproxy.core.wire import VERIFIED_PORT
from support.record_builders import full, instance, key, network

_RED, _GREY = NetworkId("red"), NetworkId("grey")
_PLACE = NamespaceRef("red", 42)
_MAC = "02:00:00:00:00:01"
_IPV4 = Endpoint(_RED, METADATA_IPV4, 80, None, _PLACE)
_IPV6 = Endpoint(_RED, METADATA_IPV6, 80, "br0", _PLACE, 2)
_NAMING = Naming()


def _device(
    name: str, index: int, *, mac: str = _MAC, master: int = 0, kind: str = "", up: bool = True
) -> ObservedDevice:
    return ObservedDevice(name, index, up, 1500, mac=mac, master=master, kind=kind)


_DEVICES = (
    _device("lo", 1, mac=""),
    _device("br0", 2, kind="bridge"),
    _device("v1", 3, master=2, kind="veth"),
    _device("eth9", 4),
    _device("tun0", 5, mac=""),
    _device("off", 6, up=False),
)
_HOST = ObservedHost(
    namespaces={"red": ObservedNamespace(_PLACE, {one.name: one for one in _DEVICES})}
)


def _plan(*endpoints: Endpoint, network: Network | None = None, macs: bool = True) -> MacFilterPlan:
    given = network or Network(_RED, NamespaceListener("red"))
    networks: Mapping[NetworkId, Network] = {given.id: given}
    return plan_mac_filters(networks, endpoints, _HOST, _NAMING, lambda _: macs)


@pytest.mark.parametrize(
    ("network", "macs"),
    [
        (Network(_RED, NamespaceListener("red")), False),
        (Network(_RED, NamespaceListener("red"), mac_check=False), True),
        (Network(_RED, NamespaceListener("red"), scope=Scope.ROUTER), True),
        # One that is only kept is checked as it was.
        (Network(_GREY, NamespaceListener("grey")), True),
    ],
)
def test_a_network_without_macs_or_checks_has_no_filter(network: Network, *, macs: bool) -> None:
    plan = _plan(_IPV4, _IPV6, network=network, macs=macs)
    assert plan == MacFilterPlan(plain=(_IPV4, _IPV6))
    assert plan.plain_networks == {_RED}


def test_a_filter_is_on_every_device_whose_packets_bring_a_mac_to_the_host() -> None:
    plan = _plan(_IPV4, _IPV6)
    assert plan.unverified == (_IPV4, _IPV6)
    # Of a bridge's port the bridge takes the packets.
    devices = (("br0", 2), ("eth9", 4))
    assert plan.filters == {_RED: MacFilter(_RED, _PLACE, devices, _NAMING.link(_RED))}
    assert [(one.address, one.device, one.device_index) for one in plan.verified] == [
        (METADATA_IPV4, "br0", 2),
        (METADATA_IPV4, "eth9", 4),
        (METADATA_IPV6, "br0", 2),
    ]
    assert {one.port for one in plan.verified} == {VERIFIED_PORT}
    assert plan.binds == (*plan.verified, *plan.unverified)
    assert plan.without({_RED}) == MacFilterPlan(unverified=(_IPV4, _IPV6))


def test_an_interface_of_the_host_has_its_filter_there() -> None:
    network = Network(_GREY, InterfaceListener("virbr0"))
    endpoint = Endpoint(_GREY, METADATA_IPV4, 80, "virbr0", None, 9)
    plan = _plan(endpoint, network=network)
    assert plan.filters[_GREY].namespace is None
    assert plan.filters[_GREY].devices == (("virbr0", 9),)


MAC = MacAddress("52:54:00:12:34:56")
OTHER = MacAddress("52:54:00:00:00:01")
LINK_LOCAL = "fe80::5054:ff:fe12:3456"


def _inventory(*instances: object, mac_check: bool = True) -> Inventory:
    made = Inventory()
    made.observe(full("file", [network("n1", mac_check=mac_check)], instances))  # type: ignore[arg-type]  # for brevity
    return made


@pytest.mark.parametrize(
    ("address", "mac"),
    [
        *((one, MAC) for one in ("10.0.0.5", "2001:db8::5", LINK_LOCAL)),
        ("10.0.0.6", ANY_MAC),
        # Contested, and nobody's.
        ("10.0.0.7", None),
        ("10.0.0.99", None),
    ],
)
def test_an_address_goes_with_the_mac_of_its_only_owner(
    address: str, mac: MacAddress | None
) -> None:
    records = [
        instance("a", "10.0.0.5", "2001:db8::5", mac=MAC),
        instance("b", "10.0.0.6"),
        instance("c", "10.0.0.7", mac=MacAddress("52:54:00:00:00:02")),
        instance("d", "10.0.0.7", mac=OTHER),
    ]
    asked = key("n1", address)
    assert plan_pairs(_inventory(*records), [asked], {}) == {asked: mac}
    assert plan_pair(_inventory(*records, mac_check=False), asked, {}) is None


def test_what_was_learned_goes_with_the_mac_it_was_learned_by_while_that_holds() -> None:
    asked = key("n1", "10.0.0.77")
    learned = {asked: Learned(InstanceId("a"), 0.0, mac=MAC)}
    assert plan_pair(_inventory(instance("a", mac=MAC)), asked, learned) == MAC
    assert plan_pair(_inventory(instance("a", "10.0.0.5", mac=MAC)), asked, learned) is None
    # What a record says comes first.
    claimed = _inventory(instance("a", mac=MAC), instance("b", "10.0.0.77", mac=OTHER))
    assert plan_pair(claimed, asked, learned) == OTHER


def test_the_oldest_learned_addresses_of_a_mac_make_room() -> None:
    def entry(mac: MacAddress) -> Learned:
        return Learned(InstanceId("a"), 0.0, mac=mac)

    mine: list[AddressKey] = [key("n1", f"10.0.0.{number}") for number in range(LEARNED_PER_MAC)]
    learned = {key("n1", "10.9.9.9"): entry(OTHER), **{each: entry(MAC) for each in mine}}
    assert excess_learned(learned, mine[0], MAC) == ()
    assert excess_learned(learned, key("n1", "10.0.1.1"), MAC) == (mine[0],)
    assert excess_learned(learned, key("n2", "10.0.1.1"), MAC) == ()
