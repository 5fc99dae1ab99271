"""The settings of the sources: where each one's records are, and how they are read."""

from pathlib import Path
from typing import Annotated, Literal

from imdsproxy.config.section import (
    AbsolutePath,
    Change,
    Listed,
    Section,
    cross,
    form,
    section,
    setting,
)

ApiUrl = Annotated[
    str,
    form(
        r"^https?://[^\s/?#]+/?[^\s?#]*$",
        "a URL that begins with http:// or https://, without ? and #",
    ),
]
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
        "a URL that ends after the port, as https://hub1.example.org:7443",
    ),
]
NetworkName = Annotated[str, form(r"^[^\x00-\x1f/]{1,255}$", "a name without a slash")]


class FileSourceSettings(Section):
    """Records from a directory of YAML and JSON files."""

    enabled: bool = setting(False, Change.RESTART)
    """Read and watch the directory. Off, because an empty or missing directory is no empty inventory."""

    directory: AbsolutePath = setting(Path("/etc/imdsproxy/records"), Change.RESTART)
    """Directory of `*.yaml`, `*.yml` and `*.json` files with `networks:` and `instances:` lists."""


class SqliteSourceSettings(Section):
    """Records in the embedded store, written by the command line and the admin API."""

    enabled: bool = setting(True, Change.RESTART)
    """Use the store. On, because it is what `network add` and `instance add` write to."""

    path: AbsolutePath | None = setting(None, Change.RESTART)
    """The database file; null is `store.sqlite` in `paths.state_dir`."""


class NeutronSourceSettings(Section):
    """Ports from Neutron's API; their instances' documents come from Nova."""

    enabled: bool = setting(False, Change.RESTART)
    """Ask Neutron. Off, because most hosts have none."""

    cloud: str | None = setting(None, Change.RESTART, min_length=1)
    """Name of the cloud in `clouds_file`: where Keystone is and who asks. The account needs to see every project's
    ports (the role `admin` or a policy for `get_port`).
    """

    clouds_file: AbsolutePath | None = setting(None, Change.RESTART)
    """An openstacksdk `clouds.yaml`; null is `/etc/openstack/clouds.yaml`. It holds a password: 0600."""

    endpoint: ApiUrl | None = setting(None, Change.RESTART)
    """URL of a Neutron that takes requests without a token, as `http://127.0.0.1:9696`; instead of `cloud`."""

    timeout_s: float = setting(5.0, Change.RESTART, ge=0.5, le=60)
    """Seconds that one query may take."""

    max_queries: int = setting(8, Change.RESTART, ge=1, le=100)
    """Queries at once. More would only wait in Neutron instead of here."""

    negative_ttl_s: float = setting(3.0, Change.RESTART, ge=0, le=60)
    """Seconds that the answer “no such port” is believed, so that a guest without a port does not cost a query a
    request.
    """

    refresh_s: float = setting(10.0, Change.RESTART, ge=1, le=3600)
    """Seconds after which a port in use is asked for again, many with one query. It is the longest that an address
    which moved from one instance to another is answered as the first.
    """

    lifetime_s: float = setting(3600.0, Change.RESTART, ge=10, le=604_800)
    """Seconds after which an address has to be asked for by its guest once more to be kept; who does not is
    forgotten.
    """

    list_every_s: float = setting(0.0, Change.RESTART, ge=0, le=86_400)
    """Seconds between two readings of all ports, so that no guest's first request waits for Neutron; 0 for none:
    ports are looked up when a guest asks. What is on the list is as old as the list, unless its guest asked.
    """

    list_host: HostName | None = setting(None, Change.RESTART)
    """Only ports bound to this host (`binding:host_id`) are listed; null lists all."""

    page_size: int = setting(500, Change.RESTART, ge=1, le=10_000)
    """Ports in one page of that list."""

    @property
    def clouds_path(self) -> Path:
        """`clouds_file`, or its default."""
        return self.clouds_file or Path("/etc/openstack/clouds.yaml")

    @property
    def aside_s(self) -> float:
        """Seconds that a port whose time is over is still kept up to date: its guest may ask again."""
        return max(6 * self.refresh_s, min(self.lifetime_s / 4, 900.0))

    def model_post_init(self, _: object) -> None:
        """One setting says where Neutron is."""
        if self.cloud is not None and self.endpoint is not None:
            raise cross("endpoint", "`cloud` says already where Neutron is", "keep one of them")
        if self.enabled and self.cloud is None and self.endpoint is None:
            raise cross(
                "enabled",
                "neither `cloud` nor `endpoint` says where Neutron is",
                "give one of them",
            )
        if self.clouds_file is not None and self.cloud is None:
            raise cross("clouds_file", "`cloud` does not say which of its clouds", "cloud: NAME")


class LibvirtSourceSettings(Section):
    """Domains and networks of a libvirt daemon."""

    enabled: bool = setting(False, Change.RESTART)
    """Ask libvirt. Off, because not every host with libvirt should serve metadata to its guests."""

    uri: ConnectionUri = setting("qemu:///system", Change.RESTART)
    """The daemon, as `virsh -c` takes it. It is opened read-only."""

    networks: Listed[NetworkName] | None = setting(None, Change.RESTART)
    """Only these: networks of libvirt's by name, bridges of the host's by device; null for all."""

    domains: Literal["all", "marked"] = setting("all", Change.RESTART)
    """`marked`: only domains with an `<imds:instance>` in their metadata. Others get their name as host name, their
    UUID as instance id, and nothing else.
    """

    reread_s: float = setting(30.0, Change.RESTART, ge=1, le=3600)
    """Seconds after which networks are read again without an event: libvirt has none for a static host that is added
    to a running network, until something happens to a domain.
    """


class OvnSourceSettings(Section):
    """Ports bound to this host, from OVN's Southbound database; their instances' documents come from Nova."""

    enabled: bool = setting(False, Change.RESTART)
    """Follow OVN. Off, because most hosts have none."""

    open_vswitch: OvsdbRemotes = setting("unix:/run/openvswitch/db.sock", Change.RESTART)
    """This host's Open vSwitch database: it has this chassis's name and its integration bridge."""

    southbound: OvsdbRemotes | None = setting(None, Change.RESTART)
    """The Southbound database; null takes `external_ids:ovn-remote` of Open vSwitch's, as ovn-controller does. Any
    member of a cluster will do.
    """

    private_key_file: AbsolutePath | None = setting(None, Change.RESTART)
    """PEM file of the key for `ssl:`. ovn-controller's is in `ovs-vsctl get-ssl`."""

    certificate_file: AbsolutePath | None = setting(None, Change.RESTART)
    """PEM file of the certificate shown to an `ssl:` server."""

    ca_file: AbsolutePath | None = setting(None, Change.RESTART)
    """PEM file of the authorities that may have signed an `ssl:` server's certificate."""

    probe_s: float = setting(5.0, Change.RESTART, ge=1, le=3600)
    """Seconds of silence after which the Southbound database's server is asked whether it is there; as long after that
    it counts as lost, and addresses that are not known get 503. ovn-controller's default, too.
    """

    grace_s: float = setting(600.0, Change.RESTART, ge=0, le=86_400)
    """Seconds that guests are served on after this chassis's row has gone, as when ovn-controller is stopped: its ports
    go with it, and its guests run on.
    """

    def model_post_init(self, _: object) -> None:
        """All three files for TLS, or none."""
        files = (self.private_key_file, self.certificate_file, self.ca_file)
        if any(files) and not all(files):
            raise cross(
                "private_key_file",
                "TLS needs `private_key_file`, `certificate_file` and `ca_file`",
                "give all three or none",
            )


class NeutronNamespacesSettings(Section):
    """Namespaces that Neutron's agents make on this host, served in place of their metadata proxies."""

    routers: bool = setting(False, Change.RESTART)
    """Serve each `qrouter-UUID`. Rules in it redirect guests' requests to imdsproxy, whether or not the agent's
    own proxy listens. Instances come from `sources.neutron`.
    """

    dhcp: bool = setting(False, Change.RESTART)
    """Serve each `qdhcp-UUID` where the DHCP agent wants metadata served: its settings decide, and whether the network
    has a router. Instances come from `sources.neutron`.
    """

    state_path: AbsolutePath = setting(Path("/var/lib/neutron"), Change.RESTART)
    """The DHCP agent's `state_path`: `ns-metadata-proxy` in it has the configurations of its proxies."""

    @property
    def enabled(self) -> bool:
        """Whether any of them are served."""
        return self.routers or self.dhcp


class FleetSourceSettings(Section):
    """Records that a fleet places on this host; hubs send them."""

    enabled: bool = setting(False, Change.RESTART)
    """Follow a hub. Off, because a host belongs to no fleet until `imdsproxy fleet join`."""

    hubs: Listed[HubUrl] = setting((), Change.RESTART)
    """URLs of hubs, in any order: one is followed, another when that one fails. None is what `imdsproxy fleet join`
    stored.
    """

    certificate_file: AbsolutePath | None = setting(None, Change.RESTART)
    """PEM file of this host's certificate; null is `fleet/host.pem` in `paths.state_dir`, which is renewed in
    time; another one is not.
    """

    private_key_file: AbsolutePath | None = setting(None, Change.RESTART)
    """PEM file of its key; null is `fleet/host.pem` in `paths.state_dir`."""

    ca_file: AbsolutePath | None = setting(None, Change.RESTART)
    """PEM file of the fleet's CA, which signed hubs' certificates; null is `fleet/ca.crt` in `paths.state_dir`."""

    timeout_s: float = setting(10.0, Change.RESTART, ge=2, le=60)
    """Seconds that a hub has for the answer to a request. For a connection it has two seconds before the next hub is
    tried, and twice as long in each further round over all hubs, up to this.
    """

    retry_s: float = setting(30.0, Change.RESTART, ge=0.2, le=600)
    """Seconds between two attempts when no hub is reached, in the long run and on average: hosts take between half and
    one and a half of it, so that they do not come back all at once.
    """

    serve_without_hubs_s: float | None = setting(None, Change.RESTART, ge=60)
    """Seconds since a hub last knew the state of the fleet after which the instances here, which may have been removed
    meanwhile, are answered 503 until a hub is followed again: no document and no new token. Null serves them without
    end, also after a reboot.
    """


class SourcesSettings(Section):
    """Where networks, ports and instances come from. Several at once are allowed."""

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
    """Routers, without the proxies of Neutron's L3 agent."""

    fleet: FleetSourceSettings = section(FleetSourceSettings)
    """A fleet's hubs."""

    def model_post_init(self, _: object) -> None:
        """At least one source is enabled."""
        if not any(getattr(self, name).enabled for name in type(self).model_fields):
            raise cross(
                (),
                "no source is enabled, so no instance could ever be known",
                "sources.file.enabled: true or sources.sqlite.enabled: true",
            )
