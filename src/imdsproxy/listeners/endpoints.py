"""From one namespace as observed to what HAProxy can bind there, and which networks are configured and not served."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address

from imdsproxy.core.endpoints import LOOPBACK, Endpoint, Foreign, LeftOut, LeftOutCode
from imdsproxy.core.hoststate import (
    AddressState,
    Effect,
    Family,
    ListeningSocket,
    ObservedAddress,
    ObservedNamespace,
)
from imdsproxy.core.model import METADATA_PORT, Network, NetworkId
from imdsproxy.listeners.ops import HostOp

_NO_ADDRESS = frozenset({LeftOutCode.ADDRESS_MISSING, LeftOutCode.ADDRESS_ON_LOOPBACK})


@dataclass(frozen=True, slots=True)
class ListenerPlan:
    """What to do for a network, or for all of them in the order of their ids.

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

    def __add__(self, other: ListenerPlan) -> ListenerPlan:
        return ListenerPlan(
            self.endpoints + other.endpoints,
            self.left_out + other.left_out,
            self.foreign + other.foreign,
            self.ops + other.ops,
        )


def leave_out(
    network: NetworkId,
    code: LeftOutCode,
    reason: str,
    hint: str = "",
    *,
    family: Family | None = None,
) -> ListenerPlan:
    """A part that only says why there is nothing."""
    return ListenerPlan(left_out=(LeftOut(network, family, code, reason, hint),))


def listen(
    network: NetworkId,
    seen: ObservedNamespace,
    family: Family,
    *,
    device: str | None,
    managed: bool,
) -> ListenerPlan:
    """Endpoints for one family in a namespace that was observed.

    IPv4 is bound to `device` if one is given and to every device else. IPv6 is always bound to a
    device: to each one but `lo` that carries the address (link-local on `lo` cannot be reached).

    Args:
        network: Whose listener it is.
        seen: The namespace.
        family: Which of the two metadata addresses.
        device: The device that the listener names, if it does.
        managed: We put the address there ourselves, so a missing one is pending.
    """
    carriers = _carriers(seen, family, device)
    if not carriers:
        return _missing(network, seen, family, device, managed=managed)
    unusable = [one for one in carriers if one.state is not AddressState.USABLE]
    usable = [one for one in carriers if one.state is AddressState.USABLE]
    if not usable:
        return _not_usable(network, family, unusable[0])
    if family is Family.IPV4:
        return _bind(network, seen, family, device)
    part = ListenerPlan()
    for carrier in dict.fromkeys(one.device for one in usable):
        part += _bind(network, seen, family, carrier)
    # One device that serves is a listener that serves: sockets on the others are still reported.
    if part.endpoints:
        return ListenerPlan(part.endpoints, foreign=part.foreign)
    return ListenerPlan(left_out=part.left_out[:1], foreign=part.foreign)


def _carriers(seen: ObservedNamespace, family: Family, device: str | None) -> list[ObservedAddress]:
    found = [one for one in seen.addresses if one.address == family.metadata_address]
    if family is Family.IPV4:
        return found
    return [one for one in found if one.device != LOOPBACK and device in (None, one.device)]


def _missing(
    network: NetworkId,
    seen: ObservedNamespace,
    family: Family,
    device: str | None,
    *,
    managed: bool,
) -> ListenerPlan:
    address = family.metadata_address
    where = f"on device {device}" if device else "on any device"
    if managed:
        reason = f"{address} is being added {where}"
        return leave_out(network, LeftOutCode.PENDING, reason, family=family)
    if any(one.address == address and one.device == LOOPBACK for one in seen.addresses):
        return leave_out(
            network,
            LeftOutCode.ADDRESS_ON_LOOPBACK,
            f"{address} is on lo, where no guest can reach it",
            "put it on the device that leads to the guests, with nodad",
            family=family,
        )
    return leave_out(
        network,
        LeftOutCode.ADDRESS_MISSING,
        f"{address} is not {where}",
        "add it, or name a device and set manage_addresses",
        family=family,
    )


def _not_usable(network: NetworkId, family: Family, address: ObservedAddress) -> ListenerPlan:
    if address.state is AddressState.DUPLICATE:
        return leave_out(
            network,
            LeftOutCode.ADDRESS_DUPLICATE,
            f"{address.address} on {address.device} is also used by another host of the link",
            "take it away there, then add it here again, with nodad",
            family=family,
        )
    return leave_out(
        network,
        LeftOutCode.ADDRESS_TENTATIVE,
        f"{address.address} on {address.device} is still tentative",
        "add it with nodad",
        family=family,
    )


def _bind(
    network: NetworkId, seen: ObservedNamespace, family: Family, device: str | None
) -> ListenerPlan:
    foreign = tuple(_foreign(network, seen, family, device))
    error = next(
        (one.error for one in seen.trials if (one.family, one.device) == (family, device)), 0
    )
    if error == errno.EADDRINUSE:
        return _busy(network, family, foreign)
    if error:
        name = errno.errorcode.get(error, str(error))
        reason = f"the kernel refuses to bind {family.metadata_address}: {name}"
        left = leave_out(network, LeftOutCode.BIND_REFUSED, reason, family=family)
        return ListenerPlan(left_out=left.left_out, foreign=foreign)
    bound_to = seen.devices.get(device) if device is not None else None
    endpoint = Endpoint(
        network=network,
        address=family.metadata_address,
        port=METADATA_PORT,
        device=device,
        namespace=seen.ref,
        device_index=0 if bound_to is None else bound_to.index,
    )
    return ListenerPlan(endpoints=(endpoint,), foreign=foreign)


def _busy(network: NetworkId, family: Family, foreign: tuple[Foreign, ...]) -> ListenerPlan:
    blocking = tuple(Foreign(one.network, one.family, Effect.BLOCKS, one.socket) for one in foreign)
    left = LeftOut(
        network,
        family,
        LeftOutCode.PORT_BUSY,
        f"{family.metadata_address} port {METADATA_PORT} is in use by {owners_of(one.socket for one in blocking)}",
        "stop it; the listener comes back within a second",
        tuple(one.socket for one in blocking),
    )
    return ListenerPlan(left_out=(left,), foreign=blocking)


def owners_of(sockets: Iterable[ListeningSocket]) -> str:
    """The programs that hold the sockets, with their pids."""
    names = sorted({f"{who.command} (pid {who.pid})" for one in sockets for who in one.owners})
    return " and ".join(names) or "a program that cannot be seen from here"


def _foreign(
    network: NetworkId, seen: ObservedNamespace, family: Family, device: str | None
) -> Iterator[Foreign]:
    for one in seen.sockets:
        if one.ours:
            continue
        effect = effect_of(one, family, device)
        if effect is not None:
            yield Foreign(network, family, effect, one)


def effect_of(other: ListeningSocket, family: Family, device: str | None) -> Effect | None:
    """The effect on ours of a foreign socket that root bound with SO_REUSEPORT; `None`: none.

    The kernel looks for listeners of the exact address before it looks at wildcards. Among those of
    one address it takes the first that it finds, however precisely that is bound to a device
    (inet_lhash2_lookup leaves its scores alone for SO_REUSEPORT). Whether a socket has SO_REUSEPORT
    at all cannot be read: the trial bind says so.
    """
    if not _covers(other, family):
        return None
    if device is not None and other.device not in (None, device):
        return None
    return Effect.YIELDS if other.address.is_unspecified else Effect.SHARES


def _covers(other: ListeningSocket, family: Family) -> bool:
    if not other.address.is_unspecified:
        return other.address == family.metadata_address
    if isinstance(other.address, IPv4Address):
        return family is Family.IPV4
    return family is Family.IPV6 or not other.v6_only


def find_degraded(
    networks: Mapping[NetworkId, Network],
    contradictory: Iterable[NetworkId],
    endpoints: Iterable[Endpoint],
    left_out: Iterable[LeftOut],
    foreign: Iterable[Foreign],
) -> tuple[LeftOut, ...]:
    """Networks whose guests get no answer, or another program's, over a family that they use; by id.

    A network that one family serves need not have the address of the other one: a router's namespace often has
    none for IPv6. IPv4 may be missing where all its subnets are IPv6.

    Args:
        networks: Those with a listener.
        contradictory: Those that have none because sources differ on it.
        endpoints: What HAProxy listens on.
        left_out: What it cannot listen on.
        foreign: Who else listens there.
    """
    served: dict[NetworkId, set[int]] = {}
    for endpoint in endpoints:
        served.setdefault(endpoint.network, set()).add(endpoint.address.version)
    found = [
        one
        for one in left_out
        if one.code not in _NO_ADDRESS or _needs(networks, one, served.get(one.network, set()))
    ]
    found += [_shared(one) for one in foreign if one.effect is Effect.SHARES]
    differ = "sources give it different listeners"
    mend = "leave it in one source only, or make its records equal"
    code = LeftOutCode.NETWORK_CONFLICT
    found += [LeftOut(network, None, code, differ, mend) for network in contradictory]
    known = served.keys() | {one.network for one in found}
    coming, code = "HAProxy does not listen there yet", LeftOutCode.PENDING
    found += [
        LeftOut(network, None, code, coming, "imdsproxy status")
        for network in networks.keys() - known
    ]
    return tuple(sorted(found, key=lambda one: one.network))


def _needs(networks: Mapping[NetworkId, Network], missing: LeftOut, served: set[int]) -> bool:
    """Whether guests need the family whose address is missing."""
    network = networks.get(missing.network)
    if not served or network is None or missing.family is None:
        return True
    if missing.family is Family.IPV6:
        return False
    versions = {subnet.cidr.version for subnet in network.subnets}
    return versions != {Family.IPV6.value}


def _shared(foreign: Foreign) -> LeftOut:
    socket = foreign.socket
    return LeftOut(
        foreign.network,
        foreign.family,
        LeftOutCode.FOREIGN_LISTENER,
        f"{owners_of([socket])} also listens on {socket.address} port {socket.port}: guests may get its answers",
        "end it",
        (socket,),
    )
