"""Settings of the sources: places of their records, and how to read them."""

from pathlib import Path
from typing import Annotated, Literal

from imdsproxy.config.section import (
    AbsolutePath,
    ApiUrl,
    Change,
    Listed,
    Section,
    cross,
    form,
    section,
    setting,
)

HostName = Annotated[
    str, form(r"^[\x21-\x7e]{1,255}$", "a name of 1 to 255 ASCII letters without blanks")
]
ConnectionUri = Annotated[
    str, form(r"^[a-z][a-z0-9+.-]*://[\x21-\x7e]*$", "a URI, as qemu:///system")
]
OvsdbRemotes = Annotated[
    str,
    form(
        r"^(unix:/[^,\s]+|(tcp|ssl):(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):[0-9]{1,5})"
        r"(,(unix:/[^,\s]+|(tcp|ssl):(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}))*$",
        "unix:PATH, tcp:ADDRESS:PORT or ssl:ADDRESS:PORT, several joined by commas",
    ),
]
HubUrl = Annotated[
    str,
    form(
        r"^https://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?$",
        "a URL that ends after the port, as https://hub1.example.net:8469",
    ),
]
NetworkName = Annotated[str, form(r"^[^\x00-\x1f/]{1,255}$", "a name without a slash")]


class FileSourceSettings(Section):
    """Records from a directory of YAML and JSON files."""

    enabled: bool = setting(False, Change.RESTART)
    """Read and watch the directory. Off, because an empty or missing directory does not mean an empty inventory."""

    directory: AbsolutePath = setting(Path("/etc/imdsproxy/records"), Change.RESTART)
    """Directory of `*.yaml`, `*.yml` and `*.json` files with `networks:` and `instances:` lists."""


class SqliteSourceSettings(Section):
    """Records in the embedded store, written by the command line and the admin API."""

    enabled: bool = setting(True, Change.RESTART)
    """Use the store. On, because `network add` and `instance add` write to the store."""

    path: AbsolutePath | None = setting(None, Change.RESTART)
    """Path of the database file; null is `store.sqlite` in `paths.state_dir`."""


class NeutronSourceSettings(Section):
    """Ports from Neutron's API; their instances' documents come from Nova."""

    enabled: bool = setting(False, Change.RESTART)
    """Query Neutron. Off, because most hosts have no Neutron."""

    cloud: str | None = setting(None, Change.RESTART, min_length=1)
    """Name of the cloud in `clouds_file`, with Keystone's URL and the account. The account must be able to read every
    project's ports (the role `admin`, or a policy for `get_port`).
    """

    clouds_file: AbsolutePath | None = setting(None, Change.RESTART)
    """An openstacksdk `clouds.yaml`; null is `/etc/openstack/clouds.yaml`. It contains a password: use mode 0600."""

    endpoint: ApiUrl | None = setting(None, Change.RESTART)
    """URL of a Neutron that accepts requests without a token, as `http://127.0.0.1:9696`; instead of `cloud`."""

    timeout_s: float = setting(5.0, Change.RESTART, ge=0.5, le=60)
    """Maximum seconds for one query."""

    max_queries: int = setting(8, Change.RESTART, ge=1, le=100)
    """Maximum number of queries at once. More would only wait in Neutron instead of here."""

    negative_ttl_s: float = setting(3.0, Change.RESTART, ge=0, le=60)
    """Seconds for which the answer “no such port” is cached, so that a guest without a port does not cause a query per
    request.
    """

    refresh_s: float = setting(10.0, Change.RESTART, ge=1, le=3600)
    """Seconds after which ports in use are queried again, many in one query. An address that moves to another instance
    is answered as the first instance for at most this long.
    """

    lifetime_s: float = setting(3600.0, Change.RESTART, ge=10, le=604_800)
    """Seconds for which an address is kept after its guest's request caused a look-up. After that, the guest's next
    request has to cause another one, or the address is forgotten.
    """

    list_every_s: float = setting(0.0, Change.RESTART, ge=0, le=86_400)
    """Seconds between two listings of all ports, so that a guest's first request does not wait for Neutron. 0 disables
    listings: ports are looked up when a guest asks. A listed port is as old as the list unless its guest asked.
    """

    list_host: HostName | None = setting(None, Change.RESTART)
    """List only ports bound to this host (`binding:host_id`); null lists all."""

    page_size: int = setting(500, Change.RESTART, ge=1, le=10_000)
    """Number of ports in one page of the list."""

    @property
    def clouds_path(self) -> Path:
        """`clouds_file`, or its default."""
        return self.clouds_file or Path("/etc/openstack/clouds.yaml")

    @property
    def aside_s(self) -> float:
        """Seconds for which an expired port is still kept up to date: its guest may ask again."""
        return max(6 * self.refresh_s, min(self.lifetime_s / 4, 900.0))

    def model_post_init(self, _: object) -> None:
        """Check that `cloud` or `endpoint`, but not both, locates Neutron."""
        if self.cloud is not None and self.endpoint is not None:
            raise cross("endpoint", "`cloud` already has Neutron's address", "keep one of them")
        if self.enabled and self.cloud is None and self.endpoint is None:
            raise cross(
                "enabled",
                "needs `cloud` or `endpoint`, which have Neutron's address",
                "give one of them",
            )
        if self.clouds_file is not None and self.cloud is None:
            raise cross(
                "clouds_file", "needs `cloud`, which names a cloud of the file", "cloud: NAME"
            )


class LibvirtSourceSettings(Section):
    """Domains and networks of a libvirt daemon."""

    enabled: bool = setting(False, Change.RESTART)
    """Query libvirt. Off, because not every host with libvirt should serve metadata to its guests."""

    uri: ConnectionUri = setting("qemu:///system", Change.RESTART)
    """URI of the daemon, as for `virsh -c`. The connection is read-only."""

    networks: Listed[NetworkName] | None = setting(None, Change.RESTART)
    """Report only these libvirt networks, by name, and bridges of the host, by device; null for all."""

    domains: Literal["all", "marked"] = setting("all", Change.RESTART)
    """`marked` reports only domains with an `<imds:instance>` in their metadata. Without that element a domain gets its
    name as host name, its UUID as instance id, and nothing else.
    """

    reread_s: float = setting(30.0, Change.RESTART, ge=1, le=3600)
    """Seconds after which networks are read again without an event: libvirt sends no event when a static host is added
    to a running network.
    """


class OvnSourceSettings(Section):
    """Ports bound to this host, from OVN's Southbound database; their instances' documents come from Nova."""

    enabled: bool = setting(False, Change.RESTART)
    """Follow OVN. Off, because most hosts have no OVN."""

    open_vswitch: OvsdbRemotes = setting("unix:/run/openvswitch/db.sock", Change.RESTART)
    """This host's Open vSwitch database, which contains the chassis's name and its integration bridge."""

    southbound: OvsdbRemotes | None = setting(None, Change.RESTART)
    """The Southbound database; null takes `external_ids:ovn-remote` from Open vSwitch's database, as ovn-controller
    does. Any member of a cluster is suitable.
    """

    private_key_file: AbsolutePath | None = setting(None, Change.RESTART)
    """PEM file of the key for `ssl:`. `ovs-vsctl get-ssl` prints ovn-controller's."""

    certificate_file: AbsolutePath | None = setting(None, Change.RESTART)
    """PEM file of the certificate for an `ssl:` server."""

    ca_file: AbsolutePath | None = setting(None, Change.RESTART)
    """PEM file of the CA certificates that verify an `ssl:` server."""

    probe_s: float = setting(5.0, Change.RESTART, ge=1, le=3600)
    """Seconds of silence after which the Southbound database's server is probed. If the server stays silent for as long
    again, it counts as lost, and unknown addresses get 503. The default is the same as ovn-controller's.
    """

    grace_s: float = setting(600.0, Change.RESTART, ge=0, le=86_400)
    """Seconds for which guests are still served after this chassis's row was removed, as when ovn-controller stops: its
    port bindings disappear too, but its guests keep running.
    """

    def model_post_init(self, _: object) -> None:
        """Check that all three files for TLS are set, or none."""
        files = (self.private_key_file, self.certificate_file, self.ca_file)
        if any(files) and not all(files):
            raise cross(
                "private_key_file",
                "TLS needs `private_key_file`, `certificate_file` and `ca_file`",
                "give all three or none",
            )


class NeutronNamespacesSettings(Section):
    """Namespaces that Neutron's agents create on this host, served in place of their metadata proxies."""

    routers: bool = setting(False, Change.RESTART)
    """Serve each `qrouter-UUID`. Rules in the namespace redirect guests' requests to imdsproxy, whether or not the
    agent's own proxy listens. Instances come from `sources.neutron`.
    """

    dhcp: bool = setting(False, Change.RESTART)
    """Serve each `qdhcp-UUID` for which the DHCP agent wants metadata. This depends on the agent's settings and on
    whether the network has a router. Instances come from `sources.neutron`.
    """

    state_path: AbsolutePath = setting(Path("/var/lib/neutron"), Change.RESTART)
    """The DHCP agent's `state_path`. Its directory `ns-metadata-proxy` has the configurations of the DHCP proxies."""

    @property
    def enabled(self) -> bool:
        """Whether any of the namespaces are served."""
        return self.routers or self.dhcp


class FleetSourceSettings(Section):
    """Records that a fleet places on this host; hubs send them."""

    enabled: bool = setting(False, Change.RESTART)
    """Follow a hub. Off, because a host belongs to no fleet until `imdsproxy fleet join`."""

    hubs: Listed[HubUrl] = setting((), Change.RESTART)
    """URLs of hubs, in any order. This host follows one hub, and another if that fails. If empty, it uses the URLs that
    `imdsproxy fleet join` stored.
    """

    certificate_file: AbsolutePath | None = setting(None, Change.RESTART)
    """PEM file of this host's certificate; null is `fleet/host.pem` in `paths.state_dir`. imdsproxy renews only that
    default file.
    """

    private_key_file: AbsolutePath | None = setting(None, Change.RESTART)
    """PEM file of the certificate's key; null is `fleet/host.pem` in `paths.state_dir`."""

    ca_file: AbsolutePath | None = setting(None, Change.RESTART)
    """PEM file of the fleet's CA, which signs hubs' certificates; null is `fleet/ca.crt` in `paths.state_dir`."""

    timeout_s: float = setting(10.0, Change.RESTART, ge=2, le=60)
    """Maximum seconds for a hub's answer to a request. A connection may take two seconds before the next hub is tried;
    this time doubles with each round over all hubs, up to `timeout_s`.
    """

    retry_s: float = setting(30.0, Change.RESTART, ge=0.2, le=600)
    """Long-run average of the seconds between two attempts when no hub is reached. Each pause is between 0.5 and 1.5
    times this value, so that hosts do not return all at once.
    """

    serve_without_hubs_s: float | None = setting(None, Change.RESTART, ge=60)
    """Seconds for which instances are still served after a hub last knew the state of the fleet. Later they may have
    been removed, so they get 503 (no document, no new token) until a hub is followed again. Null serves them without
    limit, also after a reboot.
    """


class SourcesSettings(Section):
    """Sources of networks, ports and instances. Several may be enabled at once."""

    file: FileSourceSettings = section(FileSourceSettings)
    """Files in a directory."""

    sqlite: SqliteSourceSettings = section(SqliteSourceSettings)
    """The embedded store."""

    neutron: NeutronSourceSettings = section(NeutronSourceSettings)
    """OpenStack's Neutron."""

    libvirt: LibvirtSourceSettings = section(LibvirtSourceSettings)
    """Libvirt."""

    ovn: OvnSourceSettings = section(OvnSourceSettings)
    """OVN, without Neutron's metadata agent."""

    neutron_namespaces: NeutronNamespacesSettings = section(NeutronNamespacesSettings)
    """Namespaces of Neutron's L3 and DHCP agents, without their metadata proxies."""

    fleet: FleetSourceSettings = section(FleetSourceSettings)
    """A fleet's hubs."""

    def model_post_init(self, _: object) -> None:
        """Check that at least one source is enabled."""
        if not any(getattr(self, name).enabled for name in type(self).model_fields):
            raise cross(
                (),
                "no source is enabled, so imdsproxy would know no instance",
                "set sources.file.enabled: true or sources.sqlite.enabled: true",
            )
