"""From endpoints to HAProxy's binds, the links to namespaces that they need, and `maxconn`."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from imdsproxy.core.endpoints import Endpoint
from imdsproxy.core.haproxy.model import Bind, count_namespaces
from imdsproxy.core.hoststate import NamespaceRef
from imdsproxy.core.model import NetworkId
from imdsproxy.errors import HostRefused

_RESERVED_DESCRIPTORS = 256
"""HAProxy's own: logs, pipes, its sockets to itself and to its master."""

_LEAST_CONNECTIONS = 64
"""Fewer than these are no service: a limit that leaves no more is reported."""

_MASTER_SOCKETS = 16
"""Connections that make room for the sockets of the master beside its namespaces."""

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


def compute_maxconn(wanted: int, binds: Collection[Bind], hard_limit: int) -> int:
    """The `maxconn` for the setting, as the limit on open files allows.

    HAProxy needs two descriptors a connection (the guest's and the server's), one a bind and one a network namespace,
    and refuses to start when that is more than the hard limit. Its master counts none for namespaces, and ends when its
    sockets have higher numbers than its connections alone could have.

    Args:
        wanted: The setting, 0 to have it computed.
        binds: All listening sockets.
        hard_limit: `RLIMIT_NOFILE`'s hard value, -1 for none.

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
    """The networks that have at least one endpoint."""
    return frozenset(endpoint.network for endpoint in endpoints)
