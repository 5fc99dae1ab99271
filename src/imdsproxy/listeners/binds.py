"""From endpoints to HAProxy's binds, the links to namespaces that they need, and `maxconn`."""

from __future__ import annotations

from collections.abc import Iterable

from imdsproxy.core.endpoints import Endpoint
from imdsproxy.core.haproxy.model import Bind
from imdsproxy.core.hoststate import NamespaceRef
from imdsproxy.core.model import NetworkId

_RESERVED_DESCRIPTORS = 256
"""HAProxy's own: logs, pipes, the sockets of an old worker being taken over."""

_OWN_NAMESPACE = "/proc/self/ns/net"
"""Target of a link for binds in the host's own namespace."""


def link_name(namespace: NamespaceRef | None, device_index: int = 0) -> str:
    """A name that changes when the namespace or the device is another one under the same name.

    HAProxy hands listening sockets to its next worker by name, also those of a namespace or device that
    was deleted and made again; inode and index distinguish them.

    Args:
        namespace: `None` for the host's own.
        device_index: Of the device that is bound to, 0 without one.
    """
    place = "host@0" if namespace is None else f"{namespace.name}@{namespace.inode}"
    return f"{place}.{device_index}" if device_index else place


def _needs_link(endpoint: Endpoint) -> bool:
    return endpoint.namespace is not None or endpoint.device_index != 0


def plan_links(endpoints: Iterable[Endpoint]) -> dict[str, str]:
    """The symbolic links that HAProxy needs at every load: link name to namespace name or path."""
    return {
        link_name(endpoint.namespace, endpoint.device_index): _OWN_NAMESPACE
        if endpoint.namespace is None
        else endpoint.namespace.name
        for endpoint in endpoints
        if _needs_link(endpoint)
    }


def plan_binds(endpoints: Iterable[Endpoint], links: str) -> tuple[Bind, ...]:
    """One bind for each endpoint.

    Args:
        endpoints: What can be bound now.
        links: The directory of `plan_links`, as seen from `/var/run/netns`.
    """
    return tuple(
        Bind(
            network=endpoint.network,
            address=endpoint.address,
            port=endpoint.port,
            device=endpoint.device,
            namespace=f"{links}/{link_name(endpoint.namespace, endpoint.device_index)}"
            if _needs_link(endpoint)
            else None,
        )
        for endpoint in endpoints
    )


def compute_maxconn(wanted: int, binds: int, hard_limit: int) -> int:
    """The largest `maxconn` that HAProxy starts with.

    HAProxy refuses to start when `maxconn` needs more descriptors than the hard limit: a connection
    takes two (the guest's and the server's), each bind one, and a reload holds the old ones as well.

    Args:
        wanted: The setting, 0 to have it computed.
        binds: Listening sockets.
        hard_limit: `RLIMIT_NOFILE`'s hard value, -1 for none.
    """
    preferred = wanted or min(65_536, max(4_096, binds * 8))
    if hard_limit < 0:
        return preferred
    possible = max(64, (hard_limit - 2 * binds - _RESERVED_DESCRIPTORS) // 2)
    return min(preferred, possible)


def networks_of(endpoints: Iterable[Endpoint]) -> frozenset[NetworkId]:
    """The networks that have at least one endpoint."""
    return frozenset(endpoint.network for endpoint in endpoints)
