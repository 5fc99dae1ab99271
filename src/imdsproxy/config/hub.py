"""Settings of a hub."""

from pathlib import Path
from typing import Annotated, Final

from imdsproxy.config.section import (
    AbsolutePath,
    AccountName,
    Change,
    Endpoint,
    HostEndpoint,
    Identifier,
    Listed,
    Section,
    cross,
    form,
    section,
    setting,
)

HubUrl = Annotated[
    str,
    form(
        r"^https://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}$",
        "https://ADDRESS:PORT, as https://hub1.example.net:8469",
    ),
]
ListenAddress = Annotated[
    str,
    form(
        r"^(\[[0-9A-Fa-f:.]+\]|[0-9.]+):[0-9]{1,5}$",
        "an address and a port, as 192.0.2.10:8469 or [::]:8469",
    ),
]
EtcdUrl = Annotated[
    str,
    form(
        r"^https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}$",
        "https://ADDRESS:PORT, as https://etcd1.example.net:2379",
    ),
]

_LOOPBACK: Final = ("http://127.", "http://[::1]:", "http://localhost:")


class OperatorSettings(Section):
    """Settings for a machine of operators: commands on records go to a fleet."""

    hubs: Listed[HubUrl] = setting((), Change.RESTART)
    """Hubs, asked in turn until one answers. With any, `network`, `instance`, `policy`, `token revoke`, `explain`,
    `get` and `watch` go to the fleet and not to this host's daemon, as with `--fleet`.
    """

    certificate: AbsolutePath = setting(Path("/etc/imdsproxy/fleet/operator.pem"), Change.RESTART)
    """File that `fleet operator` created: key, certificate and CA certificate."""


class EtcdSettings(Section):
    """The store of the fleet. Only hubs connect to etcd."""

    endpoints: Listed[EtcdUrl] = setting(("http://127.0.0.1:2379",), Change.RESTART, min_length=1)
    """Client URLs of all members; for a member with `--listen-client-http-urls`, the URL given there. `http` only on
    loopback.
    """

    ca_file: AbsolutePath | None = setting(None, Change.RESTART)
    """PEM file of the CA that signed the members' certificates; required for `https`."""

    certificate_file: AbsolutePath | None = setting(None, Change.RESTART)
    """PEM file of the hub's client certificate for etcd. The CN in its subject must be empty."""

    key_file: AbsolutePath | None = setting(None, Change.RESTART)
    """PEM file of the client certificate's key."""

    user: str = setting("", Change.RESTART)
    """User name, if etcd has authentication enabled."""

    password_file: AbsolutePath | None = setting(None, Change.RESTART)
    """File with the user's password, mode 0600."""

    def model_post_init(self, _: object) -> None:
        """Check settings that depend on each other."""
        if (self.certificate_file is None) != (self.key_file is None):
            raise cross("key_file", "a certificate needs its key", "give both or none")
        if self.user and self.password_file is None:
            raise cross("password_file", "`user` needs a password", "name a file with it")
        for one in self.endpoints:
            if not one.startswith(("https://", *_LOOPBACK)):
                raise cross(
                    "endpoints",
                    f"{one} would carry records and passwords unencrypted",
                    "https, or a member on this host",
                )
        secure = any(one.startswith("https:") for one in self.endpoints)
        if secure and self.ca_file is None:
            raise cross("ca_file", "`https` needs an authority", "name its PEM file")


class HubSettings(Section):
    """Settings of `imdsproxy hub`, between etcd and the hosts of a fleet."""

    name: Identifier | None = setting(None, Change.RESTART)
    """Name of this hub in the fleet; null takes the name in its certificate."""

    listen: Listed[ListenAddress] = setting(("0.0.0.0:8469", "[::]:8469"), Change.RESTART)
    """Addresses and ports to which hosts, operators and other hubs connect, with TLS and certificates of the fleet."""

    url: HubUrl | None = setting(None, Change.RESTART)
    """URL at which other hubs and hosts reach this hub; null derives it from the first name in its certificate."""

    metrics_listen: HostEndpoint | None = setting(Endpoint("127.0.0.1", 9467), Change.RESTART)
    """Address and port of the hub's `/livez`, `/readyz` and `/metrics`, without TLS; null for none."""

    directory: AbsolutePath = setting(Path("/etc/imdsproxy/fleet"), Change.RESTART)
    """Directory that `fleet init` created: the CA, this hub's certificate, and the key that seals secrets in etcd. All
    files but `ca.crt` are secret.
    """

    runtime_dir: AbsolutePath = setting(Path("/run/imdsproxy-hub"), Change.RESTART)
    """Directory of the sockets between HAProxy and the hub, and of the files that HAProxy reads."""

    user: AccountName | None = setting("imdsproxy-hub", Change.RESTART)
    """Account that the hub takes if root starts it. The account becomes the owner of `hub.directory` and of the fleet's
    files there. Null keeps the present account.
    """

    haproxy_user: AccountName | None = setting("imdsproxy-front", Change.RESTART)
    """Account of the hub's HAProxy, which then cannot read the fleet's keys. Null takes the account of `hub.user`."""

    state_dir: AbsolutePath = setting(Path("/var/lib/imdsproxy-hub"), Change.RESTART)
    """Directory of the hub's journal: memberships, revocations and operator overrides, which survive a restored backup
    of etcd.
    """

    user_data_kib: int = setting(1024, Change.RESTART, ge=16, le=16_384)
    """Maximum size of an instance's user data in KiB. etcd stores user data, and is slow with large values."""

    etcd: EtcdSettings = section(EtcdSettings)
    """The store."""
