"""What each network of OVN needs on this host, and what is done for it."""

from dataclasses import replace
from ipaddress import ip_interface
from typing import Final

import pytest

from imdsproxy.host.state import ObservedDevice
from imdsproxy.network.ovn.plan import (
    MetadataPlace,
    SeenPlace,
    networks_without_port,
    plan_host,
    plan_places,
)
from imdsproxy.sources.ovn.chassis import BridgePort, LocalChassis
from support.ovn_rows import METADATA, NETWORK, PORT, known

LOCAL: Final = LocalChassis("c1", "host-1", "unix:/sb", "br-int", "system")
OUTER: Final = "tap11111111-00"
NAMESPACE: Final = f"ovnmeta-{NETWORK}"
MAC: Final = "fa:16:3e:00:00:05"
INNER: Final = ObservedDevice("tap11111111-01", 2, up=True, mtu=1442, mac=MAC)
OUTSIDE: Final = ObservedDevice(OUTER, 7, up=True, mtu=1442)
ALWAYS: Final = frozenset(
    map(ip_interface, ("fe80::f816:3eff:fe00:5/64", "169.254.169.254/32", "fe80::a9fe:a9fe/128"))
)
WHOLE: Final = SeenPlace(INNER, OUTSIDE, ALWAYS | {ip_interface("10.0.0.2/24")}, has_checksums=True)
PLUGGED: Final = replace(LOCAL, ports={OUTER: BridgePort("br-int", "port-m", NETWORK)})


def place() -> MetadataPlace:
    return plan_places(known(PORT, METADATA), LOCAL)[NETWORK]


def test_a_network_gets_the_metadata_ports_mac_mtu_and_addresses() -> None:
    found = place()
    assert (found.namespace, found.outer, found.inner) == (NAMESPACE, OUTER, INNER.name)
    assert (found.mac, found.mtu, found.port, found.bridge) == (MAC, 1442, "port-m", "br-int")
    assert found.interfaces == ALWAYS | {ip_interface("10.0.0.2/24")}


def test_only_subnets_that_have_ports_here_get_an_address() -> None:
    cidrs = "10.0.0.2/24 10.9.0.2/24 fd00::2/64 fd99::2/64"
    metadata = replace(METADATA, external_ids={**METADATA.external_ids, "neutron:cidrs": cidrs})
    found = plan_places(known(PORT, metadata), LOCAL)[NETWORK]
    assert found.interfaces == ALWAYS | {
        ip_interface("10.0.0.2/24"),
        ip_interface("fd00::2/64"),
    }


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
        replace(WHOLE, outer=replace(OUTSIDE, mtu=1500)),
        replace(WHOLE, interfaces=frozenset()),
        replace(WHOLE, interfaces=WHOLE.interfaces - {next(iter(ALWAYS))}),
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
        {OUTER: BridgePort("br-old", "port-m", NETWORK)},
        {OUTER: BridgePort("br-int", "port-x", NETWORK)},
        {OUTER: BridgePort("br-int", "port-m")},
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


def test_a_datapath_in_user_space_needs_checksums_that_are_there() -> None:
    user_space = replace(PLUGGED, datapath="netdev")
    places = plan_places(known(PORT, METADATA), user_space)
    without = replace(WHOLE, has_checksums=False)
    assert plan_host(places, {NAMESPACE: without}, user_space, sweep=True).make
    assert not plan_host(places, {NAMESPACE: WHOLE}, user_space, sweep=True)
    assert not plan_host({NETWORK: place()}, {NAMESPACE: without}, PLUGGED, sweep=True)


def test_without_ipv6_a_place_is_whole_without_ipv6_addresses() -> None:
    ipv4 = frozenset(map(ip_interface, ("10.0.0.2/24", "169.254.169.254/32")))
    without = replace(WHOLE, ipv6=False, interfaces=ipv4)
    assert not plan_host({NETWORK: place()}, {NAMESPACE: without}, PLUGGED, sweep=True)


def test_a_place_that_was_whole_is_not_looked_at_for_another_networks_change() -> None:
    assert not plan_host({NETWORK: place()}, {}, PLUGGED, whole={place()}, sweep=True)


def test_a_network_with_ports_and_without_a_metadata_port_keeps_what_it_has() -> None:
    assert networks_without_port(known(PORT)) == (NETWORK,)
    assert networks_without_port(known(PORT, METADATA)) == ()
    assert not plan_host({}, {NAMESPACE: WHOLE}, PLUGGED, spared=(NETWORK,), sweep=True)


def test_a_port_of_ours_in_open_vswitch_goes_although_a_boot_took_its_device() -> None:
    plan = plan_host({}, {}, PLUGGED, sweep=True)
    assert (plan.remove, plan.unplug) == ((), (OUTER,))
    assert not plan_host({}, {}, PLUGGED, sweep=False)
    foreign = replace(LOCAL, ports={OUTER: BridgePort("br-int", "port-m")})
    assert not plan_host({}, {}, foreign, sweep=True)


def test_what_is_left_of_a_removal_that_was_killed_is_removed() -> None:
    left = SeenPlace(is_ours=True)
    assert plan_host({}, {NAMESPACE: left}, LOCAL, sweep=True).remove == (NAMESPACE,)


def test_a_namespace_waits_for_the_process_that_listens_in_it_and_not_for_ever() -> None:
    listened = replace(WHOLE, is_listened=True)
    plan = plan_host({}, {NAMESPACE: listened}, PLUGGED, sweep=True)
    assert (plan.remove, plan.unplug, plan.wait) == ((), (), (NAMESPACE,))
    plan = plan_host({}, {NAMESPACE: listened}, PLUGGED, overdue={NAMESPACE}, sweep=True)
    assert (plan.remove, plan.unplug, plan.wait) == ((NAMESPACE,), (OUTER,), ())


def test_a_namespace_of_another_host_that_has_the_same_directory_stays() -> None:
    assert not plan_host({}, {NAMESPACE: replace(WHOLE, outer=None)}, LOCAL, sweep=True)
