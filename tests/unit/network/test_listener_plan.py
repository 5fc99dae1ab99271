import errno
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.errors import Problem
from imdsproxy.host.names import Naming
from imdsproxy.host.state import (
    AddressState,
    Effect,
    Family,
    ListeningSocket,
    NamespaceRef,
    ObservedAddress,
    ObservedDevice,
    ObservedHost,
    ObservedNamespace,
    SocketOwner,
    merge_observed,
)
from imdsproxy.model.entities import (
    METADATA_IPV4,
    METADATA_IPV6,
    BridgeListener,
    InterfaceListener,
    Listener,
    NamespaceListener,
    Network,
    NetworkId,
    Subnet,
)
from imdsproxy.network.endpoints import find_degraded
from imdsproxy.network.listeners.plan import (
    ListenerPlan,
    PlanMemo,
    explain_pending,
    find_left_to_others,
    note_tables,
    plan_listeners,
    plan_redirects,
)
from imdsproxy.network.listeners.rules import Diversions, plan_diversions
from imdsproxy.network.planned import (
    AddAddress,
    AttachBridge,
    DeleteLink,
    DeleteNamespace,
    Endpoint,
    Foreign,
    HostOp,
    MakeTable,
    NotServed,
    NotServedCode,
    RemoveAddress,
    RemoveTable,
    RouterTable,
)

NAMING = Naming()
BLUE = NetworkId("blue")
REF = NamespaceRef("ns-blue", 77)
LO = ObservedDevice("lo", 1, up=True, mtu=65536)
TAP = ObservedDevice("tap0", 2, up=True, mtu=1500)
V4 = ObservedAddress("tap0", METADATA_IPV4, 32)
V6 = ObservedAddress("tap0", METADATA_IPV6, 64)
BRIDGE = ObservedDevice("br0", 5, up=True, mtu=1400, kind="bridge")
OUR_NS, OUR_LINK, ALIAS = NAMING.namespace(BLUE), NAMING.link(BLUE), NAMING.alias(BLUE)
INNER = NAMING.inner_device
FULL = ObservedNamespace(REF, {"lo": LO, "tap0": TAP}, (V4, V6))
IN_NS, ON_TAP = NamespaceListener("ns-blue"), NamespaceListener("ns-blue", "tap0")
MANAGED = NamespaceListener("ns-blue", "tap0", manage_addresses=True)
INTERFACE, ON_BRIDGE = InterfaceListener("tap0"), BridgeListener("br0")


def _networks(listeners: Mapping[str, Listener]) -> dict[NetworkId, Network]:
    return {NetworkId(name): Network(NetworkId(name), one) for name, one in listeners.items()}


def _blue(listener: Listener) -> dict[NetworkId, Network]:
    return _networks({"blue": listener})


def _host(*namespaces: ObservedNamespace, root: ObservedNamespace | None = None) -> ObservedHost:
    named = {one.ref.name: one for one in namespaces if one.ref is not None}
    return ObservedHost(root or ObservedNamespace(None), named)


def _root(*devices: ObservedDevice, addresses: tuple[ObservedAddress, ...] = ()) -> ObservedHost:
    seen = ObservedNamespace(None, {one.name: one for one in devices}, addresses)
    return _host(root=seen)


def _ns(base: ObservedNamespace = FULL, **changes: object) -> ObservedHost:
    return _host(replace(base, **changes))  # type: ignore[arg-type]  # one field at a time


def _ipv6(device: str = "tap0", state: AddressState = AddressState.USABLE) -> ObservedHost:
    return _ns(addresses=(V4, replace(V6, device=device, state=state)))


def _enslaved(kind: str) -> ObservedHost:
    master = ObservedDevice("m0", 9, up=True, mtu=1500, kind=kind)
    return _root(replace(TAP, master=9), master, addresses=(V4, V6))


def _guest(*addresses: ObservedAddress) -> ObservedHost:
    seen = _root(TAP, addresses=addresses).root
    return _host(root=replace(seen, own_metadata="its SMBIOS says Amazon EC2"))


def _socket(address: str, device: str | None = None, *, ours: bool = False) -> ListeningSocket:
    owner = SocketOwner(41, "nginx")
    return ListeningSocket(ip_address(address), 80, device, 5, owners=(owner,), ours=ours)


def _bridged(which: str = "", **changes: object) -> ObservedHost:
    """All that a bridge listener needs, but for `changes` of a device of that name, or of the namespace."""
    outside = {"br0": BRIDGE, OUR_LINK: ObservedDevice(OUR_LINK, 6, True, 1400, ALIAS, 5, "veth")}
    inner = ObservedDevice(INNER, 2, up=True, mtu=1400, alias=ALIAS, kind="veth")
    inside = {"lo": replace(LO, alias=ALIAS), INNER: inner}
    for devices in (outside, inside):
        if which in devices:
            changed = replace(devices.pop(which), **changes)  # type: ignore[arg-type]  # one field at a time
            devices[changed.name] = changed
    seen = ObservedNamespace(
        NamespaceRef(OUR_NS, 99),
        inside,
        tuple(replace(one, device=INNER, protocol=NAMING.protocol) for one in (V4, V6)),
        frozenset((family, INNER) for family in Family),
    )
    if not which:
        seen = replace(seen, **changes)  # type: ignore[arg-type]  # one field at a time
    return _host(seen, root=ObservedNamespace(None, outside))


_TWO = replace(
    FULL,
    devices={**FULL.devices, "tap1": replace(TAP, name="tap1", index=3)},
    addresses=(V4, V6, replace(V6, device="tap1")),
)
_DOWN = replace(TAP, up=False)
_Trials: TypeAlias = dict[tuple[Family, str | None], int]
_BUSY: _Trials = {(Family.IPV4, None): errno.EADDRINUSE}
_BUSY_TAP: _Trials = {(Family.IPV6, "tap0"): errno.EADDRINUSE}
_REFUSED: _Trials = {(Family.IPV4, None): errno.EADDRNOTAVAIL}
_IN_USE = "port-busy: 169.254.169.254 port 80 is in use by"
_HALF_MADE = {OUR_NS: ObservedNamespace(None), "another-s": ObservedNamespace(None)}


def test_both_addresses_of_a_namespace_are_bound_ipv6_to_its_device() -> None:
    four = Endpoint(BLUE, METADATA_IPV4, 80, None, REF)
    six = Endpoint(BLUE, METADATA_IPV6, 80, "tap0", REF, device_index=2)
    assert plan_listeners(_blue(IN_NS), _host(FULL)) == ListenerPlan((four, six))
    # A device made again under its name is another endpoint.
    again = replace(FULL, devices={"lo": LO, "tap0": replace(TAP, index=9)})
    after = plan_listeners(_blue(IN_NS), _host(again)).endpoints
    assert after == (four, replace(six, device_index=9))


@pytest.mark.parametrize(
    ("listener", "host", "bound", "family", "not_served"),
    [
        (ON_TAP, _ns(), ["tap0", "tap0"], None, ""),
        (ON_TAP, _ns(addresses=(replace(V4, device="lo"), V6)), ["tap0", "tap0"], None, ""),
        (IN_NS, _host(_TWO), [None, "tap0", "tap1"], None, ""),
        # One device that is blocked does not leave the family out.
        (IN_NS, _ns(_TWO, trials=_BUSY_TAP), [None, "tap1"], None, ""),
        (IN_NS, _host(), [], None, "namespace-missing: there is no network namespace ns-blue"),
        (IN_NS, _ns(problem="cannot enter"), [], None, "namespace-unusable: cannot enter"),
        (ON_TAP, _ns(devices={"lo": LO}), [], None, "device-missing: there is no device tap0 in"),
        (ON_TAP, _ns(devices={"tap0": _DOWN}), [], None, "device-down: device tap0 in namespace"),
        # Addresses that we do not manage are reported, and never added.
        (IN_NS, _ns(addresses=(V4,)), [None], 6, "address-missing: fe80::a9fe:a9fe is not on any"),
        (ON_TAP, _ns(addresses=(V6,)), ["tap0"], 4, "address-missing: 169.254.169.254 is not on d"),
        (IN_NS, _ipv6("lo"), [None], 6, "address-on-loopback: fe80::a9fe:a9fe is on lo, where no"),
        (IN_NS, _ipv6(state=AddressState.TENTATIVE), [None], 6, "address-tentative: fe80::a9fe:a"),
        (IN_NS, _ipv6(state=AddressState.DUPLICATE), [None], 6, "address-duplicate: fe80::a9fe:a"),
        (IN_NS, _ns(trials=_BUSY), ["tap0"], 4, f"{_IN_USE} a program that is not visible"),
        (
            IN_NS,
            _ns(trials=_BUSY, sockets=(_socket("0.0.0.0"),)),
            ["tap0"],
            4,
            f"{_IN_USE} nginx (pid 41)",
        ),
        (IN_NS, _ns(trials=_REFUSED), ["tap0"], 4, "bind-refused: the kernel refuses to bind 1"),
        (INTERFACE, _enslaved("bridge"), [], None, "device-enslaved: device tap0 belongs to bridg"),
        (INTERFACE, _enslaved("bond"), [], None, "device-enslaved: device tap0 belongs to bond m0"),
        (INTERFACE, _enslaved("team"), [], None, "device-enslaved: device tap0 belongs to team m0"),
        (INTERFACE, _enslaved("openvswitch"), [], None, "device-enslaved: device tap0 belongs to "),
        (INTERFACE, _enslaved("vrf"), ["tap0", "tap0"], None, ""),
        (INTERFACE, _root(), [], None, "device-missing: there is no device tap0"),
        (INTERFACE, _root(_DOWN), [], None, "device-down: device tap0 is down"),
        # What the host reads itself stays reachable, unless it has the address already.
        (
            INTERFACE,
            _guest(),
            [],
            None,
            "host-metadata: with 169.254.169.254 on tap0 this host woul",
        ),
        (INTERFACE, _guest(V4, V6), ["tap0", "tap0"], None, ""),
        (ON_BRIDGE, _root(), [], None, "device-missing: there is no bridge br0"),
        (BridgeListener("tap0"), _root(TAP), [], None, "not-a-bridge: tap0 is a plain device, not"),
        (ON_BRIDGE, _root(replace(BRIDGE, up=False)), [], None, "device-down: bridge br0 is down"),
        (ON_BRIDGE, _bridged(), [INNER, INNER], None, ""),
        # What has our name and is not ours is left alone.
        (ON_BRIDGE, _bridged("lo", alias="another's"), [], None, "name-taken: namespace "),
        (ON_BRIDGE, _bridged(OUR_LINK, alias="another's"), [], None, "name-taken: link "),
        (ON_BRIDGE, _bridged(OUR_LINK, alias="", kind="tun"), [], None, "name-taken: link "),
        (ON_BRIDGE, _bridged(problem="cannot enter"), [], None, "namespace-unusable: cannot enter"),
    ],
)
def test_what_can_be_bound_is_and_what_cannot_is_left_out_with_the_reason(
    listener: Listener,
    host: ObservedHost,
    bound: list[str | None],
    family: int | None,
    not_served: str,
) -> None:
    plan = plan_listeners(_blue(listener), host)
    assert [one.device for one in plan.endpoints] == bound
    assert [one.family for one in plan.not_served] == ([family] if not_served else [])
    assert all(f"{one.code}: {one.reason}".startswith(not_served) for one in plan.not_served)
    assert all(one.effect is Effect.BLOCKS for one in plan.foreign)
    assert [one.sockets for one in plan.not_served if one.sockets] == [
        (one.socket,) for one in plan.foreign
    ]
    assert plan.ops == ()


_ADDED = [AddAddress(BLUE, None, "tap0", one.address, NAMING.protocol) for one in (V4, V6)]


@pytest.mark.parametrize(
    ("listener", "host", "ops", "pending"),
    [
        (INTERFACE, _root(TAP), _ADDED, [4, 6]),
        (INTERFACE, _root(TAP, addresses=(V4,)), _ADDED[1:], [6]),
        (MANAGED, _ns(addresses=()), [replace(one, namespace="ns-blue") for one in _ADDED], [4, 6]),
        (MANAGED, _ns(), [], []),
        (ON_BRIDGE, _root(BRIDGE), [AttachBridge(BLUE, "br0", 1400, NAMING)], [None]),
    ],
)
def test_what_a_listener_lacks_is_added_and_pending_meanwhile(
    listener: Listener, host: ObservedHost, ops: list[HostOp], pending: list[int | None]
) -> None:
    plan = plan_listeners(_blue(listener), host)
    assert list(plan.ops) == ops
    assert [one.family for one in plan.not_served] == pending
    assert all(one.code is NotServedCode.PENDING for one in plan.not_served)


@pytest.mark.parametrize(
    "host",
    [
        _bridged("lo", up=False),
        *(_bridged(name, up=False) for name in (OUR_LINK, INNER)),
        *(_bridged(name, mtu=1500) for name in (OUR_LINK, INNER)),
        *(_bridged(OUR_LINK, **change) for change in ({"alias": ""}, {"master": 0})),
        *(_bridged(name, name="other") for name in (OUR_LINK, INNER)),
        _bridged(addresses=(replace(V4, device=INNER),)),
        _bridged(default_routes=frozenset({(Family.IPV4, INNER), (Family.IPV6, "lo")})),
        _host(ObservedNamespace(NamespaceRef(OUR_NS, 9), {"lo": LO}), root=_root(BRIDGE).root),
        replace(_root(BRIDGE), namespaces=_HALF_MADE),
    ],
)
def test_a_bridge_that_lacks_something_is_attached_again(host: ObservedHost) -> None:
    ops = plan_listeners(_blue(ON_BRIDGE), host, sweep=False).ops
    assert ops == (AttachBridge(BLUE, "br0", 1400, NAMING),)


_MARKED = tuple(replace(one, protocol=NAMING.protocol) for one in (V4, V6))
_OURS = _ns(addresses=_MARKED)
_REMOVALS = [RemoveAddress("ns-blue", "tap0", one.address, one.prefix) for one in _MARKED]
_OF_BRIDGE = [DeleteNamespace(OUR_NS), DeleteLink(OUR_LINK)]


@pytest.mark.parametrize(
    ("networks", "host", "more", "removals"),
    [
        (_blue(MANAGED), _OURS, {}, []),
        ({}, _OURS, {}, _REMOVALS),
        ({}, _OURS, {"managed": {("ns-blue", "tap0")}}, _REMOVALS),
        ({}, _OURS, {"managed": {("other", "eth0")}}, []),
        ({}, _OURS, {"sweep": False}, []),
        ({}, _OURS, {"naming": Naming("other")}, []),
        ({}, _ns(), {}, []),
        # Their management was switched off, or the device is another one.
        (_blue(ON_TAP), _OURS, {}, _REMOVALS),
        (_blue(replace(MANAGED, device="lo")), _OURS, {}, _REMOVALS),
        (_blue(INTERFACE), _OURS, {}, _REMOVALS),
        (
            {},
            _root(TAP, addresses=_MARKED),
            {},
            [replace(one, namespace=None) for one in _REMOVALS],
        ),
        ({}, _bridged(), {}, _OF_BRIDGE),
        ({}, _bridged(), {"sweep": False}, []),
        ({}, _bridged(), {"naming": Naming("other")}, []),
        # Their maker was killed before it could mark them.
        ({}, _bridged(OUR_LINK, alias=""), {}, _OF_BRIDGE),
        ({}, replace(_root(BRIDGE), namespaces=_HALF_MADE), {}, _OF_BRIDGE[:1]),
        # Not ours.
        ({}, _bridged(OUR_LINK, alias="another's"), {}, _OF_BRIDGE[:1]),
        ({}, _bridged(OUR_LINK, alias="", kind="tun"), {}, _OF_BRIDGE[:1]),
        ({}, _bridged("lo", alias="another's"), {}, _OF_BRIDGE[1:]),
        ({}, _bridged("lo", alias=""), {}, _OF_BRIDGE[1:]),
    ],
)
def test_what_is_ours_goes_with_its_network_and_not_before(
    networks: dict[NetworkId, Network],
    host: ObservedHost,
    more: dict[str, Any],
    removals: list[HostOp],
) -> None:
    ops = plan_listeners(networks, host, **more).ops
    assert [one for one in ops if one.network is None] == removals


@pytest.mark.parametrize(
    ("address", "device", "more", "expected"),
    [
        ("169.254.169.254", None, {}, {Family.IPV4: Effect.SHARES}),
        ("169.254.169.254", "tap0", {}, {Family.IPV4: Effect.SHARES}),
        ("0.0.0.0", None, {}, {Family.IPV4: Effect.YIELDS}),
        ("::", None, {}, {Family.IPV4: Effect.YIELDS, Family.IPV6: Effect.YIELDS}),
        ("::", None, {"v6_only": True}, {Family.IPV6: Effect.YIELDS}),
        ("fe80::a9fe:a9fe", "tap0", {}, {Family.IPV6: Effect.SHARES}),
        ("fe80::a9fe:a9fe", "tap9", {}, {}),
        ("10.0.0.1", None, {}, {}),
        ("169.254.169.254", None, {"ours": True}, {}),
    ],
)
def test_a_foreign_listener_beside_ours_is_reported_with_its_effect(
    address: str, device: str | None, more: dict[str, Any], expected: dict[Family, Effect]
) -> None:
    other = replace(_socket(address, device), **more)
    plan = plan_listeners(_blue(IN_NS), _ns(sockets=(other,)))
    assert {one.family: one.effect for one in plan.foreign} == expected
    assert len(plan.endpoints) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (IN_NS, IN_NS),
        (IN_NS, ON_TAP),
        (ON_TAP, ON_TAP),
        (NamespaceListener("gone"), NamespaceListener("gone")),
        (IN_NS, NamespaceListener("same-by-another-name")),
        (InterfaceListener("br0"), InterfaceListener("br0")),
        (InterfaceListener("br0"), ON_BRIDGE),
        (ON_BRIDGE, ON_BRIDGE),
    ],
)
@pytest.mark.parametrize("first", ["a", "b"])
def test_of_two_networks_with_one_listener_the_one_in_force_keeps_it(
    one: Listener, other: Listener, first: str
) -> None:
    again = replace(FULL, ref=NamespaceRef("same-by-another-name", REF.inode))
    host = _host(FULL, again, root=_root(BRIDGE).root)
    networks = _networks({"a": one, "b": other})
    in_force = {NetworkId(first): networks[NetworkId(first)]}

    plan = plan_listeners(networks, host, first=in_force)

    assert plan.endpoints == plan_listeners(in_force, host).endpoints
    assert plan.ops == plan_listeners(in_force, host).ops
    (left,) = (left for left in plan.not_served if left.network != first)
    assert left.code is NotServedCode.LISTENER_SHARED
    assert f"network {first} " in left.reason


@pytest.mark.parametrize(
    ("networks", "in_force", "bound"),
    [
        # Of two new ones the first by id has it; one that moves there does not take it.
        ({"b": IN_NS, "a": IN_NS}, {}, {"a"}),
        ({"a": IN_NS, "b": IN_NS}, {"a": NamespaceListener("ns-red"), "b": IN_NS}, {"b"}),
        ({"a": ON_TAP, "b": NamespaceListener("ns-blue", "tap1")}, {}, {"a", "b"}),
    ],
)
def test_a_listener_that_two_networks_claim_belongs_to_one_of_them(
    networks: dict[str, Listener], in_force: dict[str, Listener], bound: set[str]
) -> None:
    plan = plan_listeners(_networks(networks), _host(_TWO), first=_networks(in_force))
    assert {one.network for one in plan.endpoints} == bound


def test_a_router_drops_requests_at_once_and_redirects_them_while_haproxy_listens() -> None:
    drop, redirect = (MakeTable(REF, one, NAMING) for one in RouterTable)
    networks, host = _blue(NamespaceListener("ns-blue", redirected=True)), _ns(addresses=())
    plan = plan_listeners(networks, host)
    assert plan.ops == (drop,)
    host = note_tables(host, plan.ops)
    assert plan_listeners(networks, host).ops == ()
    assert plan_redirects(plan.endpoints, host, NAMING) == ([], [redirect])
    host = note_tables(host, [redirect])
    assert plan_redirects(plan.endpoints, host, NAMING) == ([], [])
    gone = RemoveTable(REF, RouterTable.REDIRECT, NAMING)
    assert plan_redirects((), host, NAMING) == ([gone], [])
    assert note_tables(host, [gone]).namespaces[REF.name].tables == {"imds-drop"}
    # A namespace made again under the name has none of them, and keeps its own.
    other = replace(REF, inode=78)
    assert note_tables(_ns(ref=other), [drop]) == _ns(ref=other)
    made = note_tables(_ns(ref=other), [replace(redirect, namespace=other)])
    assert note_tables(made, [gone]) == made


_TWO_TAPS = _root(TAP, replace(TAP, name="tap1", index=3))


@pytest.mark.parametrize(
    ("host", "failed", "refused"),
    [
        (_TWO_TAPS, _ADDED[1], [False, True, False, False]),
        (_TWO_TAPS, RemoveAddress(None, "x", METADATA_IPV4, 32), [False] * 4),
        (_root(BRIDGE), AttachBridge(BLUE, "br0", 1400, NAMING), [True]),
    ],
)
def test_what_is_pending_because_an_operation_failed_has_the_failure_as_its_reason(
    host: ObservedHost, failed: HostOp, refused: list[bool]
) -> None:
    networks = _blue(ON_BRIDGE)
    if host is _TWO_TAPS:
        networks = _networks({"blue": INTERFACE, "red": InterfaceListener("tap1")})
    plan = plan_listeners(networks, host)
    explained = explain_pending(plan, {failed: Problem("host", "IPv6 is off", "switch it on")})
    found = [(one.code, one.reason, one.hint) for one in explained.not_served]
    wanted = (NotServedCode.HOST_REFUSED, "IPv6 is off", "switch it on")
    assert [one == wanted for one in found] == refused
    assert replace(explained, not_served=plan.not_served) == plan


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True).map(NetworkId))
def test_names_fit_the_kernel_and_are_known_again_and_are_no_other_daemons(
    network: NetworkId,
) -> None:
    assert NAMING.owner_of("") is None
    other = Naming("imdst")
    for naming in (NAMING, Naming("x"), Naming("imdstuv")):
        link, namespace = naming.link(network), naming.namespace(network)
        assert (naming.is_link(link), naming.is_namespace(namespace)) == (True, True)
        assert (naming.is_link(namespace), naming.is_namespace(link)) == (False, False)
        assert not naming.is_link(other.link(network))
        assert not naming.is_namespace(other.namespace(network))
        assert naming.owner_of(naming.alias(network)) == network
        assert naming.owner_of(other.alias(network)) is None
        assert max(len(link), len(naming.inner_device)) <= 15
        assert len(naming.alias(network)) < 256
        assert 128 <= naming.protocol <= 255


@pytest.mark.parametrize("prefix", ["", "Imds", "1mds", "im-ds", "imdstabc", "imds\n"])
def test_a_prefix_that_would_not_fit_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="not a prefix"):
        Naming(prefix)


def _part(*namespaces: ObservedNamespace, asked: set[str]) -> ObservedHost:
    return replace(_host(*namespaces), asked=frozenset(asked))


RED = replace(FULL, ref=NamespaceRef("ns-red", 78))


def test_a_part_replaces_what_it_asked_for_and_leaves_the_rest() -> None:
    before = _host(FULL, RED, root=_root(TAP, addresses=(V4,)).root)
    remade = replace(FULL, ref=NamespaceRef("ns-blue", 79))
    after = merge_observed(before, _part(remade, asked={"ns-blue"}))
    assert after == replace(before, namespaces={"ns-blue": remade, "ns-red": RED})
    assert merge_observed(after, _part(asked={"ns-blue"})) == _host(RED, root=before.root)
    assert merge_observed(after, ObservedHost()) == ObservedHost()


def test_a_look_for_one_network_leaves_what_was_tried_for_others_of_its_namespace() -> None:
    eth0, eth1 = (Family.IPV4, "eth0"), (Family.IPV4, "eth1")
    before = _host(replace(RED, trials={eth0: errno.EADDRINUSE, eth1: 0}))
    part = replace(RED, trials={eth1: errno.EACCES})

    def trials(seen: ObservedNamespace) -> _Trials:
        after = merge_observed(before, _part(seen, asked={"ns-red"}))
        return dict(after.namespaces["ns-red"].trials)

    assert trials(part) == {eth0: errno.EADDRINUSE, eth1: errno.EACCES}
    assert trials(replace(part, ref=NamespaceRef("ns-red", 79))) == {eth1: errno.EACCES}


def test_a_look_at_some_devices_of_the_host_replaces_them_and_the_ports_of_bridges() -> None:
    ports = [ObservedDevice(f"p{n}", n, up=True, mtu=1500, master=BRIDGE.index) for n in (8, 9)]
    before = _root(TAP, BRIDGE, *ports, addresses=(V4,))
    other = (replace(V4, device="p9"),)

    def after(asked: str, *devices: ObservedDevice) -> ObservedNamespace:
        part = replace(_root(*devices, addresses=other), asked=frozenset())
        return merge_observed(before, replace(part, devices=frozenset({asked}))).root

    left = after("br0", BRIDGE, ports[1])
    assert (
        left
        == _root(TAP, replace(ports[0], master=0), BRIDGE, ports[1], addresses=(V4, *other)).root
    )
    assert after("tap0") == _root(BRIDGE, *ports, addresses=other).root
    # It has another name now.
    assert after("eth9", replace(TAP, name="eth9")).devices.keys() == {"br0", "p8", "p9", "eth9"}


def test_a_plan_with_a_memo_is_the_plan_without_it() -> None:
    red = NamespaceListener("ns-red")
    networks = _networks({"a": IN_NS, "b": red, "c": ON_BRIDGE})
    memo: PlanMemo = {}
    host = _host(FULL, RED)
    busy = replace(RED, trials=_BUSY)
    for some, seen in (
        (networks, host),
        (networks, merge_observed(host, _part(busy, asked={"ns-red"}))),
        (networks, merge_observed(host, _part(asked={"ns-blue"}))),
        (networks | _networks({"a": ON_TAP}), host),
        (networks | _networks({"d": IN_NS}), host),
        (_networks({"b": red}), host),
    ):
        assert plan_listeners(some, seen, memo=memo) == plan_listeners(some, seen)
    assert memo.keys() == {"b"}


# What counts as configured and not served

_FOUR, _SIX = (Endpoint(BLUE, family.metadata_address, 80, None, None) for family in Family)
_V6_ONLY = (Subnet(ip_network("2001:db8::/64")),)
_BOTH = (*_V6_ONLY, Subnet(ip_network("10.0.0.0/24")))


@pytest.mark.parametrize(
    ("code", "missing", "served", "subnets", "degraded"),
    [
        *((code, None, (), (), True) for code in NotServedCode),
        (NotServedCode.ADDRESS_MISSING, Family.IPV6, (), (), True),
        # A network that is served over IPv4 needs no IPv6 address, and every other fault counts.
        (NotServedCode.ADDRESS_MISSING, Family.IPV6, (_FOUR,), (), False),
        (NotServedCode.ADDRESS_ON_LOOPBACK, Family.IPV6, (_FOUR,), (), False),
        (NotServedCode.ADDRESS_MISSING, Family.IPV4, (_SIX,), (), True),
        (NotServedCode.PORT_BUSY, Family.IPV4, (_SIX,), (), True),
        (NotServedCode.PORT_BUSY, Family.IPV6, (_FOUR,), (), True),
        (NotServedCode.ADDRESS_DUPLICATE, Family.IPV6, (_FOUR,), (), True),
        # One of IPv6 subnets needs no IPv4 address.
        (NotServedCode.ADDRESS_MISSING, Family.IPV4, (_SIX,), _V6_ONLY, False),
        (NotServedCode.ADDRESS_MISSING, Family.IPV4, (_SIX,), _BOTH, True),
    ],
)
def test_a_network_is_degraded_where_its_guests_need_what_is_left_out(
    code: NotServedCode,
    missing: Family | None,
    served: tuple[Endpoint, ...],
    subnets: tuple[Subnet, ...],
    *,
    degraded: bool,
) -> None:
    left = NotServed(BLUE, missing, code, "why")
    networks = {BLUE: Network(BLUE, IN_NS, subnets=subnets)}
    assert find_degraded(networks, (), served, (left,), ()) == (left,) * degraded


@pytest.mark.parametrize(
    ("effect", "degraded"), [(Effect.SHARES, True), (Effect.YIELDS, False), (Effect.BLOCKS, False)]
)
def test_a_program_that_shares_the_port_is_named_and_one_that_yields_is_not(
    effect: Effect, *, degraded: bool
) -> None:
    foreign = Foreign(BLUE, Family.IPV4, effect, _socket("169.254.169.254"))
    found = find_degraded(_blue(IN_NS), (), (_FOUR, _SIX), (), (foreign,))
    assert [one.code for one in found] == [NotServedCode.FOREIGN_LISTENER] * degraded
    assert all("nginx (pid 41)" in one.reason for one in found)


def test_networks_that_no_round_has_seen_and_contradictory_ones_are_degraded_in_order() -> None:
    found = find_degraded(_blue(IN_NS), (NetworkId("another"),), (), (), ())
    assert [(one.network, one.code) for one in found] == [
        (NetworkId("another"), NotServedCode.NETWORK_CONFLICT),
        (BLUE, NotServedCode.PENDING),
    ]


# The table for bridges

_MAC = "02:00:00:00:00:01"
_GUEST = replace(TAP, kind="tun", master=BRIDGE.index)


def _diversions(
    *ports: ObservedDevice, mac: str = _MAC, listener: Listener = ON_BRIDGE
) -> Diversions:
    seen = _bridged(INNER, mac=mac)
    devices = {**seen.root.devices, **{one.name: one for one in ports}}
    root = replace(seen.root, devices=devices)
    return plan_diversions(_blue(listener), replace(seen, root=root), NAMING)


def test_frames_of_every_port_of_a_bridge_but_our_own_go_to_our_veth() -> None:
    elsewhere = replace(_GUEST, name="tap9", master=8)
    found = _diversions(replace(_GUEST, name="eno1", kind=""), _GUEST, elsewhere)
    # Only guests are forbidden to answer as the metadata service.
    macs = {"eno1": _MAC, "tap0": _MAC}
    assert found == Diversions(macs, {}, frozenset({"tap0"}), frozenset({OUR_LINK}))
    assert found.content() == replace(found).content() != ()


@pytest.mark.parametrize("other", [False, True])
def test_an_address_of_ours_is_left_to_another_process_that_listens_at_it(*, other: bool) -> None:
    socket = ListeningSocket(METADATA_IPV4, 80, None, 9, ours=not other)
    seen = ObservedNamespace(REF, {"lo": LO, "tap0": TAP}, (V4,), sockets=(socket,))
    host = ObservedHost(namespaces={"ns-blue": seen})
    managed = frozenset({("ns-blue", "tap0")})
    theirs = find_left_to_others([], host, NAMING, managed)
    assert theirs == (managed if other else frozenset())
    network = Network(BLUE, NamespaceListener("ns-blue", "tap0", manage_addresses=True))
    assert find_left_to_others([network], host, NAMING, managed) == frozenset()


def test_without_a_namespace_a_mac_and_a_port_the_table_is_only_removed() -> None:
    assert plan_diversions(_blue(ON_BRIDGE), ObservedHost(), NAMING).content() == ()
    assert _diversions().content() == ()
    assert _diversions(_GUEST, mac="").content() == ()
    # A name that was not UTF-8.
    assert _diversions(replace(_GUEST, name="\ufffd" * 6)).content() == ()
    # What is no bridge has no ports.
    assert _diversions(_GUEST, listener=InterfaceListener("tap0")).content() == ()


def test_frames_of_every_port_of_an_interface_listeners_bridge_go_to_the_bridge() -> None:
    bridge = replace(BRIDGE, mac=_MAC)
    seen = _root(bridge, replace(_GUEST, master=bridge.index))
    found = plan_diversions(_blue(InterfaceListener("br0")), seen, NAMING)
    assert found == Diversions({}, {"tap0": _MAC}, frozenset({"tap0"}))
