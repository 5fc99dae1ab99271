"""Networks that are configured and not served: the one decision that all reports are made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from imdsproxy.core.endpoints import Endpoint, Foreign, LeftOut, LeftOutCode
from imdsproxy.core.hoststate import Effect, Family
from imdsproxy.core.model import Network, NetworkId
from imdsproxy.listeners.endpoints import owners_of

_NO_ADDRESS = frozenset({LeftOutCode.ADDRESS_MISSING, LeftOutCode.ADDRESS_ON_LOOPBACK})


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
    found += [_contradictory(network) for network in contradictory]
    known = served.keys() | {one.network for one in found}
    found += [_coming(network) for network in networks.keys() - known]
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


def _contradictory(network: NetworkId) -> LeftOut:
    return LeftOut(
        network,
        None,
        LeftOutCode.NETWORK_CONFLICT,
        "sources give it different listeners",
        "leave it in one source only, or make its records equal",
    )


def _coming(network: NetworkId) -> LeftOut:
    return LeftOut(
        network, None, LeftOutCode.PENDING, "HAProxy does not listen there yet", "imdsproxy status"
    )
