"""What each network of OVN needs on this host, and what is done for it."""

from dataclasses import replace
from ipaddress import ip_interface
from typing import Final

import pytest

from imdsproxy.core.hoststate import ObservedDevice
from imdsproxy.ovn.heartbeat import agent_id, plan_registration
from imdsproxy.ovn.plan import MetadataPlace, SeenPlace, plan_host, plan_places
from imdsproxy.sources.ovn.chassis import BridgePort, LocalChassis
from support.ovn_rows import METADATA, NETWORK, PORT, known

LOCAL: Final = LocalChassis("c1", "host-1", "unix:/sb", "br-int", "system")
OUTER: Final = "tap11111111-00"
NAMESPACE: Final = f"ovnmeta-{NETWORK}"
MAC: Final = "fa:16:3e:00:00:05"
INNER: Final = ObservedDevice("tap11111111-01", 2, up=True, mtu=1442, mac=MAC)
OUTSIDE: Final = ObservedDevice(OUTER, 7, up=True, mtu=1442)
WHOLE: Final = SeenPlace(INNER, OUTSIDE, frozenset({ip_interface("10.0.0.2/24")}))
PLUGGED: Final = replace(LOCAL, ports={OUTER: BridgePort("br-int", "port-m")})


def place() -> MetadataPlace:
    return plan_places(known(PORT, METADATA), LOCAL)[NETWORK]


def test_a_network_gets_the_metadata_ports_mac_mtu_and_addresses() -> None:
    found = place()
    assert (found.namespace, found.outer, found.inner) == (NAMESPACE, OUTER, INNER.name)
    assert (found.mac, found.mtu, found.port, found.bridge) == (MAC, 1442, "port-m", "br-int")
    assert found.interfaces == {ip_interface("10.0.0.2/24")}


def test_only_subnets_that_have_ports_here_get_an_address() -> None:
    cidrs = "10.0.0.2/24 10.9.0.2/24 fd00::2/64 fd99::2/64"
    metadata = replace(METADATA, external_ids={**METADATA.external_ids, "neutron:cidrs": cidrs})
    found = plan_places(known(PORT, metadata), LOCAL)[NETWORK]
    assert found.interfaces == {ip_interface("10.0.0.2/24"), ip_interface("fd00::2/64")}


@pytest.mark.parametrize(
    ("datapath", "expected"), [("netdev", True), ("system", False), ("", False)]
)
def test_checksums_are_made_where_open_vswitch_is_in_user_space(
    datapath: str, *, expected: bool
) -> None:
    found = plan_places(known(PORT, METADATA), replace(LOCAL, datapath=datapath))
    assert found[NETWORK].in_user_space is expected


def test_a_network_whose_metadata_port_is_not_known_is_left_as_it_is() -> None:
    assert plan_places(known(PORT), LOCAL) == {}
    unknown = replace(METADATA, macs=("unknown",))
    assert plan_places(known(PORT, unknown), LOCAL) == {}


def test_a_whole_place_needs_nothing() -> None:
    assert not plan_host({NETWORK: place()}, {NAMESPACE: WHOLE}, PLUGGED, sweep=True)


@pytest.mark.parametrize(
    "seen",
    [
        SeenPlace(),
        replace(WHOLE, inner=None),
        replace(WHOLE, outer=None),
        replace(WHOLE, inner=replace(INNER, up=False)),
        replace(WHOLE, outer=replace(OUTSIDE, up=False)),
        replace(WHOLE, inner=replace(INNER, mac="02:00:00:00:00:01")),
        replace(WHOLE, inner=replace(INNER, mtu=1500)),
        replace(WHOLE, interfaces=frozenset()),
        replace(WHOLE, interfaces=WHOLE.interfaces | {ip_interface("10.9.0.2/24")}),
    ],
)
def test_a_place_that_lacks_something_is_made(seen: SeenPlace) -> None:
    plan = plan_host({NETWORK: place()}, {NAMESPACE: seen}, PLUGGED, sweep=True)
    assert plan.make == (place(),)
    assert not plan.remove


@pytest.mark.parametrize(
    "ports",
    [
        {},
        {OUTER: BridgePort("br-old", "port-m")},
        {OUTER: BridgePort("br-int", "port-x")},
    ],
)
def test_a_device_is_plugged_into_the_integration_bridge_as_the_metadata_port(
    ports: dict[str, BridgePort],
) -> None:
    local = replace(LOCAL, ports=ports)
    plan = plan_host({NETWORK: place()}, {NAMESPACE: WHOLE}, local, sweep=True)
    assert (plan.make, plan.plug) == ((), (place(),))


def test_a_place_that_no_network_needs_is_removed_once_all_is_known() -> None:
    plan = plan_host({}, {NAMESPACE: WHOLE}, PLUGGED, sweep=True)
    assert (plan.remove, plan.unplug) == ((NAMESPACE,), (OUTER,))
    assert not plan_host({}, {NAMESPACE: WHOLE}, PLUGGED, sweep=False)


def test_a_namespace_of_another_host_that_has_the_same_directory_stays() -> None:
    assert not plan_host({}, {NAMESPACE: replace(WHOLE, outer=None)}, LOCAL, sweep=True)


def test_the_agents_id_is_that_of_neutrons_own_agent() -> None:
    # As uuid5(chassis, "metadata_agent") gives it, and for a name that is no UUID in Neutron's name space.
    chassis = "3f3c5b7a-0000-4000-8000-000000000001"
    assert agent_id(chassis) == "c8882852-b669-5d1b-bc41-863db87e89e5"
    assert agent_id("host-1") == "dddb9eaa-ad62-5189-a7e1-426ef2b15c19"


def test_an_agents_id_that_is_registered_stays() -> None:
    assert plan_registration("host-1", "br-int", {}) == {
        "neutron:ovn-metadata-id": agent_id("host-1"),
        "neutron:ovn-bridge": "br-int",
    }
    present = {"neutron:ovn-metadata-id": "older", "neutron:ovn-bridge": "br-int"}
    assert plan_registration("host-1", "br-int", present) == {}
