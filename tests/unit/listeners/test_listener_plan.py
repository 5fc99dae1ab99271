from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.core.endpoints import Endpoint, LeftOutCode
from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hoststate import (
    AddressState,
    BindTrial,
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
from imdsproxy.core.model import (
    METADATA_IPV4,
    METADATA_IPV6,
    BridgeListener,
    InterfaceListener,
    Listener,
    NamespaceListener,
    Network,
    NetworkId,
)
from imdsproxy.listeners.plan import (
    AddAddress,
    AttachBridge,
    DeleteLink,
    DeleteNamespace,
    ListenerPlan,
    OpFailure,
    PlanMemo,
    RemoveAddress,
    explain_pending,
    plan_listeners,
    without_removed,
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


def _networks(listeners: Mapping[str, Listener]) -> dict[NetworkId, Network]:
    return {NetworkId(name): Network(NetworkId(name), one) for name, one in listeners.items()}


def _host(*namespaces: ObservedNamespace, root: ObservedNamespace | None = None) -> ObservedHost:
    named = {one.ref.name: one for one in namespaces if one.ref is not None}
    return ObservedHost(root or ObservedNamespace(None), named)


def _plan(listener: Listener, *seen: ObservedNamespace) -> ListenerPlan:
    return plan_listeners(_networks({"blue": listener}), _host(*seen))


def _root(*devices: ObservedDevice, addresses: tuple[ObservedAddress, ...] = ()) -> ObservedHost:
    seen = ObservedNamespace(None, {one.name: one for one in devices}, addresses)
    return _host(root=seen)


def _codes(plan: ListenerPlan) -> list[tuple[Family | None, LeftOutCode]]:
    return [(one.family, one.code) for one in plan.left_out]


def test_both_addresses_of_a_namespace_are_bound_ipv6_to_its_device() -> None:
    plan = _plan(NamespaceListener("ns-blue"), FULL)
    assert plan == ListenerPlan(
        (
            Endpoint(BLUE, METADATA_IPV4, 80, None, REF),
            Endpoint(BLUE, METADATA_IPV6, 80, "tap0", REF, device_index=2),
        )
    )


_BLUE_NS = NamespaceListener("ns-blue")
_ON_TAP = NamespaceListener("ns-blue", "tap0")
_INTERFACE = InterfaceListener("tap0")
_TWO = replace(
    FULL,
    devices={**FULL.devices, "tap1": ObservedDevice("tap1", 3, up=True, mtu=1500)},
    addresses=(V4, V6, ObservedAddress("tap1", METADATA_IPV6, 64)),
)


def _ns(base: ObservedNamespace = FULL, **changes: object) -> ObservedHost:
    return _host(replace(base, **changes))  # type: ignore[arg-type]  # one field at a time


def _ipv6(device: str = "tap0", state: AddressState = AddressState.USABLE) -> ObservedHost:
    return _ns(addresses=(V4, replace(V6, device=device, state=state)))


def _enslaved(kind: str) -> ObservedHost:
    master = ObservedDevice("m0", 9, up=True, mtu=1500, kind=kind)
    return _root(replace(TAP, master=9), master, addresses=(V4, V6))


_DOWN = replace(TAP, up=False)
_BUSY = BindTrial(Family.IPV4, None, errno.EADDRINUSE)
_REFUSED = BindTrial(Family.IPV4, None, errno.EADDRNOTAVAIL)
_BUSY_TAP = BindTrial(Family.IPV6, "tap0", errno.EADDRINUSE)
_TENTATIVE, _DUPLICATE = AddressState.TENTATIVE, AddressState.DUPLICATE
_UNSEEN = "port-busy: 169.254.169.254 port 80 is in use by a program that cannot be seen from here"
_NOT_AVAILABLE = "bind-refused: the kernel refuses to bind 169.254.169.254: EADDRNOTAVAIL"
_BRIDGE_DOWN = replace(BRIDGE, up=False)
_ON_BRIDGE, _ON_TAP_BRIDGE = BridgeListener("br0"), BridgeListener("tap0")


@pytest.mark.parametrize(
    ("listener", "host", "bound", "family", "left_out"),
    [
        (_ON_TAP, _ns(), ["tap0", "tap0"], None, ""),
        (_ON_TAP, _ns(addresses=(replace(V4, device="lo"), V6)), ["tap0", "tap0"], None, ""),
        (_BLUE_NS, _host(_TWO), [None, "tap0", "tap1"], None, ""),
        # One device that is blocked does not leave the family out.
        (_BLUE_NS, _ns(_TWO, trials=(_BUSY_TAP,)), [None, "tap1"], None, ""),
        (_BLUE_NS, _host(), [], None, "namespace-missing: there is no network namespace ns-blue"),
        (_BLUE_NS, _ns(problem="cannot enter"), [], None, "namespace-unusable: cannot enter"),
        (_ON_TAP, _ns(devices={"lo": LO}), [], None, "device-missing: there is no device tap0 in"),
        (_ON_TAP, _ns(devices={"tap0": _DOWN}), [], None, "device-down: device tap0 in namespace"),
        # Addresses that we do not manage are reported, and never added.
        (_BLUE_NS, _ns(addresses=(V4,)), [None], 6, "address-missing: fe80::a9fe:a9fe is not on"),
        (_ON_TAP, _ns(addresses=(V6,)), ["tap0"], 4, "address-missing: 169.254.169.254 is not on"),
        (_BLUE_NS, _ipv6("lo"), [None], 6, "address-on-loopback: "),
        (_BLUE_NS, _ipv6(state=_TENTATIVE), [None], 6, "address-tentative: "),
        (_BLUE_NS, _ipv6(state=_DUPLICATE), [None], 6, "address-duplicate: "),
        (_BLUE_NS, _ns(trials=(_BUSY,)), ["tap0"], 4, _UNSEEN),
        (_BLUE_NS, _ns(trials=(_REFUSED,)), ["tap0"], 4, _NOT_AVAILABLE),
        (
            _INTERFACE,
            _enslaved("bridge"),
            [],
            None,
            "device-enslaved: device tap0 belongs to bridge",
        ),
        (
            _INTERFACE,
            _enslaved("bond"),
            [],
            None,
            "device-enslaved: device tap0 belongs to bond m0",
        ),
        (
            _INTERFACE,
            _enslaved("team"),
            [],
            None,
            "device-enslaved: device tap0 belongs to team m0",
        ),
        (_INTERFACE, _enslaved("openvswitch"), [], None, "device-enslaved: device tap0 belongs"),
        (_INTERFACE, _enslaved("vrf"), ["tap0", "tap0"], None, ""),
        (_INTERFACE, _root(), [], None, "device-missing: there is no device tap0"),
        (_INTERFACE, _root(_DOWN), [], None, "device-down: device tap0 is down"),
        (_ON_BRIDGE, _root(), [], None, "device-missing: there is no bridge br0"),
        (_ON_TAP_BRIDGE, _root(TAP), [], None, "not-a-bridge: tap0 is a plain device, not a Linux"),
        (_ON_BRIDGE, _root(_BRIDGE_DOWN), [], None, "device-down: bridge br0 is down"),
    ],
)
def test_what_can_be_bound_is_and_what_cannot_is_left_out_with_the_reason(
    listener: Listener,
    host: ObservedHost,
    bound: list[str | None],
    family: int | None,
    left_out: str,
) -> None:
    plan = plan_listeners(_networks({"blue": listener}), host)
    assert [one.device for one in plan.endpoints] == bound
    assert [one.family for one in plan.left_out] == ([family] if left_out else [])
    assert all(f"{one.code}: {one.reason}".startswith(left_out) for one in plan.left_out)
    assert plan.ops == ()


@pytest.mark.parametrize("kind", ["", "bridge", "tun", "marked", "namespace"])
def test_what_has_our_name_and_is_not_ours_is_left_alone_and_reported(kind: str) -> None:
    host = _root(BRIDGE, ObservedDevice(OUR_LINK, 6, up=True, mtu=1400, kind=kind))
    if kind == "marked":
        link = ObservedDevice(OUR_LINK, 6, up=True, mtu=1400, alias="another's", kind="veth")
        host = _root(BRIDGE, link)
    elif kind == "namespace":
        inside = ObservedNamespace(NamespaceRef(OUR_NS, 9), {"lo": replace(LO, alias="another's")})
        host = _host(inside, root=_root(BRIDGE).root)
    assert plan_listeners({}, host).ops == ()
    plan = plan_listeners(NETWORKS, host)
    assert _codes(plan) == [(None, LeftOutCode.NAME_TAKEN)]
    assert plan.ops == ()


def test_a_device_made_again_under_its_name_is_another_endpoint() -> None:
    again = replace(FULL, devices={"lo": LO, "tap0": replace(TAP, index=9)})
    for listener in (NamespaceListener("ns-blue"), NamespaceListener("ns-blue", "tap0")):
        before, after = _plan(listener, FULL).endpoints, _plan(listener, again).endpoints
        assert before[1] != after[1]
        assert replace(before[1], device_index=9) == after[1]


def test_managed_addresses_are_added_and_pending_meanwhile() -> None:
    bare = replace(FULL, addresses=())
    plan = _plan(NamespaceListener("ns-blue", "tap0", manage_addresses=True), bare)
    assert plan.ops == (
        AddAddress(BLUE, "ns-blue", "tap0", METADATA_IPV4, NAMING.protocol),
        AddAddress(BLUE, "ns-blue", "tap0", METADATA_IPV6, NAMING.protocol),
    )
    assert _codes(plan) == [
        (Family.IPV4, LeftOutCode.PENDING),
        (Family.IPV6, LeftOutCode.PENDING),
    ]
    assert _plan(NamespaceListener("ns-blue", "tap0", manage_addresses=True), FULL).ops == ()


MARKED = tuple(replace(one, protocol=NAMING.protocol) for one in (V4, V6))


def test_our_addresses_go_with_their_network_and_not_before() -> None:
    host = _host(replace(FULL, addresses=MARKED))
    listener = NamespaceListener("ns-blue", "tap0", manage_addresses=True)
    assert plan_listeners(_networks({"blue": listener}), host).ops == ()
    assert plan_listeners({}, host).ops == (
        RemoveAddress("ns-blue", "tap0", METADATA_IPV4, 32),
        RemoveAddress("ns-blue", "tap0", METADATA_IPV6, 64),
    )
    assert plan_listeners({}, host, sweep=False).ops == ()
    elsewhere = frozenset({("other", "eth0")})
    assert plan_listeners({}, host, managed=elsewhere).ops == ()
    assert plan_listeners({}, _host(FULL)).ops == ()


def test_our_addresses_go_when_their_management_is_switched_off_or_the_device_changes() -> None:
    host = _host(replace(FULL, addresses=MARKED))
    for listener in (
        NamespaceListener("ns-blue", "tap0"),
        NamespaceListener("ns-blue", "lo", manage_addresses=True),
        InterfaceListener("tap0"),
    ):
        ops = plan_listeners(_networks({"blue": listener}), host).ops
        assert sum(isinstance(one, RemoveAddress) for one in ops) == 2


def test_another_daemons_addresses_are_not_ours() -> None:
    other = Naming("other")
    assert other.protocol != NAMING.protocol
    assert plan_listeners({}, _host(replace(FULL, addresses=MARKED)), other).ops == ()


def test_an_interface_gets_addresses_and_is_bound_to() -> None:
    networks = _networks({"blue": InterfaceListener("tap0")})
    plan = plan_listeners(networks, _root(TAP))
    assert [one.namespace for one in plan.ops if isinstance(one, AddAddress)] == [None, None]
    plan = plan_listeners(networks, _root(TAP, addresses=MARKED))
    assert [(one.device, one.namespace) for one in plan.endpoints] == [("tap0", None)] * 2
    assert not plan.ops
    assert not plan.left_out


def _socket(address: str, device: str | None = None, *, ours: bool = False) -> ListeningSocket:
    owner = SocketOwner(41, "nginx")
    return ListeningSocket(ip_address(address), 80, device, 5, owners=(owner,), ours=ours)


def test_a_port_in_use_leaves_the_family_out_and_names_the_process() -> None:
    seen = replace(
        FULL,
        sockets=(_socket("0.0.0.0"),),
        trials=(BindTrial(Family.IPV4, None, errno.EADDRINUSE), BindTrial(Family.IPV6, "tap0", 0)),
    )
    plan = _plan(NamespaceListener("ns-blue"), seen)
    assert _codes(plan) == [(Family.IPV4, LeftOutCode.PORT_BUSY)]
    assert "nginx (pid 41)" in plan.left_out[0].reason
    assert plan.left_out[0].sockets == seen.sockets
    assert [one.effect for one in plan.foreign] == [Effect.BLOCKS]
    assert [one.address for one in plan.endpoints] == [METADATA_IPV6]


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
def test_a_foreign_listener_beside_ours_is_told_with_what_it_does(
    address: str, device: str | None, more: dict[str, Any], expected: dict[Family, Effect]
) -> None:
    other = replace(_socket(address, device), **more)
    plan = _plan(NamespaceListener("ns-blue"), replace(FULL, sockets=(other,)))
    assert {one.family: one.effect for one in plan.foreign} == expected
    assert len(plan.endpoints) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (NamespaceListener("ns-blue"), NamespaceListener("ns-blue")),
        (NamespaceListener("ns-blue"), NamespaceListener("ns-blue", "tap0")),
        (NamespaceListener("ns-blue", "tap0"), NamespaceListener("ns-blue", "tap0")),
        (NamespaceListener("gone"), NamespaceListener("gone")),
        (NamespaceListener("ns-blue"), NamespaceListener("same-by-another-name")),
        (InterfaceListener("br0"), InterfaceListener("br0")),
        (InterfaceListener("br0"), BridgeListener("br0")),
        (BridgeListener("br0"), BridgeListener("br0")),
    ],
)
@pytest.mark.parametrize("first", ["a", "b"])
def test_of_two_networks_with_one_listener_the_one_in_force_keeps_it(
    one: Listener, other: Listener, first: str
) -> None:
    bridge = ObservedDevice("br0", 5, up=True, mtu=1500, kind="bridge")
    again = replace(FULL, ref=NamespaceRef("same-by-another-name", REF.inode))
    host = _host(FULL, again, root=ObservedNamespace(None, {"br0": bridge}))
    networks = _networks({"a": one, "b": other})
    in_force = {NetworkId(first): networks[NetworkId(first)]}
    second = "b" if first == "a" else "a"

    plan = plan_listeners(networks, host, first=in_force)

    assert plan.endpoints == plan_listeners(in_force, host).endpoints
    assert plan.ops == plan_listeners(in_force, host).ops
    (left,) = (left for left in plan.left_out if left.network == second)
    assert left.code is LeftOutCode.LISTENER_SHARED
    assert f"network {first} " in left.reason


def test_of_two_new_networks_with_one_listener_the_first_by_id_has_it() -> None:
    networks = _networks({"b": NamespaceListener("ns-blue"), "a": NamespaceListener("ns-blue")})
    plan = plan_listeners(networks, _host(FULL))
    assert {one.network for one in plan.endpoints} == {"a"}
    assert {left.network for left in plan.left_out} == {"b"}


def test_a_network_that_moves_to_another_ones_listener_does_not_take_it() -> None:
    networks = _networks({"a": NamespaceListener("ns-blue"), "b": NamespaceListener("ns-blue")})
    in_force = _networks({"a": NamespaceListener("ns-red"), "b": NamespaceListener("ns-blue")})
    plan = plan_listeners(networks, _host(FULL), first=in_force)
    assert {one.network for one in plan.endpoints} == {"b"}


def test_two_devices_of_one_namespace_are_two_listeners() -> None:
    other = ObservedDevice("tap1", 3, up=True, mtu=1500)
    seen = replace(FULL, devices={**FULL.devices, "tap1": other})
    networks = _networks(
        {"a": NamespaceListener("ns-blue", "tap0"), "b": NamespaceListener("ns-blue", "tap1")}
    )
    plan = plan_listeners(networks, _host(seen))
    assert [(one.network, one.device) for one in plan.endpoints] == [
        ("a", "tap0"),
        ("a", "tap0"),
        ("b", "tap1"),
    ]


def _bridged(**changes: object) -> ObservedHost:
    """Everything as it should be for a bridge listener, but for `changes` of the inside."""
    link = ObservedDevice(OUR_LINK, 6, True, 1400, ALIAS, master=5, kind="veth")
    inner = ObservedDevice(INNER, 2, True, 1400, ALIAS, kind="veth")
    inside = ObservedNamespace(
        NamespaceRef(OUR_NS, 99),
        {"lo": replace(LO, alias=ALIAS), INNER: inner},
        tuple(replace(one, device=INNER, protocol=NAMING.protocol) for one in (V4, V6)),
        frozenset((family, INNER) for family in Family),
    )
    root = ObservedNamespace(None, {"br0": BRIDGE, OUR_LINK: link})
    return _host(replace(inside, **changes), root=root)  # type: ignore[arg-type]  # one field at a time


NETWORKS = _networks({"blue": BridgeListener("br0")})


ATTACH = AttachBridge(BLUE, "br0", 1400, NAMING)


def test_a_bridge_without_a_namespace_is_pending_until_it_is_attached() -> None:
    plan = plan_listeners(NETWORKS, _root(BRIDGE))
    assert plan.ops == (ATTACH,)
    assert _codes(plan) == [(None, LeftOutCode.PENDING)]


def _device(which: str, **changes: object) -> ObservedHost:
    host = _bridged()
    root, inside = host.root, host.namespaces[OUR_NS]
    seen = root if which == OUR_LINK else inside
    changed = replace(seen.devices[which], **changes)  # type: ignore[arg-type]  # one field at a time
    devices = {**seen.devices, changed.name: changed}
    if seen is inside:
        return _bridged(devices=devices)
    if changed.name != which:
        del devices[which]
    return replace(host, root=replace(root, devices=devices))


@pytest.mark.parametrize(
    "host",
    [
        _device("lo", up=False),
        *(_device(name, up=False) for name in (OUR_LINK, INNER)),
        *(_device(name, mtu=1500) for name in (OUR_LINK, INNER)),
        _device(OUR_LINK, alias=""),
        _device(OUR_LINK, master=0),
        _device(OUR_LINK, name="other"),
        _bridged(addresses=(replace(V4, device=INNER),)),
        _bridged(default_routes=frozenset({(Family.IPV4, INNER), (Family.IPV6, "lo")})),
        _bridged(devices={"lo": replace(LO, alias=ALIAS)}),
        _host(ObservedNamespace(NamespaceRef(OUR_NS, 9), {"lo": LO}), root=_root(BRIDGE).root),
        replace(_root(BRIDGE), namespaces={OUR_NS: ObservedNamespace(None)}),
    ],
)
def test_a_bridge_that_lacks_something_is_attached_again(host: ObservedHost) -> None:
    assert plan_listeners(NETWORKS, host).ops == (ATTACH,)


def test_a_bridge_that_has_everything_is_served_and_left_alone() -> None:
    plan = plan_listeners(NETWORKS, _bridged())
    assert [(one.device, one.namespace) for one in plan.endpoints] == [
        (INNER, NamespaceRef(OUR_NS, 99))
    ] * 2
    assert not plan.ops
    assert not plan.left_out


def test_everything_of_a_bridge_goes_with_its_network() -> None:
    assert plan_listeners({}, _bridged()).ops == (DeleteNamespace(OUR_NS), DeleteLink(OUR_LINK))
    assert plan_listeners({}, _bridged(), sweep=False).ops == ()
    assert plan_listeners({}, _bridged(), Naming("other")).ops == ()


def test_what_was_half_made_goes_unless_it_is_wanted() -> None:
    half_made = {OUR_NS: ObservedNamespace(None), "another-s": ObservedNamespace(None)}
    host = replace(_root(BRIDGE), namespaces=half_made)
    assert plan_listeners({}, host).ops == (DeleteNamespace(OUR_NS),)


def test_an_unmarked_veth_of_ours_is_swept() -> None:
    assert DeleteLink(OUR_LINK) in plan_listeners({}, _device(OUR_LINK, alias="")).ops


def test_what_is_pending_because_of_a_failure_is_told_by_the_failure() -> None:
    listeners = {"blue": InterfaceListener("tap0"), "red": InterfaceListener("tap1")}
    other = replace(TAP, name="tap1", index=3)
    plan = plan_listeners(_networks(listeners), _root(TAP, other))
    (failed,) = (
        one
        for one in plan.ops
        if isinstance(one, AddAddress) and (one.network, one.address) == (BLUE, METADATA_IPV6)
    )

    told = explain_pending(plan, [OpFailure(failed, "IPv6 is off", "switch it on")])

    assert [(one.network, one.family, one.code) for one in told.left_out] == [
        ("blue", Family.IPV4, LeftOutCode.PENDING),
        ("blue", Family.IPV6, LeftOutCode.HOST_REFUSED),
        ("red", Family.IPV4, LeftOutCode.PENDING),
        ("red", Family.IPV6, LeftOutCode.PENDING),
    ]
    assert (told.left_out[1].reason, told.left_out[1].hint) == ("IPv6 is off", "switch it on")
    assert replace(told, left_out=plan.left_out) == plan


def test_a_namespace_that_cannot_be_made_is_told_of_for_both_families() -> None:
    plan = plan_listeners(NETWORKS, _root(BRIDGE))
    failures = [OpFailure(RemoveAddress(None, "x", METADATA_IPV4, 32), "not this")]
    assert explain_pending(plan, failures) == plan
    failures.append(OpFailure(plan.ops[0], "no space left"))
    (left,) = explain_pending(plan, failures).left_out
    assert (left.family, left.code) == (None, LeftOutCode.HOST_REFUSED)
    assert left.reason == "no space left"


@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c", "d"]),
        st.one_of(
            st.builds(
                NamespaceListener,
                st.sampled_from(["ns-blue", "gone"]),
                st.sampled_from([None, "tap0", "lo", "tap9"]),
                st.booleans(),
            ),
            st.builds(InterfaceListener, st.sampled_from(["tap0", "br0", "gone"])),
            st.builds(BridgeListener, st.sampled_from(["br0", "tap0", "gone"])),
        ),
    ),
    st.lists(
        st.builds(
            ObservedAddress,
            st.sampled_from(["lo", "tap0"]),
            st.sampled_from([METADATA_IPV4, METADATA_IPV6]),
            st.just(64),
            st.sampled_from(AddressState),
            st.sampled_from([0, NAMING.protocol]),
        )
    ),
    st.lists(
        st.builds(
            BindTrial,
            st.sampled_from(Family),
            st.sampled_from([None, "tap0"]),
            st.sampled_from([0, errno.EADDRINUSE, errno.EINVAL]),
        )
    ),
)
def test_every_network_and_family_is_either_bound_or_left_out_for_one_reason(
    listeners: dict[str, Listener],
    addresses: list[ObservedAddress],
    trials: list[BindTrial],
) -> None:
    seen = replace(FULL, addresses=tuple(addresses), trials=tuple(trials))
    root = ObservedNamespace(None, {"tap0": TAP, "br0": BRIDGE}, tuple(addresses), trials=())
    networks = _networks(listeners)
    plan = plan_listeners(networks, _host(seen, root=root))
    for network in networks:
        for family in Family:
            bound = [
                one
                for one in plan.endpoints
                if one.network == network and one.address == family.metadata_address
            ]
            left = [
                one
                for one in plan.left_out
                if one.network == network and one.family in (None, family)
            ]
            assert bool(bound) != bool(left)
            assert len(left) <= 1
    # No two networks are ever bound to the same place.
    places = [(one.address, one.device, one.namespace) for one in plan.endpoints]
    assert len(places) == len(set(places))


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True))
def test_names_fit_the_kernel_and_are_known_again(network: str) -> None:
    for naming in (Naming(), Naming("x"), Naming("imdstab")):
        link, namespace = naming.link(NetworkId(network)), naming.namespace(NetworkId(network))
        assert len(link) <= 15
        assert naming.is_link(link)
        assert naming.is_namespace(namespace)
        assert not naming.is_link(namespace)
        assert not naming.is_namespace(link)
        assert naming.owner_of(naming.alias(NetworkId(network))) == network
        assert len(naming.alias(NetworkId(network))) < 256
        assert 128 <= naming.protocol <= 255
        assert len(naming.inner_device) <= 15


def test_one_daemons_names_are_not_anothers() -> None:
    mine, other = Naming("imds"), Naming("imdst")
    assert not mine.is_namespace(other.namespace(BLUE))
    assert not mine.is_link(other.link(BLUE))
    assert mine.owner_of(other.alias(BLUE)) is None
    assert mine.owner_of("") is None


def _part(*namespaces: ObservedNamespace, asked: set[str]) -> ObservedHost:
    return replace(_host(*namespaces), asked=frozenset(asked))


def test_a_part_replaces_what_it_asked_for_and_leaves_the_rest() -> None:
    red = replace(FULL, ref=NamespaceRef("ns-red", 78))
    before = _host(FULL, red, root=_root(TAP, addresses=(V4,)).root)
    remade = replace(FULL, ref=NamespaceRef("ns-blue", 79))
    after = merge_observed(before, _part(remade, asked={"ns-blue"}))
    assert after.namespaces == {"ns-blue": remade, "ns-red": red}
    assert after.root == before.root

    part = replace(_part(asked={"ns-blue"}), root=_root(LO).root)
    after = merge_observed(after, part)
    assert after.namespaces == {"ns-red": red}
    assert after.root == part.root

    assert merge_observed(after, ObservedHost()) == ObservedHost()


@pytest.mark.parametrize(
    "host",
    [
        _bridged(),
        _host(replace(FULL, addresses=MARKED)),
        _root(TAP, addresses=MARKED),
        replace(_root(BRIDGE), namespaces={OUR_NS: ObservedNamespace(None)}),
    ],
)
def test_what_has_been_removed_is_not_removed_again(host: ObservedHost) -> None:
    ops = plan_listeners({}, host).ops
    assert ops
    after = without_removed(host, ops)
    assert plan_listeners({}, after).ops == ()
    assert without_removed(after, ops) == after


def test_what_is_not_removed_stays_as_it_was_known() -> None:
    red = replace(FULL, ref=NamespaceRef("ns-red", 78), addresses=MARKED)
    host = _host(FULL, red)
    after = without_removed(host, [RemoveAddress("ns-red", "tap0", METADATA_IPV4, 32)])
    assert after.namespaces["ns-blue"] is FULL
    assert [one.address for one in after.namespaces["ns-red"].addresses] == [METADATA_IPV6]
    assert without_removed(host, [AddAddress(BLUE, None, "x", METADATA_IPV4, 1)]) == host


def test_a_plan_with_a_memo_is_the_plan_without_it() -> None:
    networks = _networks(
        {
            "a": NamespaceListener("ns-blue"),
            "b": NamespaceListener("ns-red"),
            "c": BridgeListener("br0"),
        }
    )
    red = replace(FULL, ref=NamespaceRef("ns-red", 78))
    memo: PlanMemo = {}
    host = _host(FULL, red)
    assert plan_listeners(networks, host, memo=memo) == plan_listeners(networks, host)
    busy = replace(red, trials=(BindTrial(Family.IPV4, None, errno.EADDRINUSE),))
    steps = [
        (networks, merge_observed(host, _part(busy, asked={"ns-red"}))),
        (networks, merge_observed(host, _part(asked={"ns-blue"}))),
        (networks | _networks({"a": NamespaceListener("ns-blue", "tap0")}), host),
        (networks | _networks({"d": NamespaceListener("ns-blue")}), host),
        (_networks({"b": NamespaceListener("ns-red")}), host),
    ]
    for some, seen in steps:
        assert plan_listeners(some, seen, memo=memo) == plan_listeners(some, seen)
    assert memo.keys() == {"b"}


def test_only_what_no_event_tells_of_is_looked_at_again_and_again() -> None:
    silent = {code.value for code in LeftOutCode if code.silent}
    assert "port-busy" in silent
    assert not silent & {"address-missing", "namespace-missing", "device-missing", "pending"}


@pytest.mark.parametrize("prefix", ["", "Imds", "1mds", "im-ds", "imdstabc", "imds\n"])
def test_a_prefix_that_would_not_fit_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="not a prefix"):
        Naming(prefix)
