"""Planner for listeners: host objects that the networks need, endpoints and reasons for missing ones. Pure.

`plan_listeners` compares the networks with the observed host. Its plan lists the endpoints that HAProxy can bind now
(`Endpoint`), those that it cannot bind, with reasons (`NotServed`), other processes that listen there (`Foreign`), and
operations on the host (`HostOp`). Planning never waits: an endpoint whose namespace or address does not exist yet is
pending, and appears in the plan after the next observation.

Every network and family has at least one endpoint or exactly one `NotServed`.

imdsproxy creates the listener of a bridge:

    bridge ── imds<hash> ══veth══ imds0 in namespace imds-<hash>: 169.254.169.254, fe80::a9fe:a9fe

Replies must reach guests of any subnet although the namespace has no address in that subnet. Its default route has
scope link, so the kernel asks for every guest by ARP or ND. Checksum offload stays on: a Linux bridge passes packets
on with their checksum state, and every guest NIC understands it.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple, TypeAlias, assert_never

from imdsproxy.errors import Problem
from imdsproxy.host.names import Naming
from imdsproxy.host.state import Family, ObservedDevice, ObservedHost, ObservedNamespace
from imdsproxy.model.claims import find_shared
from imdsproxy.model.entities import (
    METADATA_IPV4,
    BridgeListener,
    InterfaceListener,
    IpAddress,
    NamespaceListener,
    Network,
    NetworkId,
)
from imdsproxy.model.wire import REDIRECTED_PORT
from imdsproxy.network.endpoints import listen, listen_redirected
from imdsproxy.network.ovn.plan import OvnWanted, network_of, plan_ovn
from imdsproxy.network.planned import (
    ENSLAVING,
    LOOPBACK,
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
from imdsproxy.sources.ovn.ports import devices_of, namespace_of

_NAMING = Naming()


@dataclass(frozen=True, slots=True)
class ListenerPlan:
    """Plan for all networks, in the order of their ids, and its result.

    Attributes:
        not_served: Endpoints that cannot be bound, with reasons; `ops` resolve the `PENDING` ones.
        ops: Operations on the host, in this order: removals first.
        waiting: OVN's networks without ports here whose namespaces another process still listens in.
        operations: Number of operations carried out until none was left.
    """

    endpoints: tuple[Endpoint, ...] = ()
    not_served: tuple[NotServed, ...] = ()
    foreign: tuple[Foreign, ...] = ()
    ops: tuple[HostOp, ...] = ()
    waiting: frozenset[NetworkId] = frozenset()
    problems: tuple[Problem, ...] = ()
    operations: int = 0
    at: float = 0.0
    seconds: float = 0.0
    reasons: tuple[str, ...] = ()


class Place(NamedTuple):
    """Place of a network's listener, whether or not the place exists.

    Attributes:
        namespace: Name of the namespace; `None` for the host's own.
        device: Device in that namespace; `None` for all devices.
        bridge: Bridge that our namespace is attached to, and the name of the link that attaches it.
        managed: Whether imdsproxy manages the metadata addresses on the device.
        redirected: Whether requests are redirected to a port of ours, at every address.
        outer: Device of the host's own namespace that leads to the device of OVN's network.
    """

    namespace: str | None
    device: str | None
    bridge: tuple[str, str] | None = None
    managed: bool = True
    redirected: bool = False
    outer: str | None = None

    @property
    def host_devices(self) -> tuple[str, ...]:
        if self.namespace is None and self.device is not None:
            return (self.device,)
        return self.bridge or ()

    @property
    def observed_devices(self) -> tuple[str, ...]:
        return self.host_devices if self.outer is None else (self.outer,)


def place_of(network: Network, naming: Naming = _NAMING) -> Place:
    match network.listener:
        case NamespaceListener(namespace, device, manage, redirected):
            ovn = network_of(namespace)
            outer = None if ovn is None or redirected else devices_of(ovn)[0]
            managed = manage and device is not None
            return Place(namespace, device, managed=managed, redirected=redirected, outer=outer)
        case InterfaceListener(device):
            return Place(None, device)
        case BridgeListener(bridge):
            link = naming.link(network.id)
            return Place(naming.namespace(network.id), naming.inner_device, (bridge, link))
        case never:
            assert_never(never)


def ovn_place(network: NetworkId) -> Place:
    outer, inner = devices_of(network)
    return Place(namespace_of(network), inner, managed=False, outer=outer)


ManagedPlace: TypeAlias = tuple[str | None, str]
"""Namespace (`None`: the host's own) and device to which imdsproxy added the metadata addresses."""

Planned: TypeAlias = Endpoint | NotServed | Foreign | HostOp

PlanMemo: TypeAlias = dict[NetworkId, tuple[Network, ObservedNamespace | None, tuple[Planned, ...]]]
"""Plans of networks in namespaces, with the inputs of each plan. For one `Naming` only."""


def plan_listeners(
    networks: Mapping[NetworkId, Network],
    observed: ObservedHost,
    naming: Naming = _NAMING,
    *,
    sweep: bool = True,
    managed: Collection[ManagedPlace] | None = None,
    memo: PlanMemo | None = None,
    first: Mapping[NetworkId, Network] = MappingProxyType({}),
    ovn: OvnWanted | None = None,
    overdue: Collection[NetworkId] = (),
) -> ListenerPlan:
    """Plan the listeners of all networks at once.

    Args:
        networks: All networks. The sweep removes our objects that belong to no network.
        sweep: Also plan removals; off until all sources are in sync.
        managed: Places where imdsproxy added addresses, by its journal; `None` for anywhere. Addresses are removed
            only there: the mark on an address has 128 values, and another daemon may use the same.
        memo: Empty at the first call; pass the same dictionary again to reuse unchanged parts of the plan.
        first: Networks that HAProxy is configured for: they keep a listener that another network claims too.
        overdue: OVN's networks whose namespaces no longer wait for processes that listen there.
    """
    memo = {} if memo is None else memo
    shared = find_shared(networks.values(), first, observed.inode_of)
    planned: list[Planned] = []
    for network_id in sorted(networks):
        if network_id in shared:
            reason = f"network {shared[network_id]} has this listener"
            hint = "give each network a listener of its own, or remove one of the two"
            planned.append(NotServed(network_id, None, NotServedCode.LISTENER_SHARED, reason, hint))
        else:
            planned += _plan_again(networks[network_id], observed, naming, memo)
    for gone in memo.keys() - networks.keys():
        del memo[gone]
    served = [networks[network_id] for network_id in networks.keys() - shared.keys()]
    removals = plan_sweep(served, observed, naming, managed) if sweep else ()
    lacking = (one for one in planned if isinstance(one, AttachBridge | AddAddress | MakeTable))
    of_ovn: tuple[HostOp, ...] = ()
    waiting: frozenset[NetworkId] = frozenset()
    if ovn is not None:
        of_ovn, waiting = plan_ovn(ovn, observed, naming, overdue)
    return ListenerPlan(
        endpoints=tuple(one for one in planned if isinstance(one, Endpoint)),
        not_served=tuple(one for one in planned if isinstance(one, NotServed)),
        foreign=tuple(one for one in planned if isinstance(one, Foreign)),
        ops=(*removals, *lacking, *of_ovn),
        waiting=waiting,
    )


def explain_pending(plan: ListenerPlan, failures: Mapping[HostOp, Problem]) -> ListenerPlan:
    """Return the plan with each failed op as the reason of the listeners that it keeps pending.

    Args:
        plan: Plan made from the host as observed after the ops were tried.
    """

    def explain(left: NotServed) -> NotServed:
        for op, failure in failures.items() if left.code is NotServedCode.PENDING else ():
            # A bridge is attached in steps: a failure explains each pending part.
            version = op.address.version if isinstance(op, AddAddress) else left.family
            if op.network == left.network and left.family in (None, version):
                code = NotServedCode.HOST_REFUSED
                return replace(left, code=code, reason=failure.reason, hint=failure.hint)
        return left

    return replace(plan, not_served=tuple(map(explain, plan.not_served)))


def _plan_again(
    network: Network, observed: ObservedHost, naming: Naming, memo: PlanMemo
) -> Iterable[Planned]:
    if not isinstance(network.listener, NamespaceListener):
        return plan_network(network, observed, naming)
    seen = observed.namespaces.get(network.listener.namespace)
    before = memo.get(network.id)
    # `merge_observed` keeps the objects that were not observed anew: the same object is the same observation.
    if before is not None and before[0] == network and before[1] is seen:
        return before[2]
    part = tuple(plan_network(network, observed, naming))
    memo[network.id] = (network, seen, part)
    return part


def plan_network(network: Network, observed: ObservedHost, naming: Naming) -> Iterator[Planned]:
    """Yield the endpoints of a network, or the reason for missing ones and the ops that create them."""
    place, root = place_of(network, naming), observed.root
    seen = root if place.namespace is None else observed.namespaces.get(place.namespace, _NOTHING)
    refusals = _refuse_place(place, seen)
    if place.bridge is not None:
        refusals = _refuse_bridge(place, seen, root, naming.alias(network.id))
    if refusal := next(refusals, None):
        yield NotServed(network.id, None, *refusal)
        return
    yield from _lacks(network.id, place, seen, root, naming)
    if place.bridge is not None and place.device not in seen.devices:
        reason = f"imdsproxy is creating namespace {place.namespace}"
        yield NotServed(network.id, None, NotServedCode.PENDING, reason)
        return
    if place.namespace is None:
        here = tuple(one for one in root.addresses if one.device == place.device)
        seen = replace(root, addresses=here)
    for family in Family:
        if place.redirected:
            yield from listen_redirected(network.id, seen, family)
        else:
            yield from listen(network.id, seen, family, device=place.device, managed=place.managed)


_NOTHING = ObservedNamespace(None)

Refusal: TypeAlias = tuple[NotServedCode, str, str]
"""Code, reason and hint of a network that is not served (see `NotServed`)."""


def _refuse_place(place: Place, seen: ObservedNamespace) -> Iterator[Refusal]:
    where = f" in namespace {place.namespace}" if place.namespace else ""
    if seen.problem:
        yield NotServedCode.NAMESPACE_UNUSABLE, seen.problem, ""
    if place.namespace is not None and seen.ref is None:
        hint = "create the namespace: serving starts within a second"
        reason = f"there is no network namespace {place.namespace}"
        yield NotServedCode.NAMESPACE_MISSING, reason, hint
    if place.device is None:
        return
    device = seen.devices.get(place.device)
    if device is not None:
        yield from _refuse_device(device, seen, where)
    else:
        hint = "create the device: serving starts within a second"
        yield NotServedCode.DEVICE_MISSING, f"there is no device {place.device}{where}", hint


def _refuse_device(
    device: ObservedDevice, seen: ObservedNamespace, where: str
) -> Iterator[Refusal]:
    """Also refuse a device whose packets a master takes, and one whose address would hide the host's own metadata."""
    name = device.name
    if not device.up:
        yield NotServedCode.DEVICE_DOWN, f"device {name}{where} is down", f"ip link set {name} up"
    for master in seen.devices.values():
        if master.index == device.master and master.kind in ENSLAVING:
            reason = f"device {name}{where} belongs to {master.kind} {master.name}, which takes its packets"
            yield NotServedCode.DEVICE_ENSLAVED, reason, f"let the listener name {master.name}"
    if seen.own_metadata and METADATA_IPV4 not in _addresses_on(seen, name):
        reason = (
            f"with {METADATA_IPV4} on {name} this host would lose its own metadata service, "
            f"which it seems to use: {seen.own_metadata}"
        )
        hint = (
            f"if {name} is a bridge, name the bridge (--bridge {name}): the host keeps its service; "
            f"if the host needs no metadata: ip address add {METADATA_IPV4}/32 dev {name}"
        )
        yield NotServedCode.HOST_METADATA, reason, hint


def _refuse_bridge(
    place: Place, seen: ObservedNamespace, root: ObservedNamespace, alias: str
) -> Iterator[Refusal]:
    """Also refuse a bridge if a link or namespace of our name exists that is not ours."""
    name, link_name = place.host_devices
    bridge, link = root.devices.get(name), root.devices.get(link_name)
    if bridge is None:
        hint = "create the bridge: serving starts within a second"
        yield NotServedCode.DEVICE_MISSING, f"there is no bridge {name}", hint
    elif bridge.kind != "bridge":
        what = f"a device of kind {bridge.kind}" if bridge.kind else "a plain device"
        hint = "use an interface listener, or a namespace for an Open vSwitch bridge"
        yield NotServedCode.NOT_A_BRIDGE, f"{name} is {what}, not a Linux bridge", hint
    elif not bridge.up:
        yield NotServedCode.DEVICE_DOWN, f"bridge {name} is down", f"ip link set {name} up"
    if link is not None and link.alias != alias and not _is_unmarked_veth(link):
        reason = f"link {link.name} exists, and imdsproxy did not create it"
        yield NotServedCode.NAME_TAKEN, reason, f"ip link del {link.name}"
    if seen.problem:
        yield NotServedCode.NAMESPACE_UNUSABLE, seen.problem, ""
    if _alias_of(seen) != alias and not _is_unmarked(seen):
        reason = f"namespace {place.namespace} exists, and imdsproxy did not create it"
        yield NotServedCode.NAME_TAKEN, reason, f"ip netns del {place.namespace}"


def _is_unmarked_veth(link: ObservedDevice) -> bool:
    """Return whether a link with a name of our form has no mark: the process that created it was killed."""
    return link.kind == "veth" and not link.alias


def _is_unmarked(seen: ObservedNamespace) -> bool:
    """Return whether a namespace with a name of our form has no mark: the process that created it was killed."""
    return not _alias_of(seen) and len(seen.devices) <= 1


def _alias_of(seen: ObservedNamespace) -> str:
    """Return the mark on the namespace's loopback device; empty without one."""
    loopback = seen.devices.get(LOOPBACK)
    return loopback.alias if loopback is not None else ""


def _addresses_on(seen: ObservedNamespace, device: str | None) -> set[IpAddress]:
    return {one.address for one in seen.addresses if one.device == device}


def _lacks(
    network: NetworkId,
    place: Place,
    seen: ObservedNamespace,
    root: ObservedNamespace,
    naming: Naming,
) -> Iterator[AttachBridge | AddAddress | MakeTable]:
    drop = RouterTable.DROP
    if place.redirected and seen.ref is not None and drop.name_in(naming) not in seen.tables:
        yield MakeTable(seen.ref, drop, naming)
    if place.bridge is not None:
        bridge, link = (root.devices.get(name) for name in place.bridge)
        if bridge is not None and not _is_attached(bridge, link, seen, naming.inner_device):
            yield AttachBridge(network, bridge.name, bridge.mtu, naming)
    elif place.managed and place.device is not None:
        present = _addresses_on(seen, place.device)
        for address in (one.metadata_address for one in Family):
            if address not in present:
                yield AddAddress(network, place.namespace, place.device, address, naming.protocol)


def _is_attached(
    bridge: ObservedDevice, link: ObservedDevice | None, seen: ObservedNamespace, inner: str
) -> bool:
    """Return whether a bridge's listener has all parts that `AttachBridge` creates."""
    inside, loopback = seen.devices.get(inner), seen.devices.get(LOOPBACK)
    if link is None or inside is None or loopback is None:
        return False
    routes = {family for family, device in seen.default_routes if device == inner}
    return (
        loopback.up
        and bool(loopback.alias and link.alias)
        and link.master == bridge.index
        and all(one.up and one.mtu == bridge.mtu for one in (link, inside))
        and len(_addresses_on(seen, inner)) == len(routes) == len(Family)
    )


def plan_redirects(
    binds: Iterable[Endpoint], observed: ObservedHost, naming: Naming
) -> tuple[list[RemoveTable], list[MakeTable]]:
    """Plan the redirection of requests in routers' namespaces.

    Returns:
        Tables to remove before HAProxy stops listening, and tables to create once it listens.
    """
    redirect = RouterTable.REDIRECT
    wanted = {one.namespace for one in binds if one.port == REDIRECTED_PORT}
    present = {
        seen.ref for seen in observed.namespaces.values() if redirect.name_in(naming) in seen.tables
    }
    gone = [RemoveTable(ref, redirect, naming) for ref in present - wanted if ref is not None]
    come = [MakeTable(ref, redirect, naming) for ref in wanted - present if ref is not None]
    return gone, come


def note_tables(observed: ObservedHost, ops: Iterable[HostOp]) -> ObservedHost:
    """Return the host with the tables as they are after these operations."""
    namespaces = dict(observed.namespaces)
    for op in ops:
        if not isinstance(op, MakeTable | RemoveTable):
            continue
        seen = namespaces.get(op.namespace.name)
        # The name may belong to another namespace by now.
        if seen is not None and seen.ref == op.namespace:
            made = isinstance(op, MakeTable)
            tables = seen.tables | {op.name} if made else seen.tables - {op.name}
            namespaces[op.namespace.name] = replace(seen, tables=tables)
    return replace(observed, namespaces=namespaces)


def find_left_to_others(
    networks: Iterable[Network],
    observed: ObservedHost,
    naming: Naming,
    managed: Collection[ManagedPlace],
) -> frozenset[ManagedPlace]:
    """Return places with our addresses that no network needs and another process listens at. It keeps the addresses."""
    places = [place_of(network, naming) for network in networks]
    wanted = {(one.namespace, one.device) for one in places}
    return frozenset(
        (name, device)
        for name, device in managed
        if (name, device) not in wanted and name is not None and name in observed.namespaces
        for seen in (observed.namespaces[name],)
        if any(not one.ours and one.address in _addresses_on(seen, device) for one in seen.sockets)
    )


def plan_sweep(
    served: Iterable[Network],
    observed: ObservedHost,
    naming: Naming,
    managed: Collection[ManagedPlace] | None,
) -> Iterator[HostOp]:
    """Yield removals of orphaned objects: marked as ours, but of no network."""
    places = [place_of(network, naming) for network in served]
    namespaces = {one.namespace for one in places}
    links = {link for one in places for link in one.host_devices}
    for name, seen in observed.namespaces.items():
        ours = name not in namespaces and naming.is_namespace(name) and not seen.problem
        if ours and (_is_unmarked(seen) or naming.owner_of(_alias_of(seen)) is not None):
            yield DeleteNamespace(name)
    for name, device in observed.root.devices.items():
        marked = naming.owner_of(device.alias) is not None or _is_unmarked_veth(device)
        if naming.is_link(name) and marked and name not in links:
            yield DeleteLink(name)
    wanted = {(one.namespace, one.device) for one in places if one.managed and one.bridge is None}
    protocol = naming.protocol
    for at, seen in ((None, observed.root), *observed.namespaces.items()):
        for one in seen.addresses:
            where = (at, one.device)
            if one.protocol != protocol or where in wanted:
                continue
            # Addresses in a namespace of ours disappear with the namespace.
            in_ours = at is not None and naming.is_namespace(at)
            if not in_ours and (managed is None or where in managed):
                yield RemoveAddress(at, one.device, one.address, one.prefix)
