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

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar, NamedTuple, TypeAlias, assert_never

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
from imdsproxy.errors import Problem
from imdsproxy.listeners.endpoints import listen, listen_redirected

_NAMING = Naming()


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

    action: ClassVar[str] = "delete namespace {0.namespace}"
    network: ClassVar[None] = None
    device: ClassVar[None] = None
    namespace: str


@dataclass(frozen=True, slots=True)
class DeleteLink:
    """Remove a link of ours from the host's own namespace."""

    action: ClassVar[str] = "delete link {0.device}"
    network: ClassVar[None] = None
    namespace: ClassVar[None] = None
    device: str


Removal: TypeAlias = RemoveAddress | DeleteNamespace | DeleteLink

HostOp: TypeAlias = AttachBridge | AddAddress | Removal
"""What `listeners.apply` does to a host. Done twice, or on a host that is that way already, it changes nothing."""


@dataclass(frozen=True, slots=True)
class ListenerPlan:
    """What to do for all networks, in the order of their ids.

    Attributes:
        endpoints: What to bind.
        left_out: What cannot be bound, with reasons; `PENDING` ones come right by `ops`.
        foreign: Who else listens at those addresses and what that does.
        ops: What to do on the host, in this order: removals first.
        problems: What was refused when it was done.
        operations: How many things were done on the host before nothing more was to be done.
        at: When it was in force, Unix time; `seconds` later than the work on it had begun.
        reasons: Of that work.
    """

    endpoints: tuple[Endpoint, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    foreign: tuple[Foreign, ...] = ()
    ops: tuple[HostOp, ...] = ()
    problems: tuple[Problem, ...] = ()
    operations: int = 0
    at: float = 0.0
    seconds: float = 0.0
    reasons: tuple[str, ...] = ()


class Place(NamedTuple):
    """Where a network is listened for, whether or not it is there.

    Attributes:
        namespace: By name; `None` for the host's own.
        device: In that namespace; `None` for all.
        bridge: The bridge that a namespace of ours is attached to, and the name of the link that does it.
        managed: The metadata addresses on the device are our business.
        redirected: Requests come to a port of ours, at every address.
    """

    namespace: str | None
    device: str | None
    bridge: tuple[str, str] | None = None
    managed: bool = True
    redirected: bool = False

    @property
    def host_devices(self) -> tuple[str, ...]:
        """The devices of the host's own namespace that it depends on."""
        if self.namespace is None and self.device is not None:
            return (self.device,)
        return self.bridge or ()

    @property
    def where(self) -> str:
        """By name what networks share that may share a listener: a device of the host, or a namespace."""
        if self.host_devices:
            return f"device {self.host_devices[0]}"
        return f"namespace {self.namespace}"


def place_of(network: Network, naming: Naming = _NAMING) -> Place:
    """The place of a network's listener."""
    match network.listener:
        case NamespaceListener(namespace, device, manage, redirected):
            managed = manage and device is not None
            return Place(namespace, device, managed=managed, redirected=redirected)
        case InterfaceListener(device):
            return Place(None, device)
        case BridgeListener(bridge):
            link = naming.link(network.id)
            return Place(naming.namespace(network.id), naming.inner_device, (bridge, link))
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
    naming: Naming = _NAMING,
    *,
    sweep: bool = True,
    managed: Collection[ManagedPlace] | None = None,
    memo: PlanMemo | None = None,
    first: Mapping[NetworkId, Network] = MappingProxyType({}),
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
        first: The networks that HAProxy is configured for: they keep a listener that another one claims too.
    """
    memo = {} if memo is None else memo
    shared = find_shared(networks.values(), observed, first)
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
    lacking = (one for one in planned if isinstance(one, (AttachBridge, AddAddress)))
    return ListenerPlan(
        endpoints=tuple(one for one in planned if isinstance(one, Endpoint)),
        left_out=tuple(one for one in planned if isinstance(one, LeftOut)),
        foreign=tuple(one for one in planned if isinstance(one, Foreign)),
        ops=(*removals, *lacking),
    )


def explain_pending(plan: ListenerPlan, failures: Mapping[HostOp, Problem]) -> ListenerPlan:
    """The same plan; what is pending because an op failed gets the failure as its reason.

    Args:
        plan: Made from what was observed after the ops were tried.
        failures: Of the ops that were tried.
    """

    def explain(left: LeftOut) -> LeftOut:
        for op, failure in failures.items() if left.code is LeftOutCode.PENDING else ():
            # A bridge is attached in steps: a failure explains all that is still pending.
            version = op.address.version if isinstance(op, AddAddress) else left.family
            if op.network == left.network and left.family in (None, version):
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
    place, root = place_of(network, naming), observed.root
    seen = root if place.namespace is None else observed.namespaces.get(place.namespace, _NOTHING)
    refusals = _refuse_place(place, seen)
    if place.bridge is not None:
        refusals = _refuse_bridge(place, seen, root, naming.alias(network.id))
    if refusal := next(refusals, None):
        yield LeftOut(network.id, None, *refusal)
        return
    yield from _lacks(network.id, place, seen, root, naming)
    if place.bridge is not None and place.device not in seen.devices:
        reason = f"namespace {place.namespace} is being made"
        yield LeftOut(network.id, None, LeftOutCode.PENDING, reason)
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

Refusal: TypeAlias = tuple[LeftOutCode, str, str]
"""Why a network is not served, and a hint (see `LeftOut`)."""


def _refuse_place(place: Place, seen: ObservedNamespace) -> Iterator[Refusal]:
    where = f" in namespace {place.namespace}" if place.namespace else ""
    if seen.problem:
        yield LeftOutCode.NAMESPACE_UNUSABLE, seen.problem, ""
    if place.namespace is not None and seen.ref is None:
        hint = "it is noticed within a second once it is made"
        reason = f"there is no network namespace {place.namespace}"
        yield LeftOutCode.NAMESPACE_MISSING, reason, hint
    if place.device is None:
        return
    device = seen.devices.get(place.device)
    if device is not None:
        yield from _refuse_device(device, seen, where)
    else:
        hint = "it is noticed within a second once it is there"
        yield LeftOutCode.DEVICE_MISSING, f"there is no device {place.device}{where}", hint


def _refuse_device(
    device: ObservedDevice, seen: ObservedNamespace, where: str
) -> Iterator[Refusal]:
    """Also why packets to it, or of this host by it, belong to something else."""
    name = device.name
    if not device.up:
        yield LeftOutCode.DEVICE_DOWN, f"device {name}{where} is down", f"ip link set {name} up"
    for master in seen.devices.values():
        if master.index == device.master and master.kind in ENSLAVING:
            reason = f"device {name}{where} belongs to {master.kind} {master.name}, which takes its packets"
            yield LeftOutCode.DEVICE_ENSLAVED, reason, f"name {master.name} in its place"
    if seen.own_metadata and METADATA_IPV4 not in _addresses_on(seen, name):
        reason = (
            f"with {METADATA_IPV4} on {name} this host would not reach metadata of its own any more, "
            f"and it seems to have some: {seen.own_metadata}"
        )
        hint = (
            f"if {name} is a bridge, name it as a bridge (--bridge {name}): that leaves the host alone; "
            f"if the host needs none: ip address add {METADATA_IPV4}/32 dev {name}"
        )
        yield LeftOutCode.HOST_METADATA, reason, hint


def _refuse_bridge(
    place: Place, seen: ObservedNamespace, root: ObservedNamespace, alias: str
) -> Iterator[Refusal]:
    """Also why what has the name of our link or namespace is not ours."""
    name, link_name = place.host_devices
    bridge, link = root.devices.get(name), root.devices.get(link_name)
    if bridge is None:
        hint = "create it; it is noticed within a second"
        yield LeftOutCode.DEVICE_MISSING, f"there is no bridge {name}", hint
    elif bridge.kind != "bridge":
        what = f"a device of kind {bridge.kind}" if bridge.kind else "a plain device"
        hint = "use an interface listener, or a namespace for an Open vSwitch bridge"
        yield LeftOutCode.NOT_A_BRIDGE, f"{name} is {what}, not a Linux bridge", hint
    elif not bridge.up:
        yield LeftOutCode.DEVICE_DOWN, f"bridge {name} is down", f"ip link set {name} up"
    if link is not None and link.alias != alias and not _is_unmarked_veth(link):
        reason = f"a link {link.name} that is not ours is there"
        yield LeftOutCode.NAME_TAKEN, reason, f"ip link del {link.name}"
    if seen.problem:
        yield LeftOutCode.NAMESPACE_UNUSABLE, seen.problem, ""
    if _alias_of(seen) != alias and not _is_unmarked(seen):
        reason = f"a namespace {place.namespace} that is not ours is there"
        yield LeftOutCode.NAME_TAKEN, reason, f"ip netns del {place.namespace}"


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


def _addresses_on(seen: ObservedNamespace, device: str | None) -> set[IpAddress]:
    return {one.address for one in seen.addresses if one.device == device}


def _lacks(
    network: NetworkId,
    place: Place,
    seen: ObservedNamespace,
    root: ObservedNamespace,
    naming: Naming,
) -> Iterator[AttachBridge | AddAddress]:
    """What is to be done for a listener that nothing refuses."""
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
    """Whether a bridge's listener has all that `AttachBridge` makes."""
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
        place = place_of(network)
        seen = observed.namespaces.get(place.namespace or "", _NOTHING)
        where: str | int = place.where
        device = None if place.host_devices else place.device
        # Two names may lead to one namespace (`ip netns attach`): the inode is its identity.
        if seen.ref is not None and not place.host_devices:
            where = seen.ref.inode
        taken = places.setdefault(where, {})
        holder = taken.get(None) or taken.get(device)
        if holder is None and device is None:
            holder = next(iter(taken.values()), None)
        if holder is None:
            taken[device] = network.id
        else:
            shared[network.id] = holder
    return shared


def find_left_to_others(
    networks: Iterable[Network],
    observed: ObservedHost,
    naming: Naming,
    managed: Collection[ManagedPlace],
) -> frozenset[ManagedPlace]:
    """Places where we have put addresses that no network needs, and another process listens at: they are that one's."""
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
            # What is in a namespace of ours goes with it.
            in_ours = at is not None and naming.is_namespace(at)
            if not in_ours and (managed is None or where in managed):
                yield RemoveAddress(at, one.device, one.address, one.prefix)
