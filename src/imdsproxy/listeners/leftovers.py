"""What is ours on the host and belongs to no network any more."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import TypeAlias

from imdsproxy.core.endpoints import LOOPBACK
from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hoststate import ObservedHost, ObservedNamespace
from imdsproxy.core.model import (
    BridgeListener,
    InterfaceListener,
    Listener,
    NamespaceListener,
    Network,
)
from imdsproxy.listeners.bridges import is_unmarked_veth
from imdsproxy.listeners.ops import DeleteLink, DeleteNamespace, HostOp, RemoveAddress

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
    loopback = seen.devices.get(LOOPBACK)
    alias = loopback.alias if loopback is not None else ""
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
