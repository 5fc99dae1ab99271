"""What imdsproxy wants of HAProxy, as values, before any of it is text.

`DataplaneSpec` is everything that shapes the configuration file: where to bind, which processes stand
behind, how large things may grow. Records are not in it: they live in maps and change without a reload.
"""

from __future__ import annotations

from dataclasses import dataclass

from imdsproxy.core.model import IpAddress, NetworkId

__all__ = ["Bind", "DataplaneSpec", "Limits", "Paths", "Section", "Words"]

Words = tuple[str, ...]
"""One configuration line as unquoted words."""


@dataclass(frozen=True, slots=True)
class Section:
    """A section of the file: its header line and the lines below it."""

    header: Words
    lines: tuple[Words, ...]


@dataclass(frozen=True, slots=True, order=True)
class Bind:
    """One listening socket for one network.

    Attributes:
        network: Becomes the bind's `name`, which is what identifies the network in every request.
        address: The metadata address of either family.
        port: TCP port, 80 for guests.
        device: `SO_BINDTODEVICE`; needed for link-local IPv6, since a `%DEV` scope is refused.
        namespace: The name that HAProxy resolves below `/var/run/netns`, or `None` for the host's own.
    """

    network: NetworkId
    address: IpAddress
    port: int
    device: str | None = None
    namespace: str | None = None


@dataclass(frozen=True, slots=True)
class Paths:
    """Files and sockets that the configuration names, as the reading process sees them.

    `documents` and `resolver` are looked up by the worker inside `jail`, everything else before it
    enters.
    """

    base_map: str
    overlay_map: str
    unavailable: str
    probe: str
    jail: str | None
    documents: tuple[str, ...]
    resolver: str


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes and times.

    Attributes:
        maxconn: Connections of the whole process.
        maxconn_per_network: Connections of each bind, so that one network cannot use up the others'.
        cache_mb: Size of the document cache in MiB (at most 4095).
        max_object_bytes: Largest document that is cached.
        hold_s: How long the resolver may hold a request, in seconds.
        misses_per_second: Unknown addresses per network and second that may reach Python.
        hard_stop_after_s: How long an old worker may go on serving open connections.
    """

    nbthread: int = 1
    maxconn: int = 4096
    maxconn_per_network: int = 256
    cache_mb: int = 64
    max_object_bytes: int = 17 * 1024 * 1024
    hold_s: float = 5.0
    misses_per_second: int = 200
    hard_stop_after_s: int = 30


@dataclass(frozen=True, slots=True)
class DataplaneSpec:
    """Everything that the configuration file is a function of."""

    binds: tuple[Bind, ...]
    paths: Paths
    limits: Limits = Limits()
    user: str | None = None
    group: str | None = None
    exporter: str | None = None
