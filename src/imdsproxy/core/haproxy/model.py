"""What imdsproxy wants of HAProxy, as values, before any of it is text.

`DataplaneSpec` is everything that shapes the configuration file: where to bind, which processes stand
behind, how large things may grow. Records are not in it: they live in maps and change without a reload.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from imdsproxy.core.model import IpAddress, NetworkId

CHECKED: Final = ".checked"
"""How a backend's name ends that checks a request (`access_rules.cfg`) before it does what the other one does."""

SAMPLED: Final = ".sampled"
"""How a backend's name ends that counts a read (`counting`) before it does what the other one does."""


@dataclass(frozen=True, slots=True, order=True)
class Bind:
    """One listening socket for one network.

    Attributes:
        network: Becomes the bind's `name`, which is what identifies the network in every request.
        address: The metadata address of either family, or the one for every address.
        port: TCP port, 80 for guests that are not redirected.
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

    What is in the worker's root directory is looked up by the worker inside it, everything else before it enters.

    Attributes:
        named: By the names that templates have for them, which are those of `dataplane.layout`.
        documents: The sockets of the document server's workers.
        chroot: The worker's root directory is `jail`, which has its sockets, those of HAProxy to itself among them.
    """

    named: Mapping[str, str]
    documents: tuple[str, ...]
    chroot: bool


def count_namespaces(binds: Iterable[Bind]) -> int:
    """How many network namespaces HAProxy holds open for its binds."""
    return len({bind.namespace for bind in binds if bind.namespace is not None})


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
        fair: Count what each instance asks for; without, the next three are of no account.
        requests_per_s: Of one instance, on average; this and the next two are defaults that a policy overrides.
        burst: Requests of one instance at once.
        connections: Of one instance at once; behind the unix listener, requests.
        body_bytes: Longest body that goes on to Nova.
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
    """One address of one of Nova's metadata APIs.

    Attributes:
        slot: Which of a record's signatures it takes: 0 for the secret in force, 1 for the next one.
    """

    address: IpAddress
    port: int
    slot: int = 0

    @property
    def authority(self) -> str:
        """Where it listens: `10.0.0.5:8775`, `[2001:db8::5]:8775`."""
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)  # noqa: PLR2004 - IP version
        return f"{host}:{self.port}"

    @property
    def name(self) -> str:
        """As HAProxy's counters name it: `10.0.0.5:8775`, `2001:db8::5-8775`; a name may hold no bracket."""
        return f"{self.address}{'-' if self.address.version == 6 else ':'}{self.port}"  # noqa: PLR2004 - IP version


@dataclass(frozen=True, slots=True)
class NovaTls:
    """How https endpoints are spoken to.

    Attributes:
        name: For SNI, and what their certificate must be for.
        ca: File of the authorities, or `@system-ca`.
        client: File of our certificate and its key.
        contents: Stands for what is in these files. HAProxy reads them when it loads, so other contents under
            the same names are another configuration.
    """

    name: str
    ca: str = "@system-ca"
    verify: bool = True
    client: str | None = None
    contents: str | None = None


@dataclass(frozen=True, slots=True)
class NovaBackend:
    """An endpoint set as HAProxy knows it.

    Attributes:
        name: The set's; it begins the records that are sent there.
        servers: None while no endpoint's name can be resolved: guests get 503.
        host: The Host header that Nova gets.
        loopback: Reach endpoints through HAProxy itself also where no need is left: an earlier worker may still do so.
    """

    name: str
    servers: tuple[NovaServer, ...]
    host: str
    tls: NovaTls | None = None
    loopback: bool = False


@dataclass(frozen=True, slots=True)
class NovaTimes:
    """Deadlines of requests to Nova, in seconds.

    Attributes:
        check: How an endpoint is found to be up: by a connection, by `GET /`, or by failed requests only.
    """

    connect_s: float = 2.0
    response_s: float = 30.0
    check: Literal["tcp", "http", "off"] = "http"
    check_interval_s: float = 5.0


@dataclass(frozen=True, slots=True)
class UnixBind:
    """The listener `unix`: Neutron's agent protocol on a socket.

    Attributes:
        mode: Of the socket, as `0644`.
        user: Its owner's uid.
        group: Its group's gid.
    """

    path: str
    mode: str
    user: int
    group: int
    maxconn: int = 1024


@dataclass(frozen=True, slots=True)
class DataplaneSpec:
    """Everything that the configuration file is a function of.

    Attributes:
        binds: Where guests are identified by their address: where MACs are not checked, or behind a MAC filter.
        unverified: Where the resolver is asked about each request (`anti_spoofing.plan`).
        watched: A client of the admin API watches requests.
        count_reads: Of so many reads without a token, where none is required, one is counted; 0 for none.
        audit: Of so many requests one has a line in the audit log; 0 for none.
        fleet: Instances of a fleet may be here, which have token keys of their own.
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
    fleet: bool = False
