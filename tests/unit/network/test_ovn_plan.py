"""What each network of OVN needs on this host, and what is done for it."""

from dataclasses import replace
from ipaddress import ip_interface
from typing import Final

import pytest

from imdsproxy.host.names import Naming
from imdsproxy.host.state import (
    ListeningSocket,
    NamespaceRef,
    ObservedDevice,
    ObservedEnd,
    ObservedHost,
    ObservedNamespace,
)
from imdsproxy.model.entities import METADATA_IPV4, NetworkId
from imdsproxy.network.ovn.plan import OvnWanted, plan_ovn
from imdsproxy.network.planned import (
    AttachOvn,
    ChangePorts,
    DetachOvn,
    HostOp,
    MetadataPlace,
)
from imdsproxy.sources.ovn.ports import BridgePort, LocalChassis, PortBinding
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
LO: Final = ObservedDevice("lo", 1, up=True, mtu=65536)
END: Final = ObservedEnd(ALWAYS | {ip_interface("10.0.0.2/24")}, has_checksums=True)
WHOLE: Final = ObservedNamespace(
    NamespaceRef(NAMESPACE, 77), {one.name: one for one in (LO, INNER)}, end=END
)
PLUGGED: Final = replace(LOCAL, ports={OUTER: BridgePort("br-int", "port-m", NETWORK)})
NAMING: Final = Naming()
SOCKET: Final = ListeningSocket(METADATA_IPV4, 80, None, 1)


def places(*rows: PortBinding, local: LocalChassis = LOCAL) -> dict[NetworkId, MetadataPlace]:
    return dict(OvnWanted.of(known(*rows), local, sweep=True).places)


def place() -> MetadataPlace:
    return places(PORT, METADATA)[NETWORK]


def plan(
    *rows: PortBinding,
    seen: ObservedNamespace | None = WHOLE,
    outer: ObservedDevice | None = OUTSIDE,
    local: LocalChassis = PLUGGED,
    sweep: bool = True,
    overdue: tuple[NetworkId, ...] = (),
) -> list[HostOp]:
    """What these rows need done to a host that has one namespace and one device."""
    root = ObservedNamespace(None, {} if outer is None else {OUTER: outer})
    host = ObservedHost(root, {} if seen is None else {NAMESPACE: seen})
    wanted = OvnWanted.of(known(*rows), local, sweep=sweep)
    return list(plan_ovn(wanted, host, NAMING, overdue)[0])


def with_inner(inner: ObservedDevice) -> ObservedNamespace:
    return replace(WHOLE, devices={"lo": LO, inner.name: inner})


def with_addresses(*interfaces: str, ipv6: bool = True) -> ObservedNamespace:
    given = frozenset(map(ip_interface, interfaces))
    return replace(WHOLE, end=replace(END, interfaces=given, ipv6=ipv6))


def test_a_network_gets_the_metadata_ports_mac_mtu_and_addresses() -> None:
    found = place()
    assert (found.namespace, found.outer, found.inner) == (NAMESPACE, OUTER, INNER.name)
    assert (found.mac, found.mtu, found.port, found.bridge) == (MAC, 1442, "port-m", "br-int")
    assert found.interfaces == ALWAYS | {ip_interface("10.0.0.2/24")}


def test_only_subnets_that_have_ports_here_get_an_address() -> None:
    cidrs = "10.0.0.2/24 10.9.0.2/24 fd00::2/64 fd99::2/64"
    metadata = replace(METADATA, external_ids={**METADATA.external_ids, "neutron:cidrs": cidrs})
    found = places(PORT, metadata)[NETWORK]
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
    found = places(PORT, METADATA, local=replace(LOCAL, datapath=datapath))
    assert found[NETWORK].in_user_space is expected


def test_a_network_whose_metadata_port_is_not_known_is_left_as_it_is() -> None:
    assert places(PORT) == {}
    unknown = replace(METADATA, macs=("unknown",))
    assert places(PORT, unknown) == {}


def test_a_whole_place_needs_nothing() -> None:
    assert plan(PORT, METADATA) == []


ADDRESSES: Final = tuple(map(str, END.interfaces))


@pytest.mark.parametrize(
    ("seen", "outer"),
    [
        (None, OUTSIDE),
        (replace(WHOLE, devices={}, end=None), OUTSIDE),
        (replace(WHOLE, end=None), OUTSIDE),
        (WHOLE, None),
        (with_inner(replace(INNER, up=False)), OUTSIDE),
        (WHOLE, replace(OUTSIDE, up=False)),
        (with_inner(replace(INNER, mac="02:00:00:00:00:01")), OUTSIDE),
        (with_inner(replace(INNER, mtu=1500)), OUTSIDE),
        (WHOLE, replace(OUTSIDE, mtu=1500)),
        (with_addresses(), OUTSIDE),
        (with_addresses(*ADDRESSES[1:]), OUTSIDE),
        (with_addresses(*ADDRESSES, "10.9.0.2/24"), OUTSIDE),
    ],
)
def test_a_place_that_lacks_something_is_made_and_plugged_in_once_it_is_whole(
    seen: ObservedNamespace | None, outer: ObservedDevice | None
) -> None:
    assert plan(PORT, METADATA, seen=seen, outer=outer, local=LOCAL) == [AttachOvn(place(), NAMING)]


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
    assert plan(PORT, METADATA, local=local) == [ChangePorts((place(),), ())]
    wanted = OvnWanted.of(known(PORT, METADATA), local, sweep=True)
    assert wanted.is_new(wanted)


def test_the_same_needs_are_new_only_once() -> None:
    wanted = OvnWanted.of(known(PORT, METADATA), PLUGGED, sweep=True)
    assert wanted.is_new(None)
    assert not wanted.is_new(wanted)
    assert wanted.is_new(replace(wanted, sweep=False))
    assert OvnWanted.of(known(), PLUGGED, sweep=True).is_new(wanted)


REMOVAL: Final = [ChangePorts((), (OUTER,)), DetachOvn(NETWORK, NAMING)]


def test_a_place_that_no_network_needs_is_removed_once_all_is_known() -> None:
    assert plan() == REMOVAL
    assert plan(sweep=False) == []


def test_a_datapath_in_user_space_needs_checksums_that_are_there() -> None:
    user_space = replace(PLUGGED, datapath="netdev")
    without = replace(WHOLE, end=replace(END, has_checksums=False))
    (attach,) = plan(PORT, METADATA, seen=without, local=user_space)
    assert isinstance(attach, AttachOvn)
    assert plan(PORT, METADATA, local=user_space) == []
    assert plan(PORT, METADATA, seen=without) == []


def test_without_ipv6_a_place_is_whole_without_ipv6_addresses() -> None:
    without = with_addresses("10.0.0.2/24", "169.254.169.254/32", ipv6=False)
    assert plan(PORT, METADATA, seen=without) == []


def test_a_network_with_ports_and_without_a_metadata_port_keeps_what_it_has() -> None:
    assert OvnWanted.of(known(PORT), LOCAL, sweep=True).spared == (NETWORK,)
    assert OvnWanted.of(known(PORT, METADATA), LOCAL, sweep=True).spared == ()
    assert plan(PORT) == []


def test_a_port_of_ours_in_open_vswitch_goes_although_a_boot_took_its_device() -> None:
    assert plan(seen=None, outer=None) == [ChangePorts((), (OUTER,))]
    assert plan(seen=None, outer=None, sweep=False) == []
    foreign = replace(LOCAL, ports={OUTER: BridgePort("br-int", "port-m")})
    assert plan(seen=None, outer=None, local=foreign) == []


def test_what_is_left_of_a_removal_that_was_killed_is_removed() -> None:
    lo = replace(LO, alias=NAMING.alias(NETWORK))
    for left in (ObservedNamespace(None), replace(WHOLE, devices={"lo": lo}, end=None)):
        assert plan(seen=left, outer=None, local=LOCAL) == [DetachOvn(NETWORK, NAMING)]


def test_a_namespace_waits_for_another_process_that_listens_in_it_and_not_for_ever() -> None:
    listened = replace(WHOLE, sockets=(SOCKET,))
    assert plan(seen=listened) == []
    assert plan(seen=listened, overdue=(NETWORK,)) == REMOVAL
    assert plan(seen=replace(WHOLE, sockets=(replace(SOCKET, ours=True),))) == REMOVAL
    host = ObservedHost(namespaces={NAMESPACE: listened})
    for rows, overdue, waiting in (
        ((), (), {NETWORK}),
        ((), (NETWORK,), set()),
        ((PORT,), (), set()),
    ):
        wanted = OvnWanted.of(known(*rows), PLUGGED, sweep=True)
        assert plan_ovn(wanted, host, NAMING, overdue)[1] == waiting


def test_a_namespace_of_another_host_that_has_the_same_directory_stays() -> None:
    assert plan(outer=None, local=LOCAL) == []
