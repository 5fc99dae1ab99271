"""What the host must have so that every network can be listened on: pure planning of host objects.

`plan_listeners` compares the networks with what was observed of the host and says what HAProxy can
bind now (`Endpoint`), what it cannot and why (`LeftOut`), who else listens there (`Foreign`) and
what is to be done on the host (`HostOp`). It never waits: an endpoint whose namespace or address
is still to be made is left out as pending and comes with the plan after the next observation.

For every network and family there is at least one endpoint or exactly one `LeftOut`.

A bridge's listener is made by us:

    bridge ── imds<hash> ══veth══ imds0 in namespace imds-<hash>: 169.254.169.254, fe80::a9fe:a9fe

Replies must reach guests of any subnet though we have no address in it, so the namespace has a
default route of scope link: every guest is asked for by ARP or ND. Checksum offload stays on: a
Linux bridge hands packets on with their checksum state, and every guest NIC knows it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias, assert_never

from imdsproxy.core.endpoints import ENSLAVING, LOOPBACK, Endpoint, Foreign, LeftOut, LeftOutCode
from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hoststate import Family, ObservedDevice, ObservedHost, ObservedNamespace
from imdsproxy.core.model import (
    METADATA_IPV4,
    BridgeListener,
    InterfaceListener,
    IpAddress,
    NamespaceListener,
    Network,
    NetworkId,
)
from imdsproxy.listeners.endpoints import listen


@dataclass(frozen=True, slots=True)
class AttachBridge:
    """Make whatever a bridge's listener lacks: namespace, veth pair, addresses and default routes, marked as ours.

    Attributes:
        mtu: The bridge's, in bytes.
    """

    action: ClassVar[str] = "attach a namespace to bridge {0.bridge}"
    network: NetworkId
    bridge: str
    mtu: int
    naming: Naming


@dataclass(frozen=True, slots=True)
class AddAddress:
    """Put an address on a device, without duplicate address detection, marked with `protocol`."""

    action: ClassVar[str] = "add {0.address} on device {0.device}"
    network: NetworkId
    namespace: str | None
    device: str
    address: IpAddress
    protocol: int


@dataclass(frozen=True, slots=True)
class RemoveAddress:
    """Take an address away again."""

    action: ClassVar[str] = "remove {0.address} on device {0.device}"
    network: ClassVar[None] = None
    namespace: str | None
    device: str
    address: IpAddress
    prefix: int


@dataclass(frozen=True, slots=True)
class DeleteNamespace:
    """Remove a namespace of ours, and with it the veth pair that ends in it."""

    action: ClassVar[str] = "delete namespace {0.name}"
    network: ClassVar[None] = None
    name: str


@dataclass(frozen=True, slots=True)
class DeleteLink:
    """Remove a link of ours from the host's own namespace."""

    action: ClassVar[str] = "delete link {0.name}"
    network: ClassVar[None] = None
    name: str


HostOp: TypeAlias = AttachBridge | AddAddress | RemoveAddress | DeleteNamespace | DeleteLink
"""What `listeners.apply` does to a host. Done twice, or on a host that is that way already, it changes nothing."""


@dataclass(frozen=True, slots=True)
class OpFailure:
    """An op that the host refused, in words for the operator."""

    op: HostOp
    reason: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class ListenerPlan:
    """What to do for all networks, in the order of their ids.

    Attributes:
        endpoints: What to bind.
        left_out: What cannot be bound, with reasons; `PENDING` ones come right by `ops`.
        foreign: Who else listens at those addresses and what that does.
        ops: What to do on the host, in this order: removals first.
    """

    endpoints: tuple[Endpoint, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    foreign: tuple[Foreign, ...] = ()
    ops: tuple[HostOp, ...] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a network is listened for, whether or not it is there.

    Attributes:
        namespace: By name; `None` for the host's own.
        device: In that namespace; `None` for all.
        host_devices: The devices of the host's own namespace that it depends on; a bridge first.
        manages: The metadata addresses on `device` are our business.
    """

    namespace: str | None
    device: str | None
    host_devices: tuple[str, ...] = ()
    manages: bool = False


def place_of(network: Network, naming: Naming) -> Place:
    """The place of a network's listener."""
    match network.listener:
        case NamespaceListener(namespace, device, manage):
            return Place(namespace, device, manages=manage and device is not None)
        case InterfaceListener(device):
            return Place(None, device, (device,), manages=True)
        case BridgeListener(bridge):
            inside, link = naming.namespace(network.id), naming.link(network.id)
            return Place(inside, naming.inner_device, (bridge, link))
        case never:
            assert_never(never)


ManagedPlace: TypeAlias = tuple[str | None, str]
"""Namespace (`None`: the host's own) and device that we put the metadata addresses on."""

Planned: TypeAlias = Endpoint | LeftOut | Foreign | HostOp

PlanMemo: TypeAlias = dict[NetworkId, tuple[Network, ObservedNamespace | None, tuple[Planned, ...]]]
"""Plans of networks in namespaces, with what each was made of. For one `Naming` only."""


def plan_listeners(
    networks: Mapping[NetworkId, Network],
    observed: ObservedHost,
    naming: Naming | None = None,
    *,
    sweep: bool = True,
    managed: Collection[ManagedPlace] | None = None,
    memo: PlanMemo | None = None,
    first: Callable[[], Mapping[NetworkId, Network]] = dict,
) -> ListenerPlan:
    """Plan the listeners of all networks at once.

    Args:
        networks: All of them: what is ours on the host and belongs to none is removed.
        observed: The host. What was not looked at counts as not there.
        naming: How our own objects are named.
        sweep: Also plan removals; off until all sources are in sync.
        managed: Where we have put addresses, by our own journal; only there are they removed again. The
            mark on an address is one of 128 and may be another daemon's too. `None`: anywhere.
        memo: Empty at first and then the same one again: most of a plan is that of before.
        first: Gives the networks that HAProxy is configured for: they keep a listener that another one claims too.
    """
    naming = naming or Naming()
    memo = {} if memo is None else memo
    shared = find_shared(networks.values(), observed, {})
    if shared:
        shared = find_shared(networks.values(), observed, first())
    planned: list[Planned] = []
    for network_id in sorted(networks):
        if network_id in shared:
            reason = f"network {shared[network_id]} has this listener"
            hint = "give each network a listener of its own, or remove one of the two"
            planned.append(LeftOut(network_id, None, LeftOutCode.LISTENER_SHARED, reason, hint))
        else:
            planned += _plan_again(networks[network_id], observed, naming, memo)
    for gone in memo.keys() - networks.keys():
        del memo[gone]
    served = [networks[network_id] for network_id in networks.keys() - shared.keys()]
    removals = plan_sweep(served, observed, naming, managed) if sweep else ()
    return ListenerPlan(
        endpoints=tuple(one for one in planned if isinstance(one, Endpoint)),
        left_out=tuple(one for one in planned if isinstance(one, LeftOut)),
        foreign=tuple(one for one in planned if isinstance(one, Foreign)),
        ops=(*removals, *(one for one in planned if isinstance(one, HostOp))),
    )


def explain_pending(plan: ListenerPlan, failures: Iterable[OpFailure]) -> ListenerPlan:
    """The same plan; what is pending because an op failed gets the failure as its reason.

    Args:
        plan: Made from what was observed after the ops were tried.
        failures: Of the ops that were tried.
    """
    given = tuple(failures)

    def explain(left: LeftOut) -> LeftOut:
        if left.code is not LeftOutCode.PENDING:
            return left
        for failure in given:
            op = failure.op
            other = isinstance(op, AddAddress) and left.family not in (
                None,
                Family(op.address.version),
            )
            if op.network == left.network and not other:
                code = LeftOutCode.HOST_REFUSED
                return replace(left, code=code, reason=failure.reason, hint=failure.hint)
        return left

    return replace(plan, left_out=tuple(map(explain, plan.left_out)))


def _plan_again(
    network: Network, observed: ObservedHost, naming: Naming, memo: PlanMemo
) -> Iterable[Planned]:
    """Plan a network, or remember the plan where it is made of the same things as before."""
    if not isinstance(network.listener, NamespaceListener):
        return plan_network(network, observed, naming)
    seen = observed.namespaces.get(network.listener.namespace)
    before = memo.get(network.id)
    # `merge_observed` keeps what was not looked at anew: the same object is the same observation.
    if before is not None and before[0] == network and before[1] is seen:
        return before[2]
    part = tuple(plan_network(network, observed, naming))
    memo[network.id] = (network, seen, part)
    return part


def plan_network(network: Network, observed: ObservedHost, naming: Naming) -> Iterator[Planned]:
    """Endpoints of one network, or why it has none and what is to be done first."""
    match network.listener:
        case NamespaceListener() as listener:
            return _plan_namespace(network.id, listener, observed, naming)
        case InterfaceListener(device):
            return _plan_interface(network.id, device, observed.root, naming)
        case BridgeListener(bridge):
            return _plan_bridge(network.id, bridge, observed, naming)
        case never:
            assert_never(never)


def _plan_namespace(
    network: NetworkId, listener: NamespaceListener, observed: ObservedHost, naming: Naming
) -> Iterator[Planned]:
    name, device = listener.namespace, listener.device
    seen = observed.namespaces.get(name)
    if seen is None or not (seen.ref or seen.problem):
        code, reason = LeftOutCode.NAMESPACE_MISSING, f"there is no network namespace {name}"
        hint = "it is noticed within a second once it is made"
        yield LeftOut(network, None, code, reason, hint)
        return
    refused = None
    if seen.problem:
        refused = LeftOut(network, None, LeftOutCode.NAMESPACE_UNUSABLE, seen.problem)
    elif device is not None:
        refused = _check_device(network, seen, device, f" in namespace {name}")
    if refused is not None:
        yield refused
        return
    managed = device is not None and listener.manage_addresses
    if device is not None and managed:
        yield from _want_addresses(network, name, seen, device, naming)
    for family in Family:
        yield from listen(network, seen, family, device=device, managed=managed)


def _plan_interface(
    network: NetworkId, device: str, root: ObservedNamespace, naming: Naming
) -> Iterator[Planned]:
    seen = replace(root, addresses=tuple(a for a in root.addresses if a.device == device))
    has_it = METADATA_IPV4 in _addresses_on(root, device)
    refused = _check_device(network, root, device, "")
    if refused is None and root.own_metadata and not has_it:
        refused = LeftOut(
            network,
            None,
            LeftOutCode.HOST_METADATA,
            f"with {METADATA_IPV4} on {device} this host would not reach metadata of its own any more, "
            f"and it seems to have some: {root.own_metadata}",
            f"if {device} is a bridge, name it as a bridge (--bridge {device}): that leaves the host alone; "
            f"if the host needs none: ip address add {METADATA_IPV4}/32 dev {device}",
        )
    if refused is not None:
        yield refused
        return
    yield from _want_addresses(network, None, seen, device, naming)
    for family in Family:
        yield from listen(network, seen, family, device=device, managed=True)


def _check_device(
    network: NetworkId, seen: ObservedNamespace, name: str, where: str
) -> LeftOut | None:
    device = seen.devices.get(name)
    if device is None:
        code, reason = LeftOutCode.DEVICE_MISSING, f"there is no device {name}{where}"
        return LeftOut(
            network, None, code, reason, "it is noticed within a second once it is there"
        )
    if not device.up:
        code, reason = LeftOutCode.DEVICE_DOWN, f"device {name}{where} is down"
        return LeftOut(network, None, code, reason, f"ip link set {name} up")
    for master in seen.devices.values():
        if master.index == device.master and master.kind in ENSLAVING:
            reason = f"device {name}{where} belongs to {master.kind} {master.name}, which takes its packets"
            hint = f"name {master.name} in its place"
            return LeftOut(network, None, LeftOutCode.DEVICE_ENSLAVED, reason, hint)
    return None


def _want_addresses(
    network: NetworkId, namespace: str | None, seen: ObservedNamespace, device: str, naming: Naming
) -> Iterator[AddAddress]:
    present = _addresses_on(seen, device)
    for family in Family:
        if (address := family.metadata_address) not in present:
            yield AddAddress(network, namespace, device, address, naming.protocol)


def _addresses_on(seen: ObservedNamespace, device: str) -> set[IpAddress]:
    return {one.address for one in seen.addresses if one.device == device}


def _plan_bridge(
    network: NetworkId, name: str, observed: ObservedHost, naming: Naming
) -> Iterator[Planned]:
    bridge, inner = observed.root.devices.get(name), naming.inner_device
    seen = observed.namespaces.get(naming.namespace(network))
    link = observed.root.devices.get(naming.link(network))
    refused = _check_bridge(network, name, bridge) or _check_ours(network, seen, link, naming)
    if refused is not None or bridge is None:
        yield from () if refused is None else (refused,)
        return
    if not _is_attached(bridge, link, seen, naming):
        yield AttachBridge(network, name, bridge.mtu, naming)
    if seen is None or inner not in seen.devices:
        reason = f"namespace {naming.namespace(network)} is being made"
        yield LeftOut(network, None, LeftOutCode.PENDING, reason)
        return
    for family in Family:
        yield from listen(network, seen, family, device=inner, managed=True)


def _check_bridge(network: NetworkId, name: str, bridge: ObservedDevice | None) -> LeftOut | None:
    if bridge is None:
        hint, reason = "create it; it is noticed within a second", f"there is no bridge {name}"
        return LeftOut(network, None, LeftOutCode.DEVICE_MISSING, reason, hint)
    if bridge.kind != "bridge":
        what = f"a device of kind {bridge.kind}" if bridge.kind else "a plain device"
        reason = f"{name} is {what}, not a Linux bridge"
        hint = "use an interface listener, or a namespace for an Open vSwitch bridge"
        return LeftOut(network, None, LeftOutCode.NOT_A_BRIDGE, reason, hint)
    if not bridge.up:
        hint, reason = f"ip link set {name} up", f"bridge {name} is down"
        return LeftOut(network, None, LeftOutCode.DEVICE_DOWN, reason, hint)
    return None


def _check_ours(
    network: NetworkId, seen: ObservedNamespace | None, link: ObservedDevice | None, naming: Naming
) -> LeftOut | None:
    alias, code = naming.alias(network), LeftOutCode.NAME_TAKEN
    if link is not None and link.alias != alias and not _is_unmarked_veth(link):
        reason = f"a link {link.name} that is not ours is there"
        return LeftOut(network, None, code, reason, f"ip link del {link.name}")
    if seen is not None and seen.problem:
        return LeftOut(network, None, LeftOutCode.NAMESPACE_UNUSABLE, seen.problem)
    if seen is not None and _alias_of(seen) != alias and not _is_unmarked(seen):
        name = naming.namespace(network)
        reason = f"a namespace {name} that is not ours is there"
        return LeftOut(network, None, code, reason, f"ip netns del {name}")
    return None


def _is_unmarked_veth(link: ObservedDevice) -> bool:
    """Whether a link in our form of name is ours though it has no mark: its maker was killed."""
    return link.kind == "veth" and not link.alias


def _is_unmarked(seen: ObservedNamespace) -> bool:
    """The same of a namespace."""
    return not _alias_of(seen) and len(seen.devices) <= 1


def _alias_of(seen: ObservedNamespace) -> str:
    """The mark of a namespace's maker, on its loopback device; empty without one."""
    loopback = seen.devices.get(LOOPBACK)
    return loopback.alias if loopback is not None else ""


def _is_attached(
    bridge: ObservedDevice,
    link: ObservedDevice | None,
    seen: ObservedNamespace | None,
    naming: Naming,
) -> bool:
    """Whether a bridge's listener has all that `AttachBridge` makes."""
    loopback, inside = (
        None if seen is None else seen.devices.get(name) for name in (LOOPBACK, naming.inner_device)
    )
    if seen is None or link is None or inside is None or loopback is None:
        return False
    routes = {family for family, device in seen.default_routes if device == inside.name}
    return (
        loopback.up
        and bool(loopback.alias and link.alias)
        and link.master == bridge.index
        and all(one.up and one.mtu == bridge.mtu for one in (link, inside))
        and len(_addresses_on(seen, inside.name)) == len(routes) == len(Family)
    )


def find_shared(
    networks: Iterable[Network], observed: ObservedHost, first: Mapping[NetworkId, Network]
) -> dict[NetworkId, NetworkId]:
    """Networks whose listener another network has, each with that other one.

    Args:
        networks: All of them.
        observed: The host: two names may lead to one namespace.
        first: The networks as HAProxy is configured for them. One that is unchanged keeps its listener; of the
            others the first by id has it.
    """

    def unchanged(network: Network) -> bool:
        known = first.get(network.id)
        return known is not None and known.listener == network.listener

    places: dict[str | int, dict[str | None, NetworkId]] = {}
    shared: dict[NetworkId, NetworkId] = {}
    for network in sorted(networks, key=lambda one: (not unchanged(one), one.id)):
        place, device = _whereabouts(network, observed)
        taken = places.setdefault(place, {})
        holders = taken.values() if device is None else (taken.get(None), taken.get(device))
        holder = next((one for one in holders if one is not None), None)
        if holder is None:
            taken[device] = network.id
        else:
            shared[network.id] = holder
    return shared


def _whereabouts(network: Network, observed: ObservedHost) -> tuple[str | int, str | None]:
    """What a network's listener is in, and its device there (`None`: all)."""
    match network.listener:
        case NamespaceListener(namespace, device):
            seen = observed.namespaces.get(namespace)
            # Two names may lead to one namespace (`ip netns attach`): the inode is its identity.
            ref = None if seen is None else seen.ref
            return f"namespace {namespace}" if ref is None else ref.inode, device
        case InterfaceListener(device) | BridgeListener(device):
            return f"device {device}", None
        case never:
            assert_never(never)


def plan_sweep(
    served: Iterable[Network],
    observed: ObservedHost,
    naming: Naming,
    managed: Collection[ManagedPlace] | None,
) -> Iterator[HostOp]:
    """Removals of what is marked as ours and belongs to no network any more.

    Args:
        served: The networks whose listeners are wanted.
        observed: The host.
        naming: How our own objects are named.
        managed: Where we have put addresses; `None`: unknown.
    """
    places = [place_of(network, naming) for network in served]
    namespaces = {one.namespace for one in places}
    links = {link for one in places for link in one.host_devices}
    for name, seen in observed.namespaces.items():
        ours = naming.is_namespace(name) and not seen.problem and name not in namespaces
        if ours and (_is_unmarked(seen) or naming.owner_of(_alias_of(seen)) is not None):
            yield DeleteNamespace(name)
    for name, device in observed.root.devices.items():
        marked = naming.owner_of(device.alias) is not None or _is_unmarked_veth(device)
        if naming.is_link(name) and marked and name not in links:
            yield DeleteLink(name)
    wanted = {(one.namespace, one.device) for one in places if one.manages}
    for place, seen in ((None, observed.root), *observed.namespaces.items()):
        # What is in a namespace of ours goes with it.
        if place is not None and naming.is_namespace(place):
            continue
        for one in seen.addresses:
            where = (place, one.device)
            put = one.protocol == naming.protocol and (managed is None or where in managed)
            if put and where not in wanted:
                yield RemoveAddress(place, one.device, one.address, one.prefix)


def without_removed(observed: ObservedHost, ops: Iterable[HostOp]) -> ObservedHost:
    """The host as it is known, once removals have been carried out, without another look.

    Args:
        observed: The host that the plan was made from.
        ops: Those that were done; any but removals are of no account here.
    """
    namespaces, root = dict(observed.namespaces), observed.root
    for op in ops:
        match op:
            case DeleteNamespace(name):
                namespaces.pop(name, None)
            case DeleteLink(name):
                devices = {key: one for key, one in root.devices.items() if key != name}
                root = replace(root, devices=devices)
            case RemoveAddress(None):
                root = _without_address(root, op)
            case RemoveAddress(name) if name in namespaces:
                namespaces[name] = _without_address(namespaces[name], op)
    return replace(observed, root=root, namespaces=namespaces)


def _without_address(seen: ObservedNamespace, op: RemoveAddress) -> ObservedNamespace:
    gone = (op.device, op.address)
    return replace(
        seen, addresses=tuple(a for a in seen.addresses if (a.device, a.address) != gone)
    )
