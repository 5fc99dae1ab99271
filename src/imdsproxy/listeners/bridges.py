"""A bridge's listener: the namespace, veth pair, addresses and routes that we make for it.

    bridge ── imds<hash> ══veth══ imds0 in namespace imds-<hash>: 169.254.169.254, fe80::a9fe:a9fe

Replies must reach guests of any subnet though we have no address in it, so the namespace has a
default route of scope link: every guest is asked for by ARP or ND. Checksum offload stays on: a
Linux bridge hands packets on with their checksum state, and every guest NIC knows it.
"""

from __future__ import annotations

from collections.abc import Iterator

from imdsproxy.core.endpoints import LOOPBACK, LeftOutCode
from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hoststate import Family, ObservedDevice, ObservedHost, ObservedNamespace
from imdsproxy.core.model import BridgeListener, NetworkId
from imdsproxy.listeners.endpoints import ListenerPlan, leave_out, listen
from imdsproxy.listeners.ops import (
    AddAddress,
    AddDefaultRoute,
    CreateNamespace,
    CreateVeth,
    DeleteLink,
    HostOp,
    SetLink,
)

PREFIXES = {Family.IPV4: 32, Family.IPV6: 64}
"""The prefix lengths with which metadata addresses are added."""


def plan_bridge(
    network: NetworkId, listener: BridgeListener, observed: ObservedHost, naming: Naming
) -> ListenerPlan:
    """Endpoints, or what is to be done first."""
    bridge = observed.root.devices.get(listener.bridge)
    refused = _check_bridge(network, listener.bridge, bridge)
    if refused is not None or bridge is None:
        return refused or ListenerPlan()
    name = naming.namespace(network)
    seen = observed.namespaces.get(name)
    taken = _taken(network, seen, observed.root.devices.get(naming.link(network)), naming)
    if taken is not None:
        return taken
    ops = tuple(_build(network, bridge, seen, observed, naming))
    part = ListenerPlan(ops=ops)
    if seen is None or naming.inner_device not in seen.devices:
        reason = f"namespace {name} is being made"
        return part + leave_out(network, LeftOutCode.PENDING, reason)
    for family in Family:
        part += listen(network, seen, family, device=naming.inner_device, managed=True)
    return part


def _check_bridge(
    network: NetworkId, name: str, bridge: ObservedDevice | None
) -> ListenerPlan | None:
    if bridge is None:
        return leave_out(
            network,
            LeftOutCode.DEVICE_MISSING,
            f"there is no bridge {name}",
            "create it; it is noticed within a second",
        )
    if bridge.kind != "bridge":
        what = f"a device of kind {bridge.kind}" if bridge.kind else "a plain device"
        return leave_out(
            network,
            LeftOutCode.NOT_A_BRIDGE,
            f"{name} is {what}, not a Linux bridge",
            "use an interface listener, or a namespace for an Open vSwitch bridge",
        )
    if not bridge.up:
        return leave_out(
            network, LeftOutCode.DEVICE_DOWN, f"bridge {name} is down", f"ip link set {name} up"
        )
    return None


def _taken(
    network: NetworkId, seen: ObservedNamespace | None, link: ObservedDevice | None, naming: Naming
) -> ListenerPlan | None:
    alias = naming.alias(network)
    if link is not None and link.alias != alias and not is_unmarked_veth(link):
        reason = f"a link {link.name} that is not ours is there"
        return leave_out(network, LeftOutCode.NAME_TAKEN, reason, f"ip link del {link.name}")
    if seen is None:
        return None
    name = naming.namespace(network)
    if seen.problem:
        return leave_out(network, LeftOutCode.NAMESPACE_UNUSABLE, seen.problem)
    marked = alias_of(seen)
    if marked not in ("", alias) or (not marked and len(seen.devices) > 1):
        reason = f"a namespace {name} that is not ours is there"
        return leave_out(network, LeftOutCode.NAME_TAKEN, reason, f"ip netns del {name}")
    return None


def is_unmarked_veth(link: ObservedDevice) -> bool:
    """Whether a link in our form of name is ours though it has no mark: its maker was killed."""
    return link.kind == "veth" and not link.alias


def alias_of(seen: ObservedNamespace) -> str:
    """The mark of a namespace's maker, on its loopback device; empty without one."""
    loopback = seen.devices.get(LOOPBACK)
    return loopback.alias if loopback is not None else ""


def _build(
    network: NetworkId,
    bridge: ObservedDevice,
    seen: ObservedNamespace | None,
    observed: ObservedHost,
    naming: Naming,
) -> Iterator[HostOp]:
    name, inner = naming.namespace(network), naming.inner_device
    alias, name_of_link = naming.alias(network), naming.link(network)
    link = observed.root.devices.get(name_of_link)
    loopback = seen.devices.get(LOOPBACK) if seen is not None else None
    if loopback is None or not loopback.up or not loopback.alias:
        yield CreateNamespace(network, name, alias)
    inside = seen.devices.get(inner) if seen is not None else None
    if link is None or inside is None or not link.alias:
        if link is not None and inside is None:
            yield DeleteLink(link.name)
        yield CreateVeth(network, name_of_link, bridge.name, name, inner, bridge.mtu, alias)
    else:
        yield from _mend_link(network, bridge, link, inside, name)
    yield from want_addresses(network, name, seen, inner, naming)
    routes = seen.default_routes if seen is not None else frozenset()
    for family in Family:
        if (family, inner) not in routes:
            yield AddDefaultRoute(network, name, inner, family)


def _mend_link(
    network: NetworkId,
    bridge: ObservedDevice,
    link: ObservedDevice,
    inside: ObservedDevice,
    namespace: str,
) -> Iterator[HostOp]:
    wanted = bridge.name if link.master != bridge.index else None
    for place, device, master in ((None, link, wanted), (namespace, inside, None)):
        mtu = bridge.mtu if device.mtu != bridge.mtu else None
        if master is not None or mtu is not None or not device.up:
            yield SetLink(network, place, device.name, not device.up, mtu, master)


def want_addresses(
    network: NetworkId,
    namespace: str | None,
    seen: ObservedNamespace | None,
    device: str,
    naming: Naming,
) -> Iterator[AddAddress]:
    """Additions for those metadata addresses that `device` does not carry yet."""
    present = {one.address for one in seen.addresses if one.device == device} if seen else set()
    for family, prefix in PREFIXES.items():
        address = family.metadata_address
        if address not in present:
            yield AddAddress(network, namespace, device, address, prefix, naming.protocol)
