"""Schema of the settings of imdsproxy: name, type, default, unit, reason, and the effort to apply a change.

Each component gets only its own section; `core` gets plain values. A secret is the name of a file here, never a value.
The reference page, `config schema` and `config sample` are generated from this file, so operators read its texts.
"""

import re
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import AfterValidator

from imdsproxy.config.hub import HubSettings, OperatorSettings
from imdsproxy.config.identity import IdentitySettings
from imdsproxy.config.neutron_agents import (
    DEFAULT_PORT,
    DEFAULT_STATE_PATH,
    MAX_PORT,
    parse_facility,
)
from imdsproxy.config.nova import NovaSettings
from imdsproxy.config.policy import AuditSettings, LimitsSettings, PolicySettings, TokensSettings
from imdsproxy.config.section import (
    AbsolutePath,
    AccountName,
    AccountNameOrId,
    Change,
    Endpoint,
    HostEndpoint,
    Identifier,
    Mode,
    Section,
    UnitName,
    cross,
    form,
    section,
    setting,
)
from imdsproxy.config.sources import SourcesSettings
from imdsproxy.errors import RequestRefused

Supervisor: TypeAlias = Literal["auto", "spawn", "systemd"]
NamePrefix = Annotated[
    str, form(r"^[a-z][a-z0-9]{1,5}$", "2 to 6 lower-case letters and digits, a letter first")
]


_LONGEST_PATH: Final = 97
"""Maximum length of the path: HAProxy binds a temporary name, whose suffix takes ten of the kernel's 107 bytes."""

_PLAIN_PATH: Final = re.compile(r"/[A-Za-z0-9._/@+-]+")


def _bindable(path: Path) -> Path:
    if not _PLAIN_PATH.fullmatch(str(path)):
        raise ValueError(f"{path} has characters other than A-Za-z0-9._/@+-")
    if len(str(path)) > _LONGEST_PATH:
        raise ValueError(f"{path} has {len(str(path))} characters, HAProxy takes {_LONGEST_PATH}")
    return path


class UnixListenerSettings(Section):
    """A unix socket that replaces neutron-metadata-agent's."""

    enabled: bool = setting(False, Change.RELOAD)
    """Listen on the socket. Off, because only hosts with Neutron's L3, DHCP or OVN agents have clients for it."""

    path: Annotated[AbsolutePath, AfterValidator(_bindable)] = setting(
        Path("/var/lib/neutron/metadata_proxy"), Change.RELOAD
    )
    """Path of the socket, the same as the agents' `metadata_proxy_socket`."""

    take_over: bool = setting(False, Change.RELOAD)
    """Take the path from a running process too. If that process takes the path back repeatedly, takeovers pause for
    longer and longer. For OVN, whose agent listens there and must keep running. Off, so that starting the agent again
    returns the path to the agent.
    """

    mode: Literal["deduce", "user", "group", "all"] = setting("deduce", Change.RELOAD)
    """Mode of the socket, as Neutron's `metadata_proxy_socket_mode`: `user` 0644, `group` 0664, `all` 0666. `deduce`
    takes the narrowest mode with which `proxy_user` and `proxy_group` can connect.
    """

    user: AccountName | None = setting(None, Change.RELOAD)
    """Owner of the socket, and of its directory if imdsproxy creates the directory. Null is the owner of the existing
    directory, which is the agents' account; root for a new directory.
    """

    group: AccountName | None = setting(None, Change.RELOAD)
    """Group of the socket, and of its directory if imdsproxy creates the directory; null is the directory's group."""

    directory_mode: Mode = setting("0755", Change.RELOAD)
    """Permissions for a new directory of the socket, in octal and quoted. An existing directory is not changed."""

    proxy_user: AccountNameOrId | None = setting(None, Change.RELOAD)
    """Account of the proxies that connect, for `deduce`: the agents' `metadata_proxy_user`."""

    proxy_group: AccountNameOrId | None = setting(None, Change.RELOAD)
    """Group of the proxies, for `deduce`: the agents' `metadata_proxy_group`."""

    maxconn: int = setting(1024, Change.RELOAD, ge=1, le=100_000)
    """Maximum number of open connections, of all networks behind the socket together."""


class PathsSettings(Section):
    """Directories of imdsproxy's files."""

    runtime_dir: AbsolutePath = setting(Path("/run/imdsproxy"), Change.RESTART)
    """Directory of HAProxy's configuration, maps and all sockets. It is on tmpfs, because imdsproxy builds all of it
    again from the sources after a boot.
    """

    state_dir: AbsolutePath = setting(Path("/var/lib/imdsproxy"), Change.RESTART)
    """Directory of data that outlives a boot: the SQLite store, compiled records, guests' passwords."""

    netns_dir: AbsolutePath = setting(Path("/run/netns"), Change.RESTART)
    """Directory of the named network namespaces. iproute2 and HAProxy have this path built in; change it only for
    tests.
    """


class HaproxySettings(Section):
    """The HAProxy that answers every guest."""

    binary: str = setting("haproxy", Change.RESTART, min_length=1)
    """HAProxy's program, 3.0 or later: a name in PATH, or an absolute path."""

    user: AccountName = setting("haproxy", Change.RELOAD)
    """Account of the worker once its sockets are bound. Debian's package creates `haproxy`."""

    group: AccountName = setting("haproxy", Change.RELOAD)
    """Group of the worker."""

    nbthread: int = setting(1, Change.RELOAD, ge=1, le=64)
    """Threads of the worker. One thread answers more than 10,000 requests/s, was faster than two on two shared cores,
    and leaves the other cores to guests.
    """

    maxconn_per_network: int = setting(200, Change.RELOAD, ge=1, le=100_000)
    """Connections that one network may have open at once, so that no network can take all; behind the unix listener,
    requests. Guests open few: cloud-init uses one at a time.
    """

    maxconn: int = setting(0, Change.RESTART, ge=0, le=1_000_000)
    """Connections in all; 0 computes the number from the number of networks and the limit on open files. HAProxy reads
    the value only when its master starts: run `imdsproxy stop --data-plane`, then start again.
    """

    hard_stop_after_s: int = setting(30, Change.RELOAD, ge=1, le=3600)
    """Seconds that an old worker may keep its connections after a reload. HAProxy itself has no limit, so old workers
    would pile up.
    """

    chroot: bool = setting(True, Change.RELOAD)
    """Lock the worker into a directory that holds only the sockets to which it connects, to contain an exploit."""

    supervisor: Supervisor = setting("auto", Change.RESTART)
    """Supervisor that starts and restarts HAProxy. `systemd` starts and reloads the unit, `spawn` starts a separate
    process beside the controller, `auto` uses systemd if it is the init system and the unit is installed. HAProxy
    always outlives the controller.
    """

    unit: UnitName = setting("imdsproxy-haproxy.service", Change.RESTART)
    """The systemd unit of HAProxy's master."""

    cache_mb: int = setting(64, Change.RELOAD, ge=0, le=4095)
    """Megabytes of documents kept in HAProxy's memory; 0 disables the cache. The default is enough for the boot
    documents of some thousand instances; HAProxy allows at most 4095.
    """

    max_object_kib: int = setting(1024, Change.RELOAD, ge=1, le=65_536)
    """KiB of the largest cached document, at most half the cache. Larger user-data is read once a boot and would evict
    everything else.
    """

    def model_post_init(self, _: object) -> None:
        """Refuse an object size above half of the cache."""
        if self.cache_mb and self.max_object_kib * 2 > self.cache_mb * 1024:
            raise cross(
                "max_object_kib",
                f"{self.max_object_kib} KiB is more than half of cache_mb ({self.cache_mb})",
                f"at most {self.cache_mb * 512}, or a larger cache_mb",
            )


class DocumentsSettings(Section):
    """The document server, which renders documents from compiled records and needs no other process."""

    enabled: bool = setting(True, Change.RESTART)
    """Run the document server. Disable it if Nova has all documents: the server would use two fifths of all memory for
    nothing. Without the server, an instance with documents of imdsproxy is a problem, and its guests get 503.
    """

    workers: int = setting(2, Change.RESTART, ge=1, le=32)
    """Worker processes. With two, one can die or be replaced without guests noticing."""

    user: AccountName | None = setting("haproxy", Change.RESTART)
    """Account of the workers; null keeps the account of their parent (set by the systemd unit). HAProxy's account is
    the default, because HAProxy has to open their sockets and sees all their answers anyway.
    """

    group: AccountName | None = setting("haproxy", Change.RESTART)
    """Group of the workers and of their sockets; null as for `user`."""

    supervisor: Supervisor = setting("auto", Change.RESTART)
    """Supervisor that starts and restarts the document server. `systemd` starts and reloads the unit, `spawn` starts a
    separate process beside the controller, `auto` uses systemd if it is the init system and the unit is installed. The
    document server always outlives the controller.
    """

    unit: UnitName = setting("imdsproxy-documents.service", Change.RESTART)
    """The systemd unit of the document server."""

    region: Identifier | None = setting(None, Change.LIVE)
    """Value of `placement/region`. Null derives the region from the instance's availability zone: `eu-west-1a` gives
    `eu-west-1`, and a zone that is not named after its region is its own region. botocore and the AWS CLI do not read
    this value: they use the zone without its last letter.
    """


class ResolverSettings(Section):
    """Requests from unknown addresses."""

    hold_s: float = setting(5.0, Change.RELOAD, ge=0, le=30)
    """Seconds that a request from an unknown address is held while its record may still come (a guest can be faster
    than its own announcement); 0 answers at once. Only the first request of an address waits: further requests get 404
    at once, until a source reports the address or it has sent no request for a minute.
    """

    max_held_per_network: int = setting(32, Change.LIVE, ge=1, le=10_000)
    """Requests held at once for one network; further requests get 503 at once. A guest that invents source addresses
    fills only its own network's share.
    """

    max_held: int = setting(256, Change.LIVE, ge=1, le=10_000)
    """Requests held at once in all; each keeps a connection and some memory."""

    learned_ttl_s: int = setting(30, Change.LIVE, ge=1, le=3600)
    """Seconds for which an address learned from a network's neighbour table is valid. The time is short, because
    another guest may take over the address.
    """

    def model_post_init(self, _: object) -> None:
        """Refuse a share of one network above the total."""
        if self.max_held_per_network > self.max_held:
            raise cross(
                "max_held_per_network",
                f"{self.max_held_per_network} is more than max_held ({self.max_held})",
                f"at most {self.max_held}, or a larger max_held",
            )


def _facility(text: str) -> str:
    try:
        parse_facility(text)
    except RequestRefused as error:
        raise cross((), error.message, error.hint) from error
    return text


Facility = Annotated[str, AfterValidator(_facility)]


class NamespaceProxySettings(Section):
    """Defaults of `imdsproxy namespace-proxy`, named as its options; the command line wins."""

    state_path: AbsolutePath = setting(Path(DEFAULT_STATE_PATH), Change.NOTHING)
    """Directory whose `ns-metadata-proxy` holds HAProxy's configurations."""

    metadata_port: int = setting(DEFAULT_PORT, Change.NOTHING, ge=1, le=MAX_PORT)
    """TCP port to listen on, at every address of the namespace."""

    metadata_proxy_socket: AbsolutePath | None = setting(None, Change.NOTHING)
    """Unix socket that receives the requests; null is `metadata_proxy` in the state path."""

    metadata_proxy_user: AccountNameOrId | None = setting(None, Change.NOTHING)
    """Account of HAProxy once it listens; null keeps the current account."""

    metadata_proxy_group: AccountNameOrId | None = setting(None, Change.NOTHING)
    """Group of HAProxy once it listens; null keeps the current group."""

    debug: bool = setting(False, Change.NOTHING)
    """Log level debug instead of info for HAProxy."""

    use_syslog: bool | None = setting(None, Change.NOTHING)
    """Log requests to /dev/log; null logs them if /dev/log exists."""

    syslog_log_facility: Facility = setting("LOG_LOCAL0", Change.NOTHING)
    """Syslog facility, by Neutron's or HAProxy's name."""


class AdminSettings(Section):
    """The admin API, used by the command line."""

    socket: AbsolutePath | None = setting(None, Change.RESTART)
    """Path of the unix socket; null is `admin.sock` in `paths.runtime_dir`."""

    mode: Mode = setting("0660", Change.RESTART)
    """Permissions of the socket, in octal and quoted. Every account that can write to the socket can read and change
    every instance's documents.
    """

    user: AccountName | None = setting(None, Change.RESTART)
    """Owner of the socket; null is the controller's own account."""

    group: AccountName | None = setting(None, Change.RESTART)
    """Group of the socket; null is the controller's own group."""


class MetricsSettings(Section):
    """Health and metrics, on addresses of the host that no guest reaches."""

    listen: HostEndpoint | None = setting(Endpoint("127.0.0.1", 9465), Change.RESTART)
    """Address and port of `/livez`, `/readyz` and the controller's `/metrics`; null disables them. Link-local and
    wildcard addresses are refused, because guests could reach them.
    """

    haproxy_listen: HostEndpoint | None = setting(Endpoint("127.0.0.1", 9466), Change.RELOAD)
    """Address and port of HAProxy's own exporter; null disables it. Link-local and wildcard addresses are refused."""

    degraded: Literal["ready", "not-ready"] = setting("ready", Change.LIVE)
    """State that `/readyz` and `imdsproxy_ready` report while a configured network is not served: `ready` (200, with
    the reasons under `degraded`), because the other networks are served, or `not-ready` (503).
    """

    network_series: int = setting(100, Change.LIVE, ge=0, le=10_000)
    """Number of networks up to which the controller's `/metrics` has series for each network; with more networks there
    is one sum over all. 1,000 networks would be several thousand series for every host.
    """

    def model_post_init(self, _: object) -> None:
        """Refuse the same endpoint for both."""
        if self.listen is not None and self.listen == self.haproxy_listen:
            raise cross(
                "haproxy_listen", f"{self.listen} is taken by metrics.listen", "another port"
            )


class HostSettings(Section):
    """Objects that imdsproxy creates and watches on the host."""

    name_prefix: NamePrefix = setting("imds", Change.RESTART)
    """Prefix of the names of the namespaces and links that imdsproxy creates, and may delete. Two daemons on one host
    need different prefixes. Prefixes are short, because Linux allows a link name 15 characters.
    """

    audit_per_second: int = setting(10, Change.LIVE, ge=0, le=1000)
    """Listeners a second that the controller compares with the kernel although no event asked for it; 0 for none. At
    10, a thousand listeners are checked within two minutes. Listeners that do not serve are checked each half second.
    """


class LogSettings(Section):
    """Messages of the controller and the document server on standard error."""

    level: Literal["debug", "info", "warning", "error"] = setting("info", Change.LIVE)
    """Lowest level that is logged."""

    format: Literal["auto", "json", "text"] = setting("auto", Change.LIVE)
    """Format of messages; `auto` is text on a terminal and JSON lines elsewhere."""


class Settings(Section):
    """All settings of one host."""

    paths: PathsSettings = section(PathsSettings)
    """Directories of files."""

    haproxy: HaproxySettings = section(HaproxySettings)
    """The data plane."""

    documents: DocumentsSettings = section(DocumentsSettings)
    """The document server."""

    resolver: ResolverSettings = section(ResolverSettings)
    """Unknown addresses."""

    sources: SourcesSettings = section(SourcesSettings)
    """Sources of records."""

    nova: NovaSettings = section(NovaSettings)
    """The upstream `nova`."""

    unix_listener: UnixListenerSettings = section(UnixListenerSettings)
    """Neutron's agent protocol on a unix socket."""

    namespace_proxy: NamespaceProxySettings = section(NamespaceProxySettings)
    """Defaults of `imdsproxy namespace-proxy`."""

    limits: LimitsSettings = section(LimitsSettings)
    """Limits of each instance."""

    policy: PolicySettings = section(PolicySettings)
    """Guests' permissions."""

    tokens: TokensSettings = section(TokensSettings)
    """Keys of session tokens."""

    identity: IdentitySettings = section(IdentitySettings)
    """Identity tokens of guests."""

    audit: AuditSettings = section(AuditSettings)
    """The audit log: a line for each request."""

    admin: AdminSettings = section(AdminSettings)
    """The admin API."""

    metrics: MetricsSettings = section(MetricsSettings)
    """Health and metrics."""

    host: HostSettings = section(HostSettings)
    """Objects on the host."""

    hub: HubSettings = section(HubSettings)
    """A hub of a fleet; only `imdsproxy hub` reads this section."""

    operator: OperatorSettings = section(OperatorSettings)
    """A machine for operating a fleet; the daemon does not read this section."""

    log: LogSettings = section(LogSettings)
    """Messages."""

    def model_post_init(self, _: object) -> None:
        """Refuse Neutron's ports without a Nova, and settings of identity that contradict other sections."""
        if self.sources.neutron.enabled and not self.nova.endpoint_sets:
            raise cross(
                ("sources", "neutron", "enabled"),
                "Neutron's ports are served by Nova, and `nova.endpoint_sets` is empty",
                "name Nova's metadata API",
            )
        if self.identity.enabled and not (self.identity.issuer or self.sources.fleet.enabled):
            raise cross(
                ("identity", "issuer"),
                "a host without a fleet signs identity tokens itself, and has no issuer",
                "a URL as https://id.cloud.example",
            )
        if self.identity.key_file is not None and self.sources.fleet.enabled:
            raise cross(
                ("identity", "key_file"),
                "the hubs of a fleet sign, and share keys of their own",
                "remove it, or sources.fleet",
            )

        taken = {
            self.metrics.listen: "metrics.listen",
            self.metrics.haproxy_listen: "metrics.haproxy_listen",
        }
        listen = self.identity.listen
        if listen is not None and listen in taken:
            # HAProxy would share the port between both frontends, and answer by either.
            raise cross(
                ("identity", "listen"), f"{listen} is taken by {taken[listen]}", "another port"
            )

    @property
    def admin_socket(self) -> Path:
        """Path of the admin socket, with the default applied."""
        return self.admin.socket or self.paths.runtime_dir / "admin.sock"

    @property
    def store_path(self) -> Path:
        """Path of the SQLite store, with the default applied."""
        return self.sources.sqlite.path or self.paths.state_dir / "store.sqlite"
