"""What the host must have so that every network can be listened on: pure planning of host objects.

`plan_listeners` compares the networks with what was observed of the host and says what HAProxy can
bind now (`Endpoint`), what it cannot and why (`LeftOut`), who else listens there (`Foreign`) and
what is to be done on the host (`HostOp`). It never waits: an endpoint whose namespace or address
is still to be made is left out as pending and comes with the plan after the next observation.

For every network and family there is at least one endpoint or exactly one `LeftOut`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TypeAlias, assert_never

from imdsproxy.core.endpoints import ENSLAVING, LeftOut, LeftOutCode
from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hoststate import Family, ObservedHost, ObservedNamespace
from imdsproxy.core.model import (
    METADATA_IPV4,
    BridgeListener,
    InterfaceListener,
    Listener,
    NamespaceListener,
    Network,
    NetworkId,
)
from imdsproxy.listeners.bridges import alias_of, is_unmarked_veth, plan_bridge, want_addresses
from imdsproxy.listeners.endpoints import ListenerPlan, leave_out, listen
from imdsproxy.listeners.ops import (
    AddAddress,
    AddDefaultRoute,
    DeleteLink,
    DeleteNamespace,
    HostOp,
    OpFailure,
    RemoveAddress,
)

_Place: TypeAlias = tuple[str, str | int]


PlanMemo: TypeAlias = dict[NetworkId, tuple[Network, ObservedNamespace | None, ListenerPlan]]
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
    parts: list[ListenerPlan] = []
    for network_id in sorted(networks):
        if network_id in shared:
            reason = f"network {shared[network_id]} has this listener"
            hint = "give each network a listener of its own, or remove one of the two"
            parts.append(leave_out(network_id, LeftOutCode.LISTENER_SHARED, reason, hint))
        else:
            parts.append(_plan_again(networks[network_id], observed, naming, memo))
    for gone in memo.keys() - networks.keys():
        del memo[gone]
    served = [networks[network_id] for network_id in sorted(networks) if network_id not in shared]
    removals = tuple(plan_sweep(served, observed, naming, managed)) if sweep else ()
    return ListenerPlan(
        endpoints=tuple(one for part in parts for one in part.endpoints),
        left_out=tuple(one for part in parts for one in part.left_out),
        foreign=tuple(one for part in parts for one in part.foreign),
        ops=removals + tuple(one for part in parts for one in part.ops),
    )


def explain_pending(plan: ListenerPlan, failures: Iterable[OpFailure]) -> ListenerPlan:
    """The same plan; what is pending because an op failed gets the failure as its reason.

    Args:
        plan: Made from what was observed after the ops were tried.
        failures: Of the ops that were tried.
    """
    given = tuple(failures)
    return replace(plan, left_out=tuple(_explain(one, given) for one in plan.left_out))


def _explain(left: LeftOut, failures: Iterable[OpFailure]) -> LeftOut:
    if left.code is not LeftOutCode.PENDING:
        return left
    for failure in failures:
        if _concerns(failure.op, left):
            code = LeftOutCode.HOST_REFUSED
            return replace(left, code=code, reason=failure.reason, hint=failure.hint)
    return left


def _concerns(op: HostOp, left: LeftOut) -> bool:
    if op.network != left.network:
        return False
    if isinstance(op, AddAddress) and left.family is not None:
        return op.address == left.family.metadata_address
    return not isinstance(op, AddDefaultRoute) or left.family in (None, op.family)


def _plan_again(
    network: Network, observed: ObservedHost, naming: Naming, memo: PlanMemo
) -> ListenerPlan:
    """Plan a network, or remember the plan where it is made of the same things as before."""
    if not isinstance(network.listener, NamespaceListener):
        return _plan_one(network, observed, naming)
    seen = observed.namespaces.get(network.listener.namespace)
    before = memo.get(network.id)
    # `merge_observed` keeps what was not looked at anew: the same object is the same observation.
    if before is not None and before[0] == network and before[1] is seen:
        return before[2]
    part = _plan_one(network, observed, naming)
    memo[network.id] = (network, seen, part)
    return part


def _plan_one(network: Network, observed: ObservedHost, naming: Naming) -> ListenerPlan:
    listener = network.listener
    if isinstance(listener, NamespaceListener):
        return _plan_namespace(network.id, listener, observed, naming)
    if isinstance(listener, InterfaceListener):
        return _plan_interface(network.id, listener, observed, naming)
    if isinstance(listener, BridgeListener):
        return plan_bridge(network.id, listener, observed, naming)
    assert_never(listener)


def _plan_namespace(
    network: NetworkId, listener: NamespaceListener, observed: ObservedHost, naming: Naming
) -> ListenerPlan:
    seen = observed.namespaces.get(listener.namespace)
    if seen is None:
        return leave_out(
            network,
            LeftOutCode.NAMESPACE_MISSING,
            f"there is no network namespace {listener.namespace}",
            "it is noticed within a second once it is made",
        )
    if seen.problem:
        return leave_out(network, LeftOutCode.NAMESPACE_UNUSABLE, seen.problem)
    device = listener.device
    if device is not None:
        refused = _check_device(network, seen, device, f" in namespace {listener.namespace}")
        if refused is not None:
            return refused
    managed = device is not None and listener.manage_addresses
    part = ListenerPlan()
    if managed and device is not None:
        ops = want_addresses(network, listener.namespace, seen, device, naming)
        part = ListenerPlan(ops=tuple(ops))
    for family in Family:
        part += listen(network, seen, family, device=device, managed=managed)
    return part


def _plan_interface(
    network: NetworkId, listener: InterfaceListener, observed: ObservedHost, naming: Naming
) -> ListenerPlan:
    root, device = observed.root, listener.device
    refused = _check_device(network, root, device, "")
    if refused is not None:
        return refused
    on_device = {one.address for one in root.addresses if one.device == device}
    if root.own_metadata and METADATA_IPV4 not in on_device:
        return leave_out(
            network,
            LeftOutCode.HOST_METADATA,
            f"with {METADATA_IPV4} on {device} this host would not reach metadata of its own any more, "
            f"and it seems to have some: {root.own_metadata}",
            f"if {device} is a bridge, name it as a bridge (--bridge {device}): that leaves the host alone; "
            f"if the host needs none: ip address add {METADATA_IPV4}/32 dev {device}",
        )
    part = ListenerPlan(ops=tuple(want_addresses(network, None, root, device, naming)))
    seen = replace(root, addresses=tuple(a for a in root.addresses if a.device == device))
    for family in Family:
        part += listen(network, seen, family, device=device, managed=True)
    return part


def _check_device(
    network: NetworkId, seen: ObservedNamespace, name: str, where: str
) -> ListenerPlan | None:
    device = seen.devices.get(name)
    if device is None:
        return leave_out(
            network,
            LeftOutCode.DEVICE_MISSING,
            f"there is no device {name}{where}",
            "it is noticed within a second once it is there",
        )
    if not device.up:
        reason = f"device {name}{where} is down"
        return leave_out(network, LeftOutCode.DEVICE_DOWN, reason, f"ip link set {name} up")
    masters = (one for one in seen.devices.values() if device.master and one.index == device.master)
    master = next(masters, None)
    if master is not None and master.kind in ENSLAVING:
        return leave_out(
            network,
            LeftOutCode.DEVICE_ENSLAVED,
            f"device {name}{where} belongs to {master.kind} {master.name}, which takes its packets",
            f"name {master.name} in its place",
        )
    return None


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
    places: dict[_Place, dict[str | None, NetworkId]] = {}
    shared: dict[NetworkId, NetworkId] = {}
    for network in sorted(networks, key=lambda one: (not _unchanged(one, first), one.id)):
        place, device = _place(network, observed)
        taken = places.setdefault(place, {})
        holders = taken.values() if device is None else (taken.get(None), taken.get(device))
        holder = next((one for one in holders if one is not None), None)
        if holder is None:
            taken[device] = network.id
        else:
            shared[network.id] = holder
    return shared


def _unchanged(network: Network, first: Mapping[NetworkId, Network]) -> bool:
    known = first.get(network.id)
    return known is not None and known.listener == network.listener


def _place(network: Network, observed: ObservedHost) -> tuple[_Place, str | None]:
    """The place of a network's listener, and its device there (`None`: all)."""
    listener: Listener = network.listener
    if isinstance(listener, NamespaceListener):
        seen = observed.namespaces.get(listener.namespace)
        if seen is not None and seen.ref is not None:
            # Two names may lead to one namespace (`ip netns attach`): the inode is its identity.
            return ("inode", seen.ref.inode), listener.device
        return ("namespace", listener.namespace), listener.device
    if isinstance(listener, InterfaceListener):
        return ("device", listener.device), None
    if isinstance(listener, BridgeListener):
        return ("device", listener.bridge), None
    assert_never(listener)


ManagedPlace: TypeAlias = tuple[str | None, str]
"""Namespace (`None`: the host's own) and device that we put the metadata addresses on."""


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
    bridged = [one.id for one in served if isinstance(one.listener, BridgeListener)]
    namespaces = {naming.namespace(network) for network in bridged}
    links = {naming.link(network) for network in bridged}
    for name in sorted(observed.half_made):
        if naming.is_namespace(name) and name not in namespaces:
            yield DeleteNamespace(name)
    for name, seen in observed.namespaces.items():
        if name not in namespaces and _is_our_namespace(name, seen, naming):
            yield DeleteNamespace(name)
    for name, device in observed.root.devices.items():
        marked = naming.owner_of(device.alias) is not None or is_unmarked_veth(device)
        if naming.is_link(name) and marked and name not in links:
            yield DeleteLink(name)
    yield from _sweep_addresses(served, observed, naming, managed)


def _is_our_namespace(name: str, seen: ObservedNamespace, naming: Naming) -> bool:
    if not naming.is_namespace(name) or seen.problem:
        return False
    alias = alias_of(seen)
    if not alias:  # made, but its maker was killed before it could mark it
        return len(seen.devices) == 1
    return naming.owner_of(alias) is not None


def _sweep_addresses(
    served: Iterable[Network],
    observed: ObservedHost,
    naming: Naming,
    managed: Collection[ManagedPlace] | None,
) -> Iterator[HostOp]:
    wanted = {place for network in served if (place := _managed(network.listener)) is not None}
    protocol = naming.protocol
    for name, seen in ((None, observed.root), *observed.namespaces.items()):
        for one in seen.addresses:
            place = (name, one.device)
            if one.protocol != protocol or place in wanted:
                continue
            # What is in a namespace of ours goes with it.
            in_ours = name is not None and naming.is_namespace(name)
            if not in_ours and (managed is None or place in managed):
                yield RemoveAddress(name, one.device, one.address, one.prefix)


def _managed(listener: Listener) -> ManagedPlace | None:
    """Namespace and device on which the metadata addresses are our business."""
    if isinstance(listener, InterfaceListener):
        return None, listener.device
    if isinstance(listener, NamespaceListener) and listener.manage_addresses and listener.device:
        return listener.namespace, listener.device
    return None


def without_removed(observed: ObservedHost, ops: Iterable[HostOp]) -> ObservedHost:
    """The host as it is known, once removals have been carried out, without another look.

    Args:
        observed: The host that the plan was made from.
        ops: Those that were done; any but removals are of no account here.
    """
    given = tuple(ops)
    names = {one.namespace for one in given if isinstance(one, DeleteNamespace)}
    links = {one.link for one in given if isinstance(one, DeleteLink)}
    bare = {
        (one.namespace, one.device, one.address) for one in given if isinstance(one, RemoveAddress)
    }
    if not (names or links or bare):
        return observed

    def strip(name: str | None, seen: ObservedNamespace) -> ObservedNamespace:
        kept = tuple(a for a in seen.addresses if (name, a.device, a.address) not in bare)
        return seen if len(kept) == len(seen.addresses) else replace(seen, addresses=kept)

    root = strip(None, observed.root)
    if links:
        devices = {name: one for name, one in root.devices.items() if name not in links}
        root = replace(root, devices=devices)
    return replace(
        observed,
        root=root,
        namespaces={n: strip(n, seen) for n, seen in observed.namespaces.items() if n not in names},
        half_made=observed.half_made - names,
    )
