"""Configuration of HAProxy as values, before it is rendered as text.

`DataplaneSpec` holds everything that determines the configuration file: binds, the processes behind HAProxy, and sizes.
Records are not in it: they are in maps and change without a reload.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from imdsproxy.model.entities import IpAddress, NetworkId

CHECKED: Final = ".checked"
"""Suffix of a backend that checks a request (`access_rules.cfg`) and otherwise equals the backend without it."""

SAMPLED: Final = ".sampled"
"""Suffix of a backend that counts a read (`counting`) and otherwise equals the backend without it."""


@dataclass(frozen=True, slots=True, order=True)
class Bind:
    """Listening socket for one network.

    Attributes:
        network: Becomes the bind's `name`, which identifies the network in every request.
        port: TCP port, 80 for guests that are not redirected.
        device: `SO_BINDTODEVICE`; needed for link-local IPv6, since a `%DEV` scope is refused.
        namespace: Name that HAProxy resolves below `/var/run/netns`, or `None` for the host's own.
    """

    network: NetworkId
    address: IpAddress
    port: int
    device: str | None = None
    namespace: str | None = None


@dataclass(frozen=True, slots=True)
class Paths:
    """Files and sockets in the configuration, as paths of the process that opens them.

    The worker opens the paths in its root directory after `chroot`, all others before it.

    Attributes:
        named: Paths by their names in templates, which are the names in `haproxy.layout`.
        documents: Sockets of the document server's workers.
        chroot: Whether the worker's root directory is `jail`, which holds its sockets, including those from HAProxy to
            itself.
    """

    named: Mapping[str, str]
    documents: tuple[str, ...]
    chroot: bool


def count_namespaces(binds: Iterable[Bind]) -> int:
    """Return the number of network namespaces that HAProxy holds open for its binds."""
    return len({bind.namespace for bind in binds if bind.namespace is not None})


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes and times.

    Attributes:
        maxconn_per_network: Connections of each bind, so that one network cannot use up the others'.
        hold_s: Maximum time for which the resolver may hold a request, in seconds.
        misses_per_second: Unknown addresses per network and second that may reach Python.
        hard_stop_after_s: Time after which an old worker closes its remaining connections, in seconds.
        fair: Whether to count the requests of each instance; if false, the next three limits have no effect.
        requests_per_s: Requests of one instance, on average; this limit and the next two are defaults that a policy
            overrides.
        burst: Requests of one instance at once.
        connections: Connections of one instance at once; behind the unix listener, requests.
        body_bytes: Longest body that HAProxy forwards to Nova.
    """

    nbthread: int = 1
    maxconn: int = 4096
    maxconn_per_network: int = 256
    cache_mb: int = 64
    max_object_bytes: int = 17 * 1024 * 1024
    hold_s: float = 5.0
    misses_per_second: int = 200
    hard_stop_after_s: int = 30
    fair: bool = False
    requests_per_s: int = 100
    burst: int = 4000
    connections: int = 160
    body_bytes: int = 1024 * 1024


@dataclass(frozen=True, slots=True)
class NovaServer:
    """Address of one of Nova's metadata APIs.

    `slot` is the index of the record's signature for it: 0 for the secret in force, 1 for the next secret.
    """

    address: IpAddress
    port: int
    slot: int = 0

    @property
    def authority(self) -> str:
        """Host and port: `10.0.0.5:8775`, `[2001:db8::5]:8775`."""
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)  # noqa: PLR2004 - IP version
        return f"{host}:{self.port}"

    @property
    def name(self) -> str:
        """Name in HAProxy's counters: `10.0.0.5:8775`, `2001:db8::5-8775`; a name may hold no bracket."""
        return f"{self.address}{'-' if self.address.version == 6 else ':'}{self.port}"  # noqa: PLR2004 - IP version


@dataclass(frozen=True, slots=True)
class NovaTls:
    """TLS settings for https endpoints.

    Attributes:
        name: Server name for SNI and for the verification of certificates.
        ca: File of the authorities, or `@system-ca`.
        contents: Digest of these files' contents. HAProxy reads the files when it loads, so changed contents under the
            same names are another configuration.
    """

    name: str
    ca: str = "@system-ca"
    verify: bool = True
    client: str | None = None
    contents: str | None = None


@dataclass(frozen=True, slots=True)
class NovaBackend:
    """Endpoint set in HAProxy's configuration.

    Attributes:
        name: Name of the set; the records of its instances begin with it.
        servers: Empty while no endpoint's name resolves: guests get 503.
        loopback: Whether to keep the loopback through HAProxy itself although it is not needed: an earlier worker may
            still use it.
    """

    name: str
    servers: tuple[NovaServer, ...]
    host: str
    tls: NovaTls | None = None
    loopback: bool = False


@dataclass(frozen=True, slots=True)
class NovaTimes:
    """Deadlines of requests to Nova, in seconds, and the health check: a connection, `GET /`, or failed requests."""

    connect_s: float = 2.0
    response_s: float = 30.0
    check: Literal["tcp", "http", "off"] = "http"
    check_interval_s: float = 5.0


@dataclass(frozen=True, slots=True)
class UnixBind:
    """The listener `unix`: Neutron's agent protocol on a socket, with its mode as `0644`, uid and gid."""

    path: str
    mode: str
    user: int
    group: int
    maxconn: int = 1024


@dataclass(frozen=True, slots=True)
class IssuerFrontend:
    """Frontend for the documents of an issuer of identity tokens.

    Attributes:
        contents: Digest of all files: HAProxy reads them when it loads.
    """

    listen: str
    certificate: str
    contents: str
    documents: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, slots=True)
class DataplaneSpec:
    """Complete input of the configuration file.

    Attributes:
        binds: Binds whose guests are identified by their address: MACs are not checked there, or a MAC filter checks
            them.
        unverified: Binds whose requests all go to the resolver (`network.anti_spoofing.plan`).
        count_reads: Sampling rate of reads without a token where none is required: one in so many is counted; 0 for
            none.
        audit: Sampling rate of the audit log: one in so many requests has a line; 0 for none.
        identity: Whether guests may request identity tokens.
        fleet: Whether instances of a fleet, which have token keys of their own, may be on this host.
    """

    binds: tuple[Bind, ...]
    paths: Paths
    limits: Limits = Limits()
    user: str | None = None
    group: str | None = None
    exporter: str | None = None
    nova: tuple[NovaBackend, ...] = ()
    nova_times: NovaTimes = NovaTimes()
    unix: UnixBind | None = None
    unverified: tuple[Bind, ...] = ()
    watched: bool = False
    count_reads: int = 0
    audit: int = 0
    identity: bool = False
    issuer: IssuerFrontend | None = None
    fleet: bool = False
