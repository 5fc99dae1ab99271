"""Endpoints that HAProxy can bind in an observed namespace, and its binds. Pure."""

import errno
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from ipaddress import IPv4Address
from typing import Final

from imdsproxy.errors import HostRefused
from imdsproxy.haproxy.rules.model import Bind, count_namespaces
from imdsproxy.host.state import (
    REDIRECTED,
    AddressState,
    Effect,
    Family,
    ListeningSocket,
    ObservedNamespace,
)
from imdsproxy.model.entities import METADATA_PORT, IpAddress, Network, NetworkId
from imdsproxy.model.wire import REDIRECTED_PORT
from imdsproxy.network.planned import (
    LOOPBACK,
    Endpoint,
    Foreign,
    NotServed,
    NotServedCode,
)

_NO_ADDRESS = frozenset({NotServedCode.ADDRESS_MISSING, NotServedCode.ADDRESS_ON_LOOPBACK})


def listen(
    network: NetworkId,
    seen: ObservedNamespace,
    family: Family,
    *,
    device: str | None,
    managed: bool,
) -> Iterator[Endpoint | NotServed | Foreign]:
    """Yield the endpoints for one family in an observed namespace.

    IPv4 is bound to `device` if given, else to every device. IPv6 is always bound to a device: to each device with
    the address except `lo` (a link-local address on `lo` cannot be reached).

    Args:
        managed: Whether imdsproxy adds the address itself, so that a missing address is pending.
    """
    carriers = [one for one in seen.addresses if one.address == family.metadata_address]
    on_loopback = any(one.device == LOOPBACK for one in carriers)
    if family is Family.IPV6:
        reachable = (one for one in carriers if one.device != LOOPBACK)
        carriers = [one for one in reachable if device in (None, one.device)]
    usable = [one for one in carriers if one.state is AddressState.USABLE]
    if not usable:
        where, code = f"on device {device}" if device else "on any device", NotServedCode.PENDING
        if carriers:
            where, code = carriers[0].device, NotServedCode(f"address-{carriers[0].state.value}")
        elif not managed:
            code = (
                NotServedCode.ADDRESS_ON_LOOPBACK if on_loopback else NotServedCode.ADDRESS_MISSING
            )
        text, hint = _UNUSABLE[code]
        yield NotServed(network, family, code, text.format(family.metadata_address, where), hint)
        return
    devices = [device] if family is Family.IPV4 else dict.fromkeys(one.device for one in usable)
    found = [one for name in devices for one in _bind(network, seen, family, name)]
    # A listener is served if one device serves it. Foreign sockets on the other devices are still reported.
    not_served = [one for one in found if isinstance(one, NotServed)]
    served = any(isinstance(one, Endpoint) for one in found)
    yield from () if served else not_served[:1]
    yield from (one for one in found if not isinstance(one, NotServed))


def listen_redirected(
    network: NetworkId, seen: ObservedNamespace, family: Family
) -> Iterator[Endpoint | NotServed | Foreign]:
    """Yield the endpoints for one family in a namespace whose rules redirect requests to a port of ours.

    While our rules exist, processes on the ports that other programs' rules redirect to get no requests.
    """
    others = [
        Foreign(network, family, effect, one)
        for one in seen.sockets
        if not one.ours and (effect := effect_of(one, family, None)) is not None
    ]
    error = seen.trials.get((family, REDIRECTED), 0)
    if error in _NO_FAMILY:
        reason = f"the kernel has no IPv{family.value} there"
        yield NotServed(network, family, NotServedCode.ADDRESS_MISSING, reason)
    elif error:
        at = (family.any_address, REDIRECTED_PORT)
        yield _refused(network, family, error, others, at)
    else:
        yield Endpoint(network, family.any_address, REDIRECTED_PORT, None, seen.ref)
    yield from others


_NO_FAMILY: Final = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)

_UNUSABLE: Final = {
    NotServedCode.PENDING: ("imdsproxy is adding {} {}", ""),
    NotServedCode.ADDRESS_TENTATIVE: ("{} on {} is still tentative", "add the address with nodad"),
    NotServedCode.ADDRESS_DUPLICATE: (
        "{} on {} is also used by another host of the link",
        "remove the address there, then add it here again, with nodad",
    ),
    NotServedCode.ADDRESS_ON_LOOPBACK: (
        "{} is on lo, where no guest can reach it",
        "add the address to the device that leads to the guests, with nodad",
    ),
    NotServedCode.ADDRESS_MISSING: (
        "{} is not {}",
        "add the address, or name a device and set manage_addresses",
    ),
}
"""Reason, as a format of address and place, and hint for an address that cannot be bound."""


def _bind(
    network: NetworkId, seen: ObservedNamespace, family: Family, device: str | None
) -> Iterator[Endpoint | NotServed | Foreign]:
    address = family.metadata_address
    others = [
        Foreign(network, family, effect, one)
        for one in seen.sockets
        if not one.ours and (effect := effect_of(one, family, device)) is not None
    ]
    error = seen.trials.get((family, device), 0)
    if error == errno.EADDRINUSE:
        others = [replace(one, effect=Effect.BLOCKS) for one in others]
    if error:
        yield _refused(network, family, error, others, (address, METADATA_PORT))
    else:
        bound_to = seen.devices.get(device or "")
        index = 0 if bound_to is None else bound_to.index
        yield Endpoint(network, address, METADATA_PORT, device, seen.ref, index)
    yield from others


def _refused(
    network: NetworkId,
    family: Family,
    error: int,
    others: Iterable[Foreign],
    at: tuple[IpAddress, int],
) -> NotServed:
    address, port = at
    if error != errno.EADDRINUSE:
        name = errno.errorcode.get(error, str(error))
        reason = f"the kernel refuses to bind {address}: {name}"
        return NotServed(network, family, NotServedCode.BIND_REFUSED, reason)
    sockets = tuple(one.socket for one in others if one.socket.port == port)
    reason = f"{address} port {port} is in use by {owners_of(sockets)}"
    hint = "stop that program: the listener comes back within a second"
    return NotServed(network, family, NotServedCode.PORT_BUSY, reason, hint, sockets)


def owners_of(sockets: Iterable[ListeningSocket]) -> str:
    names = sorted({f"{who.command} (pid {who.pid})" for one in sockets for who in one.owners})
    return " and ".join(names) or "a program that is not visible from here"


def effect_of(other: ListeningSocket, family: Family, device: str | None) -> Effect | None:
    """Return the effect on our socket of a foreign socket that root bound with SO_REUSEPORT; `None` for no effect.

    The kernel looks for listeners of the exact address before wildcards. Among listeners of the same address, it takes
    the first that it finds, even if another is bound more precisely to a device (inet_lhash2_lookup ignores its scores
    for SO_REUSEPORT). Whether a socket has SO_REUSEPORT cannot be read; only a trial bind shows it.
    """
    address = other.address
    if not address.is_unspecified:
        covers = address == family.metadata_address
    elif isinstance(address, IPv4Address):
        covers = family is Family.IPV4
    else:
        covers = family is Family.IPV6 or not other.v6_only
    if not covers or (device is not None and other.device not in (None, device)):
        return None
    if other.port == REDIRECTED_PORT:
        return Effect.SHARES
    return Effect.YIELDS if address.is_unspecified else Effect.SHARES


def find_degraded(
    networks: Mapping[NetworkId, Network],
    contradictory: Iterable[NetworkId],
    endpoints: Iterable[Endpoint],
    not_served: Iterable[NotServed],
    foreign: Iterable[Foreign],
) -> tuple[NotServed, ...]:
    """Return networks whose guests get no answer, or another program's, over a family that they use; sorted by id.

    A network served over IPv4 does not need the IPv6 address: a router's namespace often has none. A network served
    over IPv6 does not need the IPv4 address if all its subnets are IPv6.

    Args:
        contradictory: Networks without a listener because sources contradict each other.
    """
    served: dict[NetworkId, set[int]] = {}
    for endpoint in endpoints:
        served.setdefault(endpoint.network, set()).add(endpoint.address.version)
    found = [
        one
        for one in not_served
        if one.code not in _NO_ADDRESS or _needs(networks, one, served.get(one.network, set()))
    ]
    found += [_shared(one) for one in foreign if one.effect is Effect.SHARES]
    differ = "sources give the network different listeners"
    mend = "keep the network in one source only, or make its records equal"
    code = NotServedCode.NETWORK_CONFLICT
    found += [NotServed(network, None, code, differ, mend) for network in contradictory]
    known = served.keys() | {one.network for one in found}
    coming, code = "HAProxy does not listen there yet", NotServedCode.PENDING
    found += [
        NotServed(network, None, code, coming, "imdsproxy status")
        for network in networks.keys() - known
    ]
    return tuple(sorted(found, key=lambda one: one.network))


def _needs(networks: Mapping[NetworkId, Network], missing: NotServed, served: set[int]) -> bool:
    network = networks.get(missing.network)
    if not served or network is None or missing.family is None:
        return True
    if missing.family is Family.IPV6:
        return False
    versions = {subnet.cidr.version for subnet in network.subnets}
    return versions != {Family.IPV6.value}


def _shared(foreign: Foreign) -> NotServed:
    socket = foreign.socket
    return NotServed(
        foreign.network,
        foreign.family,
        NotServedCode.FOREIGN_LISTENER,
        f"{owners_of([socket])} also listens on {socket.address} port {socket.port}: guests may get its answers",
        "end that program",
        (socket,),
    )


_RESERVED_DESCRIPTORS = 256
"""Descriptors for HAProxy itself: logs, pipes, sockets to itself and to its master."""

_LEAST_CONNECTIONS = 64
"""Minimum number of connections; a lower limit is reported."""

_MASTER_SOCKETS = 16
"""Connections that make room for the master's sockets beside its namespaces."""

_OWN_NAMESPACE = "/proc/self/ns/net"
"""Link target for binds in the host's own namespace."""


def link_name(endpoint: Endpoint) -> str | None:
    """Return a link name that changes if the namespace or device was deleted and created again under the same name.

    HAProxy hands listening sockets to its next worker by name. Inode and index distinguish a new namespace or device
    from the deleted one. `None` for the host's own namespace without a device.
    """
    namespace, index = endpoint.namespace, endpoint.device_index
    if namespace is None:
        return f"host@0.{index}" if index else None
    return f"{namespace.name}@{namespace.inode}" + (f".{index}" if index else "")


def plan_links(endpoints: Iterable[Endpoint], directory: str) -> dict[str, str]:
    """Return the symbolic links that HAProxy needs at every load: link name to path."""
    return {
        name: _OWN_NAMESPACE if one.namespace is None else f"{directory}/{one.namespace.name}"
        for one in endpoints
        if (name := link_name(one)) is not None
    }


def plan_binds(endpoints: Iterable[Endpoint], links: str) -> tuple[Bind, ...]:
    """Return a bind for each endpoint.

    Args:
        links: Directory of the links of `plan_links`, relative to `/var/run/netns`.
    """
    named = ((one, link_name(one)) for one in endpoints)
    return tuple(
        Bind(one.network, one.address, one.port, one.device, name and f"{links}/{name}")
        for one, name in named
    )


def compute_maxconn(wanted: int, binds: Collection[Bind], hard_limit: int) -> int:
    """Compute `maxconn` from the setting and the limit on open files.

    HAProxy needs two descriptors per connection (guest and server), one per bind and one per network namespace. It
    refuses to start if the sum exceeds the hard limit. Its master does not count the namespaces, and exits if a
    descriptor number of its sockets exceeds those that its connections allow.

    Raises:
        HostRefused: The limit is too low for these binds.
    """
    namespaces = count_namespaces(binds)
    preferred = wanted or min(65_536, max(4_096, len(binds) * 8))
    least = max(namespaces // 2 + _MASTER_SOCKETS, min(preferred, _LEAST_CONNECTIONS))
    if hard_limit < 0:
        return max(preferred, least)
    fixed = len(binds) + namespaces + _RESERVED_DESCRIPTORS
    possible = (hard_limit - fixed) // 2
    if possible < least:
        needed = 2 * least + fixed
        raise HostRefused(
            f"the limit on open files (RLIMIT_NOFILE) is {hard_limit}; HAProxy needs at least {needed} "
            f"for {len(binds)} listening sockets in {namespaces} network namespaces",
            hint="raise LimitNOFILE= of imdsproxy and imdsproxy-haproxy, or `ulimit -Hn` without systemd",
        )
    return min(max(preferred, least), possible)


def networks_of(endpoints: Iterable[Endpoint]) -> frozenset[NetworkId]:
    return frozenset(endpoint.network for endpoint in endpoints)
